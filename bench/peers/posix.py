"""A file system as a peer: a file for each chunk, on tmpfs and on the disk that is measured."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SHARED_MEMORY = "/dev/shm"


class PeerServer:
    """Directories; there is no process. The clients remove their own oldest files when their part is full."""

    most_clients = 1 << 10
    python = sys.executable
    client = str(ROOT / "bench" / "clients" / "posix_client.py")
    about = "files: one for each chunk, written beside its name and renamed; on the disk past the page cache (O_DIRECT)"

    def __init__(self, pool_bytes: int, directory: str) -> None:
        self._memory = tempfile.mkdtemp(prefix="kvd-bench-", dir=SHARED_MEMORY)
        disk = Path(directory) / "posix"
        disk.mkdir()
        self.variants: dict[str, dict[str, Any]] = {
            "tmpfs": {"directory": self._memory, "pool_bytes": pool_bytes, "direct": False},
            "disk": {"directory": str(disk), "pool_bytes": pool_bytes, "direct": True},
        }
        self.pids: list[int] = []

    def loop_lag(self) -> list[tuple[float, float]]:
        """There is no loop."""
        return []

    def close(self) -> None:
        """Removes the files."""
        shutil.rmtree(self._memory, ignore_errors=True)
