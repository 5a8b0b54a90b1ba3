"""Records what lookups ask for, as a trace that ``kvd replay`` reads: which prefixes return, and when.

One JSON object a line, one line a request: ``timestamp`` (ms since the first), ``input_length`` (tokens of its whole
chunks), ``output_length`` (not known here: 0), ``hash_ids`` (one number per chunk), ``session_id`` (of the engine),
``block_tokens`` and ``block_bytes`` (of one chunk). A number stands for the whole prefix up to its chunk, and is made
with a secret that is never written down: it says which prefixes are equal within the file, and nothing else.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from io import FileIO
from queue import SimpleQueue
from typing import NamedTuple

from kvd.types import Namespace, SessionId

log = logging.getLogger(__name__)

#: The file is not written beyond this.
MAX_FILE_BYTES = 1 << 30
#: Keys of requests that wait to be written, at most; further requests are left out of the trace.
MAX_QUEUED_KEYS = 1 << 18
#: Files with the same name: each start of the daemon writes one of its own.
MAX_FILES = 1000
_CLOSE_TIMEOUT_S = 5.0
#: The loop gets its turn after so many keys.
_KEYS_AT_ONCE = 64
_ID_BITS = 53  # what every reader of JSON takes as it is


class _Asked(NamedTuple):
    at: float
    session: SessionId
    namespace: Namespace
    keys: Sequence[bytes]


class Recorder:
    """``asked`` belongs to the event loop and never waits; a thread makes the numbers and writes the file."""

    def __init__(
        self,
        path: str,
        *,
        clock: Callable[[], float] = time.monotonic,
        max_file_bytes: int = MAX_FILE_BYTES,
        max_queued_keys: int = MAX_QUEUED_KEYS,
    ) -> None:
        """Makes the file, readable by this user only: ``path``, or ``path.1`` and so on when that is taken.

        Raises OSError.
        """
        self.path, self._file = _new_file(path)
        self._clock = clock
        self._max_file_bytes = max_file_bytes
        self._max_queued_keys = max_queued_keys
        self._secret = secrets.token_bytes(32)
        self._queue: SimpleQueue[_Asked | None] = SimpleQueue()
        # Written by the loop only ...
        self._taken_keys = 0
        self._refused = 0
        # ... and by the thread only.
        self._done_keys = 0
        self._recorded = 0
        self._lost = 0
        self._full = False
        self._first_at: float | None = None
        self._file_bytes = 0
        self._thread = threading.Thread(target=self._run, name="kvd-recorder", daemon=True)

    def start(self) -> None:
        """Begins to write."""
        self._thread.start()

    def asked(self, session: SessionId, namespace: Namespace, keys: Sequence[bytes]) -> None:
        """A request has been looked up: all its keys, from the root. Left out when too much waits to be written."""
        if not keys:
            return
        if self._full or self._taken_keys - self._done_keys + len(keys) > self._max_queued_keys:
            self._refused += 1
            return
        self._taken_keys += len(keys)
        self._queue.put(_Asked(self._clock(), session, namespace, keys))

    def totals(self) -> Mapping[str, int]:
        """Requests by what became of them."""
        return {"recorded": self._recorded, "dropped": self._refused + self._lost}

    def close(self) -> None:
        """Writes what waits, and ends. Waits for it at most 5 s."""
        if self._thread.ident is None:
            self._file.close()
            return
        self._queue.put(None)
        self._thread.join(_CLOSE_TIMEOUT_S)
        if self._thread.is_alive():
            log.warning("record_trace: %s takes too long to be written; its end is missing", self.path)

    # -- the thread

    def _run(self) -> None:
        with self._file:
            while (asked := self._queue.get()) is not None:
                if not self._full and self._write(self._line(asked)):
                    self._recorded += 1
                else:
                    self._lost += 1
                self._done_keys += len(asked.keys)

    def _write(self, line: bytes) -> bool:
        if self._file_bytes + len(line) > self._max_file_bytes:
            self._stop(f"has {self._file_bytes} bytes, and no more are written")
            return False
        rest = memoryview(line)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self._stop(f"cannot be written: {error.strerror}")
            with contextlib.suppress(OSError):
                self._file.truncate(self._file_bytes)  # no half of a line
            return False
        self._file_bytes += len(line)
        return True

    def _stop(self, why: str) -> None:
        self._full = True
        log.warning("record_trace: %s %s; the daemon goes on without recording", self.path, why)

    def _line(self, asked: _Asked) -> bytes:
        if self._first_at is None:
            self._first_at = asked.at
        identity = asked.namespace.identity
        block_tokens = max(1, identity.block_tokens * identity.chunk_blocks)  # what is no engine may not know
        request = {
            "timestamp": int((asked.at - self._first_at) * 1000),
            "input_length": len(asked.keys) * block_tokens,
            "output_length": 0,
            "hash_ids": self._numbers(asked.namespace.id, asked.keys),
            "session_id": str(asked.session),
            "block_tokens": block_tokens,
            "block_bytes": asked.namespace.chunk_bytes,
        }
        return json.dumps(request).encode() + b"\n"

    def _numbers(self, namespace_id: bytes, keys: Sequence[bytes]) -> list[int]:
        """A number for each key that depends on the namespace and on all keys before it."""
        numbers = []
        digest = namespace_id
        for index, key in enumerate(keys):
            digest = blake2b(digest + key, digest_size=32, key=self._secret).digest()
            numbers.append(int.from_bytes(digest[:8], "little") >> (64 - _ID_BITS))
            if index % _KEYS_AT_ONCE == _KEYS_AT_ONCE - 1:
                time.sleep(0)
        return numbers


def _new_file(path: str) -> tuple[str, FileIO]:
    for number in range(MAX_FILES):
        name = f"{path}.{number}" if number else path
        try:
            fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            continue
        return name, FileIO(fd, "wb")
    raise FileExistsError(17, f"there are {MAX_FILES} files of that name already", path)
