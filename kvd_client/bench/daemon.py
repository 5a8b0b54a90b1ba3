"""A daemon for a benchmark: on paths and ports of its own, gone afterwards."""

from __future__ import annotations

import os
import re
import select
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from types import TracebackType
from typing import Self

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 30.0
HTTP_TIMEOUT_S = 30.0
SHARED_MEMORY = "/dev/shm"


class BenchDaemon:
    """``kvd serve`` with a pool of ``pool_bytes`` (whole MiB). ``start_s``: from its last start to SERVING, seconds.

    ``warm``: its pool is files on tmpfs, which a restart finds again; otherwise it is anonymous memory. ``spill_dir``
    and ``spill_bytes`` (whole MiB): the disk tier; that directory is the caller's. ``huge_pages``: those of the hugetlb
    pool are asked for. Raises RuntimeError when the daemon does not start.
    """

    def __init__(
        self,
        pool_bytes: int,
        *,
        populate: str = "start",
        warm: bool = False,
        spill_dir: str | None = None,
        spill_bytes: int = 0,
        huge_pages: bool = False,
    ) -> None:
        self._directory = tempfile.mkdtemp(prefix="kvd-bench-")
        self._pool_dir = tempfile.mkdtemp(prefix="kvd-bench-", dir=SHARED_MEMORY) if warm else None
        socket = os.path.join(self._directory, "kvd.sock")
        self.unix_endpoint = f"unix:{socket}"
        self._flags = [
            *("--socket", socket, "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0"),
            *("--pool", f"{pool_bytes >> 20}MiB", "--pool-dir", self._pool_dir or "none", "--populate", populate),
            *(("--huge-pages",) if huge_pages else ()),
            *("--log-level", "error"),
        ]
        if spill_dir is not None:
            self._flags += ["--spill-dir", spill_dir, "--spill", f"{spill_bytes >> 20}MiB"]
        try:
            self._start()
        except BaseException:
            self._remove()
            raise

    def _start(self) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("KVD_")}
        began = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "kvd", "serve", *self._flags], stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self._process.stdout is not None
        answered = select.select([self._process.stdout], [], [], START_TIMEOUT_S)[0]
        line = self._process.stdout.readline() if answered else ""
        self.start_s = time.perf_counter() - began
        tcp, http = re.search(r"tcp://\S+", line), re.search(r"http://\S+", line)
        if tcp is None or http is None:
            self._end()
            raise RuntimeError("the daemon did not start: see what it has said above")
        self.tcp_endpoint, self._http = tcp.group(), http.group()

    def restart(self, *, crash: bool) -> None:
        """Ends it, by SIGKILL or properly, and starts it again with the same directories and the same socket."""
        self._end(crash=crash)
        self._start()

    @property
    def settings(self) -> str:
        """Its flags, those that only name places left out."""
        return " ".join(self._flags[self._flags.index("--pool") : self._flags.index("--log-level")])

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def loop_lag(self) -> list[tuple[float, float]]:
        """How late its event loop has run so far: (bound in seconds, how often not later than that), bounds rising.

        Raises OSError.
        """
        found = re.findall(r'kvd_event_loop_lag_seconds_bucket\{le="([^"]+)"\} (\S+)', self._metrics())
        return [(float(bound), float(count)) for bound, count in found]

    def promotions(self) -> tuple[float, float]:
        """Seconds that its reads of records have taken so far, waiting included, and how many they were. OSError."""
        found = dict(re.findall(r"^kvd_promote_seconds_(sum|count) (\S+)", self._metrics(), re.MULTILINE))
        return float(found["sum"]), float(found["count"])

    def _metrics(self) -> str:
        with urllib.request.urlopen(f"{self._http}/metrics", timeout=HTTP_TIMEOUT_S) as answer:
            text: bytes = answer.read()
        return text.decode()

    def rss_bytes(self) -> int:
        """Resident memory of the daemon beside its pool: private pages, and files."""
        with open(f"/proc/{self._process.pid}/status") as status:
            fields = dict(line.split(":", 1) for line in status)
        return sum(int(fields[name].split()[0]) << 10 for name in ("RssAnon", "RssFile"))

    def close(self) -> None:
        """Ends it and removes its files."""
        self._end()
        self._remove()

    def _end(self, *, crash: bool = False) -> None:
        if crash:
            self._process.kill()
        else:
            self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def _remove(self) -> None:
        for directory in (self._directory, self._pool_dir):
            if directory is not None:
                shutil.rmtree(directory, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
