"""What a disk does without kvd: fio where it is installed, else threads that read and write the same way."""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import random
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator

from kvd_client.bench.figures import GIB, timed

FIO_TIMEOUT_S = 600.0
PAGE_BYTES = 4096


class BareDisk:
    """Files in a directory of their own below ``directory``, written and read in blocks of ``block_bytes`` (a multiple
    of 4 KiB) by ``threads`` threads, each with one block under way, past the page cache where that can be done.

    ``tool``: what measures. Raises OSError.
    """

    def __init__(self, directory: str, block_bytes: int, threads: int, total_bytes: int) -> None:
        self._fio = shutil.which("fio")
        self.tool = "fio" if self._fio is not None else "threads of preadv and pwritev"
        self._block_bytes, self._threads = block_bytes, threads
        self._file_bytes = max(1, total_bytes // threads // block_bytes) * block_bytes
        self._directory = tempfile.mkdtemp(prefix="kvd-bench-bare-", dir=directory)
        self._paths = [os.path.join(self._directory, f"bare.{i}") for i in range(threads)]
        self._direct = os.O_DIRECT if takes_direct(self._paths[0]) else 0
        self._blocks = [mmap.mmap(-1, block_bytes) for _ in range(threads)]
        for block in self._blocks:
            block.write(os.urandom(block_bytes))
        self._unread: list[tuple[int, int]] = []
        self._write_all()

    def write(self) -> float:
        """GiB/s of writing new files."""
        for path in self._paths:
            os.unlink(path)
        return self._with_fio("write") if self._fio else self._bandwidth(self._write_all)

    def read(self) -> float:
        """GiB/s of reading them."""
        return self._with_fio("read") if self._fio else self._bandwidth(lambda: self._each(self._read))

    def read_block(self) -> float:
        """Microseconds that one read of one block takes: each block in turn, in an order that no cache foresees."""
        if not self._unread:
            blocks = range(self._file_bytes // self._block_bytes)
            self._unread = [(number, at * self._block_bytes) for number in range(self._threads) for at in blocks]
            random.shuffle(self._unread)
        number, place = self._unread.pop()
        with self._opened(number, os.O_RDONLY) as fd:
            return timed(lambda: _whole(os.preadv(fd, [self._blocks[0]], place), self._block_bytes)) * 1e6

    def close(self) -> None:
        """Removes the files."""
        shutil.rmtree(self._directory, ignore_errors=True)

    # -- fio

    def _with_fio(self, what: str) -> float:
        result = subprocess.run(
            [self._fio or "fio", "--name=bare", f"--directory={self._directory}", "--filename_format=bare.$jobnum"]
            + [f"--rw={what}", f"--bs={self._block_bytes}", f"--size={self._file_bytes}", "--ioengine=psync"]
            + [f"--direct={int(bool(self._direct))}", f"--numjobs={self._threads}", "--thread", "--group_reporting"]
            + ["--invalidate=1", "--output-format=json"],
            capture_output=True,
            text=True,
            timeout=FIO_TIMEOUT_S,
            check=False,
        )
        if result.returncode:
            raise RuntimeError(f"fio failed: {result.stderr.strip() or result.stdout.strip()}")
        # Before the JSON there may be notes.
        answer = json.loads(result.stdout[result.stdout.index("{") :])
        return float(answer["jobs"][0][what]["bw_bytes"]) / GIB

    # -- without it

    def _bandwidth(self, work: Callable[[], None]) -> float:
        return self._file_bytes * self._threads / timed(work) / GIB

    def _write_all(self) -> None:
        self._each(self._write)

    def _each(self, work: Callable[[int], None]) -> None:
        failures: list[OSError] = []

        def run(number: int) -> None:
            try:
                work(number)
            except OSError as error:
                failures.append(error)

        threads = [threading.Thread(target=run, args=(number,)) for number in range(self._threads)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]

    def _write(self, number: int) -> None:
        with self._opened(number, os.O_WRONLY | os.O_CREAT) as fd:
            os.posix_fallocate(fd, 0, self._file_bytes)
            for place in range(0, self._file_bytes, self._block_bytes):
                _whole(os.pwritev(fd, [self._blocks[number]], place), self._block_bytes)

    def _read(self, number: int) -> None:
        with self._opened(number, os.O_RDONLY) as fd:
            for place in range(0, self._file_bytes, self._block_bytes):
                _whole(os.preadv(fd, [self._blocks[number]], place), self._block_bytes)

    @contextlib.contextmanager
    def _opened(self, number: int, flags: int) -> Iterator[int]:
        fd = os.open(self._paths[number], flags | self._direct, 0o600)
        try:
            yield fd
        finally:
            os.close(fd)


def takes_direct(path: str) -> bool:
    """Whether the file at ``path``, made if need be, can be written past the page cache. Raises OSError."""
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o600))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    return True


def _whole(moved_bytes: int, wanted_bytes: int) -> None:
    if moved_bytes != wanted_bytes:
        raise OSError(errno.EIO, f"{moved_bytes} bytes moved instead of {wanted_bytes}")
