"""Redis as a peer: one server, over its Unix socket and over TCP."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from kvd_client.bench.processes import Process, free_port, listens, python_of

ROOT = Path(__file__).resolve().parents[2]
#: Its documents advise I/O threads from four cores on, and to leave some to the rest of the machine.
IO_CORES = 4


class PeerServer:
    """``redis-server`` as a cache: no persistence, bounded memory, the least recently used key goes."""

    most_clients = 1 << 10
    client = str(ROOT / "bench" / "clients" / "redis_client.py")

    def __init__(self, pool_bytes: int, directory: str) -> None:
        binary = shutil.which("redis-server") or shutil.which("valkey-server")
        if binary is None:
            raise RuntimeError("redis-server is not installed: run bench/install.sh redis")
        self.python = python_of(ROOT, "redis")
        port, path = free_port(), str(Path(directory).resolve() / "redis.sock")
        settings = ["--bind", "127.0.0.1", "--port", str(port), "--unixsocket", path]
        settings += ["--save", "", "--appendonly", "no"]
        settings += ["--maxmemory", str(pool_bytes), "--maxmemory-policy", "allkeys-lru"]
        settings += ["--maxmemory-samples", "10"]
        cores = os.cpu_count() or 1
        if cores >= IO_CORES:
            settings += ["--io-threads", str(min(8, cores - 2)), "--io-threads-do-reads", "yes"]
        self._process = Process([binary, *settings], directory)
        try:
            self._process.wait(lambda: listens(port) and os.path.exists(path))
        except BaseException:
            self._process.close()
            raise
        version = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True).stdout.strip()
        self.about = f"{version}: {Path(binary).name} {' '.join(word or repr(word) for word in settings)}"
        self.variants: dict[str, dict[str, Any]] = {"unix": {"path": path}, "tcp": {"port": port}}
        self.pids = [self._process.pid]

    def loop_lag(self) -> list[tuple[float, float]]:
        """Not known."""
        return []

    def close(self) -> None:
        """Ends it."""
        self._process.close()
