"""LMCache as a peer: its multi-process server without a GPU, its memory shared with clients (engine-driven)."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

from kvd_client.bench.processes import Process, free_port, listens, python_of

ROOT = Path(__file__).resolve().parents[2]
SHARED_MEMORY = Path("/dev/shm")
#: Tokens of a chunk, its default.
CHUNK_TOKENS = 256


class PeerServer:
    """``lmcache server``, over ZeroMQ (its default) and shared memory."""

    #: Each client imports torch: about 0.6 GiB.
    most_clients = 4
    client = str(ROOT / "bench" / "clients" / "lmcache_client.py")

    def __init__(self, pool_bytes: int, directory: str) -> None:
        self.python = python_of(ROOT, "lmcache")
        binary = Path(self.python).with_name("lmcache")
        port, http = free_port(), free_port()
        self._name = f"kvd-bench-{os.getpid()}"
        settings = ["server", "--host", "127.0.0.1", "--port", str(port), "--http-host", "127.0.0.1"]
        settings += ["--http-port", str(http), "--shm-name", self._name, "--chunk-size", str(CHUNK_TOKENS)]
        settings += ["--l1-size-gb", f"{pool_bytes / (1 << 30):g}", "--no-l1-use-lazy", "--eviction-policy", "LRU"]
        settings += ["--max-workers", str(min(8, os.cpu_count() or 1)), "--supported-transfer-mode", "engine_driven"]
        settings += ["--disable-observability"]
        environment = {"LMCACHE_DISABLE_BANNER": "1", "LMCACHE_LOG_LEVEL": "ERROR", "LMCACHE_TRACK_USAGE": "false"}
        self._process = Process([str(binary), *settings], directory, environment)
        try:
            self._process.wait(lambda: listens(port) and listens(http))
        except BaseException:
            self.close()
            raise
        found = subprocess.run(
            [self.python, "-c", "from importlib.metadata import version; print(version('lmcache'), version('torch'))"],
            capture_output=True,
            text=True,
            check=True,
        )
        self.about = "lmcache {} (torch {}): lmcache ".format(*found.stdout.split()) + " ".join(settings)
        self.variants: dict[str, dict[str, Any]] = {"local": {"url": f"tcp://127.0.0.1:{port}"}}
        self.pids = [self._process.pid]

    def loop_lag(self) -> list[tuple[float, float]]:
        """Not known."""
        return []

    def close(self) -> None:
        """Ends it, and removes what it may have left in shared memory."""
        self._process.close()
        for path in SHARED_MEMORY.glob(f"*{self._name}*"):
            path.unlink(missing_ok=True)
