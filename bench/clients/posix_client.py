"""Files as a store for the load generator: what engines' file-system tiers do, without the engine."""

from __future__ import annotations

import os
import shutil
from collections import deque
from pathlib import Path
from typing import Any


class FileStore:
    """A directory for each client. ``quota``: files that it keeps; beyond it the oldest are removed."""

    def __init__(self, directory: Path, quota: int, *, direct: bool) -> None:
        directory.mkdir()
        self._directory, self._quota = directory, quota
        self._flags = os.O_DIRECT if direct else 0
        self._kept: deque[Path] = deque()

    def put(self, keys: list[bytes], data: list[memoryview]) -> int:
        """Each file is written under another name and renamed, so that nobody reads half of it."""
        while len(self._kept) + len(keys) > self._quota:
            self._kept.popleft().unlink()
        for key, chunk in zip(keys, data, strict=True):
            path = self._directory / key.hex()
            fd = os.open(f"{path}.part", os.O_WRONLY | os.O_CREAT | self._flags, 0o600)
            try:
                if os.write(fd, chunk) != len(chunk):
                    raise OSError(f"not all of {path} was written")
            finally:
                os.close(fd)
            os.rename(f"{path}.part", path)
            self._kept.append(path)
        return len(keys)

    def get(self, keys: list[bytes], into: list[memoryview]) -> int:
        """Reads files until one is not there."""
        for number, (key, chunk) in enumerate(zip(keys, into, strict=True)):
            try:
                fd = os.open(self._directory / key.hex(), os.O_RDONLY | self._flags)
            except FileNotFoundError:
                return number
            try:
                if os.readv(fd, [chunk]) != len(chunk):
                    return number
            finally:
                os.close(fd)
        return len(keys)

    def exists(self, keys: list[bytes]) -> int:
        """stat of each file until one is not there."""
        for number, key in enumerate(keys):
            if not os.path.exists(self._directory / key.hex()):
                return number
        return len(keys)

    def close(self) -> None:
        """Removes the directory."""
        shutil.rmtree(self._directory, ignore_errors=True)


def open_store(options: dict[str, Any], client: int, data: list[memoryview], into: list[memoryview]) -> FileStore:
    """``options``: ``directory``, ``pool_bytes`` of all clients together, ``direct`` (past the page cache)."""
    share = options["pool_bytes"] // options["clients"] // len(data[0])
    return FileStore(Path(options["directory"]) / str(client), max(share, len(data)), direct=options["direct"])
