"""A real daemon in a process of its own, for tests: on temporary paths and free ports, gone when the test is over.

    with Daemon(pool="16MiB", quarantine=0.2) as daemon:
        client = Client(f"unix:{daemon.socket}")

Every flag of ``kvd serve`` is a keyword (``pool_dir=...`` is ``--pool-dir``, ``True`` is a flag without a value, a list
one that is given several times). A daemon that is started again after ``kill`` or ``stop`` comes back on the same
socket and the same ports, with the same directories. Its pool is anonymous, and it has no disk, unless told otherwise:

    with Daemon(warm=True, spill="64MiB") as daemon:  # a pool that outlives the process, and a directory for extents
        daemon.kill()
        daemon.start()
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import weakref
from pathlib import Path
from typing import Any

import grpc

from kvd.wire.pb import kvd_pb2, kvd_pb2_grpc
from tests.wait import wait_until

ROOT = Path(__file__).resolve().parent.parent
START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 30.0

_alive: weakref.WeakSet[Daemon] = weakref.WeakSet()


@atexit.register
def _clean_up() -> None:
    for daemon in list(_alive):
        daemon.close()


def clean_environment(**more: str) -> dict[str, str]:
    """This process's environment without any ``KVD_`` variable, and with ``more``."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("KVD_")}
    path = os.pathsep.join([str(ROOT), kept["PYTHONPATH"]] if kept.get("PYTHONPATH") else [str(ROOT)])
    return {**kept, "PYTHONPATH": path, **more}


def run_kvd(*arguments: str, timeout_s: float = 60.0, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs ``kvd ARGUMENTS`` to its end and returns its exit code and output."""
    return subprocess.run(
        [sys.executable, "-m", "kvd", *arguments],
        env=clean_environment(**environment),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
        cwd=ROOT,
    )


class Daemon:
    """One ``kvd serve`` process. ``start=False`` leaves it unstarted; ``env`` adds environment variables.

    ``warm``: the pool is files in a directory of its own on tmpfs (``pool_directory``). ``spill=SIZE`` without
    ``spill_dir``: extents lie in ``spill_directory``. Both directories go with the daemon's ``close``.
    """

    def __init__(
        self, *, start: bool = True, env: dict[str, str] | None = None, warm: bool = False, **options: object
    ) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="kvd-test-", dir="/tmp"))
        self.pool_directory = Path(tempfile.mkdtemp(prefix="kvd-test-", dir="/dev/shm")) if warm else None
        self.spill_directory = self.directory / "spill"
        self.options: dict[str, object] = {
            "socket": str(self.directory / "kvd.sock"),
            "listen": "127.0.0.1:0",
            "http": "127.0.0.1:0",
            "pool": "64MiB",
            "pool_dir": self.pool_directory or "none",
            **options,
        }
        if "spill" in options and "spill_dir" not in options:
            self.spill_directory.mkdir()
            self.options["spill_dir"] = self.spill_directory
        self.line = ""
        self._env = env or {}
        self._process: subprocess.Popen[bytes] | None = None
        self._output = self.directory / "stdout"
        self._errors = self.directory / "stderr"
        _alive.add(self)
        if start:
            try:
                self.start()
            except BaseException:
                self.close()
                raise

    # -- life

    def start(self, *, wait: bool = True) -> None:
        """Starts the process and, unless told otherwise, waits until it serves."""
        assert self._process is None or self._process.poll() is not None, "already running"
        self._output.write_bytes(b"")
        with self._output.open("wb") as output, self._errors.open("ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "kvd", "serve", *self._flags()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                env=clean_environment(**self._env),
                cwd=ROOT,
            )
        if wait:
            self.wait_ready()

    def wait_ready(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Waits for the line that says where the endpoints are; fails with the log if the process ends first."""

        def line() -> str | None:
            if self._process is None or self._process.poll() is not None:
                raise AssertionError(f"the daemon ended with {self.exit_code} instead of serving:\n{self.log}")
            text = self._output.read_text()
            return text.splitlines()[0] if "\n" in text else None

        self.line = wait_until(line, timeout_s, "the daemon to serve") or ""
        # The ports that were found stay, so that a daemon started again is found where it was.
        self.options["listen"] = self._endpoint("tcp")
        self.options["http"] = self._endpoint("http")
        self.options["data"] = self._endpoint("data")

    def kill(self) -> None:
        """Ends the process as a crash would."""
        self._signal(signal.SIGKILL)
        self._wait()

    def stop(self) -> int:
        """Asks the process to end, waits, and returns its exit code."""
        self._signal(signal.SIGTERM)
        return self._wait()

    def pause(self) -> None:
        """Makes the daemon hang."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Ends a ``pause``."""
        self._signal(signal.SIGCONT)

    def close(self) -> None:
        """Leaves nothing behind, whatever state the daemon is in."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait(STOP_TIMEOUT_S)
        for directory in (self.directory, self.pool_directory):
            if directory is not None:
                shutil.rmtree(directory, ignore_errors=True)
        _alive.discard(self)

    def __enter__(self) -> Daemon:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            print(f"--- log of the daemon on {self.socket}\n{self.log[-6000:]}", file=sys.stderr)
        self.close()

    # -- where it is

    @property
    def pid(self) -> int:
        """Process id."""
        assert self._process is not None
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """How the process ended; None while it runs."""
        return None if self._process is None else self._process.poll()

    @property
    def socket(self) -> str:
        """Path of the gRPC socket."""
        return str(self.options["socket"])

    @property
    def unix_endpoint(self) -> str:
        """``unix:PATH``."""
        return f"unix:{self.socket}"

    @property
    def tcp_endpoint(self) -> str:
        """``tcp://HOST:PORT``."""
        return f"tcp://{self._endpoint('tcp')}"

    @property
    def data_endpoint(self) -> str:
        """``HOST:PORT`` of the data plane."""
        return self._endpoint("data")

    @property
    def http_url(self) -> str:
        """``http://HOST:PORT``."""
        return f"http://{self._endpoint('http')}"

    @property
    def log(self) -> str:
        """All that the daemon has said on its error stream, over all its starts."""
        return self._errors.read_text() if self._errors.exists() else ""

    # -- what it says

    def stats(self) -> kvd_pb2.StatsResponse:
        """The answer to Stats."""
        with grpc.insecure_channel(self.unix_endpoint) as channel:
            stub: Any = kvd_pb2_grpc.KvdStub(channel)  # type: ignore[no-untyped-call]
            response: kvd_pb2.StatsResponse = stub.Stats(kvd_pb2.StatsRequest(), timeout=10)
            return response

    def audit(self) -> list[str]:
        """What the daemon's books have to say against each other; [] is good."""
        with grpc.insecure_channel(self.unix_endpoint) as channel:
            stub: Any = kvd_pb2_grpc.AdminStub(channel)  # type: ignore[no-untyped-call]
            return list(stub.Audit(kvd_pb2.AuditRequest(), timeout=30).findings)

    def status(self) -> dict[str, Any]:
        """What ``kvd status --json`` prints."""
        result = run_kvd("status", "--json", "--endpoint", self.unix_endpoint)
        assert result.returncode == 0, result.stderr
        answer: dict[str, Any] = json.loads(result.stdout)
        return answer

    def get(self, path: str) -> tuple[int, str]:
        """Status and body of a GET on the HTTP endpoint."""
        try:
            with urllib.request.urlopen(self.http_url + path, timeout=10) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def metrics(self) -> dict[str, float]:
        """Every sample of /metrics: ``name{labels}`` to value."""
        samples = {}
        for line in self.get("/metrics")[1].splitlines():
            if line and not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                samples[name] = float(value)
        return samples

    # -- inside

    def _flags(self) -> list[str]:
        flags = []
        for name, value in self.options.items():
            for one in value if isinstance(value, list) else [value]:
                if one is None or one is False:
                    continue
                flags.append("--" + name.replace("_", "-"))
                if one is not True:
                    flags.append(str(one))
        return flags

    def _endpoint(self, kind: str) -> str:
        found = re.search(rf"\b{kind}://(\S+)", self.line)
        assert found, f"no {kind} endpoint in {self.line!r}"
        return found.group(1)

    def _signal(self, number: int) -> None:
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    def _wait(self) -> int:
        assert self._process is not None
        return self._process.wait(STOP_TIMEOUT_S)
