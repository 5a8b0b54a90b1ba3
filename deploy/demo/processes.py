"""The processes of the demo: the daemon and the replicas. None of them outlives the demo, however it ends."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

DAEMON_START_S = 30.0
REPLICA_START_S = 300.0
ANSWER_S = 300.0
END_S = 30.0

#: Lines of an engine's log that are shown when it fails.
LOG_LINES = 30

_libc = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG = 1


class Failed(Exception):
    """A process did not do its part; the text says which, and shows its log."""


class Daemon:
    """``kvd serve`` on paths of its own. Raises Failed when it does not start."""

    def __init__(self, directory: Path) -> None:
        self.log = directory / "daemon.log"
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "kvd", "serve", "--pool", "1GiB", "--pool-dir", "none"]
                + ["--socket", str(directory / "kvd.sock"), "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0"],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment(),
                preexec_fn=_die_with_parent,
            )
        assert self._process.stdout is not None
        try:
            answered = select.select([self._process.stdout], [], [], DAEMON_START_S)[0]
            self.line = self._process.stdout.readline().strip() if answered else ""
            found = [re.search(rf"{kind}\S+", self.line) for kind in ("unix:", "tcp://", "http://")]
            if None in found:
                raise Failed(f"the daemon did not start: {self.line}\n{self.log.read_text()}")
        except BaseException:
            self.close()
            raise
        self.unix, self.tcp, self.http = (match.group() for match in found if match)

    def close(self) -> None:
        """Ends it."""
        _end(self._process)


class Replica:
    """A vLLM engine in a process of its own."""

    def __init__(self, name: str, model: Path, max_tokens: int, endpoint: str, directory: Path) -> None:
        self.name, self.endpoint = name, endpoint
        self._log = directory / f"replica-{name}.log"
        ours, theirs = socket.socketpair()
        with self._log.open("w") as log, theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "deploy.demo.replica", "--model", str(model), "--endpoint", endpoint]
                + ["--max-tokens", str(max_tokens), "--fd", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment(),
                preexec_fn=_die_with_parent,
                cwd=ROOT,
            )
        self._socket = ours
        self._talk = ours.makefile("rw")

    def wait_ready(self) -> None:
        """Waits until the engine can be asked."""
        self._read(REPLICA_START_S)

    def request(self, op: str, **arguments: Any) -> dict[str, Any]:
        """One request and its answer. Raises Failed with the end of the engine's log when there is none."""
        with contextlib.suppress(OSError):  # a process that has ended is noticed when it is to answer
            print(json.dumps({"op": op, **arguments}), file=self._talk, flush=True)
        return self._read(ANSWER_S)

    def _read(self, timeout_s: float) -> dict[str, Any]:
        self._socket.settimeout(timeout_s)
        try:
            line = self._talk.readline()
        except OSError:  # too late, or the process has ended
            line = ""
        if not line:
            end = "\n".join(self._log.read_text(errors="replace").splitlines()[-LOG_LINES:])
            raise Failed(f"replica {self.name} does not answer. The end of its log:\n{end}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """Ends it."""
        with contextlib.suppress(OSError):
            self._talk.close()
        self._socket.close()
        _end(self._process)


def environment() -> dict[str, str]:
    """This process's, without settings of another kvd."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("KVD_")}
    return {**kept, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), kept.get("PYTHONPATH")]))}


def _end(process: subprocess.Popen[Any]) -> None:
    process.terminate()
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _die_with_parent() -> None:
    """Between fork and exec: asks the kernel to end this process when the demo's has ended, even by SIGKILL."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
