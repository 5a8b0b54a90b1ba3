"""One client of the load generator, in a process of its own; run as a script, it needs nothing but Python.

So it runs in the environment of whatever store it is a client of. Its argument is JSON: ``store`` (path of a module
with ``open_store``), ``options`` for it (with ``clients``, how many there are), ``client`` (number), ``chunk_bytes``,
``batch`` (chunks of a request), ``recent`` (requests that are read again). Then it reads JSON lines and answers each
with one: ``{"op": "fill", "requests": ...}``, ``{"op": "check"}``, ``{"op": "phase", "name": ..., "seconds": ...,
"writes": ..., "hits": ..., "lookups": ...}``.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import mmap
import os
import random
import sys
import time
from collections import deque
from typing import Any, Protocol

#: How often bytes are tried to be checked, and how long a store is given to make room in between, seconds.
CHECKS, CHECK_PAUSE_S = 50, 0.2


class Store(Protocol):
    """A store as its own client library sees it. A request is a prefix: keys in order, each the parent of the next."""

    def put(self, keys: list[bytes], data: list[memoryview]) -> int:
        """Stores chunks under keys of 32 bytes; how many of them are stored now."""
        ...

    def get(self, keys: list[bytes], into: list[memoryview]) -> int:
        """Fetches chunks; how many from the first on have come. A store whose library brings its own buffers puts them
        in the place of those in ``into``."""
        ...

    def exists(self, keys: list[bytes]) -> int:
        """How many from the first on are there, and may be read."""
        ...

    def close(self) -> None:
        """Ends it."""
        ...


class Worker:
    """What one client does. ``data`` is what it stores, ``into`` where it reads to: ``batch`` chunks each."""

    def __init__(self, setup: dict[str, Any]) -> None:
        self._chunk_bytes, self._batch = setup["chunk_bytes"], setup["batch"]
        self._data, self._into = self._memory(), self._memory()
        _fill(self._data, "/dev/urandom")
        self._recent: deque[list[bytes]] = deque(maxlen=setup["recent"])
        self._seed = os.urandom(16)
        self._made = 0
        self._draw = random.Random(setup["client"])
        spec = importlib.util.spec_from_file_location("load_store", setup["store"])
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self._store: Store = module.open_store(setup["options"], setup["client"], self._data, self._into)

    def fill(self, requests: int) -> dict[str, Any]:
        """Stores so many requests."""
        return {"stored": sum(self._put()[1] for _ in range(requests))}

    def check(self) -> dict[str, Any]:
        """Whether the bytes of one more request come back as they were sent. One that finds no room, or does not stay,
        is tried again."""
        for _ in range(CHECKS):
            keys = self._keys()
            stored = self._store.put(keys, self._data)
            _fill(self._into, "/dev/zero")
            into = list(self._into)
            got = self._store.get(keys, into) if stored == len(keys) else 0
            if got:
                return {"good": into[:got] == self._data[:got]}
            time.sleep(CHECK_PAUSE_S)
        return {"good": False}

    def phase(self, name: str, seconds: float, writes: float, hits: float, lookups: float) -> dict[str, Any]:
        """Requests for so many seconds: a share ``lookups`` of them asks only, of the others a share ``writes`` stores;
        a share ``hits`` of reads and lookups asks for what was stored. Answers how long each took, by kind."""
        taken: dict[str, list[float]] = {"store": [], "load": [], "miss": [], "lookup": []}
        chunks = {"stored": 0, "loaded": 0, "wanted": 0}
        cpu, began = time.process_time(), time.monotonic()
        while time.monotonic() - began < seconds:
            drawn = self._draw.random()
            if drawn >= lookups and (not self._recent or self._draw.random() < writes):
                took, stored = self._put()
                taken["store"].append(took)
                chunks["stored"] += stored
                continue
            hit = bool(self._recent) and self._draw.random() < hits
            keys = self._draw.choice(self._recent) if hit else self._keys()
            start = time.perf_counter()
            found = self._store.exists(keys) if drawn < lookups else self._store.get(keys, list(self._into))
            took = time.perf_counter() - start
            if drawn < lookups:
                taken["lookup"].append(took)
            else:
                taken["load" if hit else "miss"].append(took)
                chunks["loaded"] += found
                chunks["wanted"] += len(keys) if hit else 0
        ended = time.monotonic()
        used = time.process_time() - cpu
        return {"name": name, "taken": taken, "began": began, "ended": ended, "cpu": used, **chunks}

    def close(self) -> None:
        """Ends the store."""
        self._store.close()

    def _put(self) -> tuple[float, int]:
        keys = self._keys()
        start = time.perf_counter()
        stored = self._store.put(keys, self._data)
        took = time.perf_counter() - start
        if stored == len(keys):
            self._recent.append(keys)
        return took, stored

    def _keys(self) -> list[bytes]:
        self._made += 1
        seed = self._seed + self._made.to_bytes(8, "little")
        return [hashlib.sha256(seed + i.to_bytes(4, "little")).digest() for i in range(self._batch)]

    def _memory(self) -> list[memoryview]:
        """Chunks that lie one behind the other in memory of whole pages."""
        region = memoryview(mmap.mmap(-1, self._chunk_bytes * self._batch))
        return [region[i * self._chunk_bytes : (i + 1) * self._chunk_bytes] for i in range(self._batch)]


def _fill(chunks: list[memoryview], source: str) -> None:
    with open(source, "rb") as file:
        for chunk in chunks:
            file.readinto(chunk)


def main() -> None:
    """Serves until its input ends. What a store's library prints goes to the standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = Worker(json.loads(sys.argv[1]))
    print(json.dumps({"ready": True}), file=answers, flush=True)
    try:
        for line in sys.stdin:
            request = json.loads(line)
            answer = getattr(worker, request.pop("op"))(**request)
            print(json.dumps(answer), file=answers, flush=True)
    finally:
        worker.close()


if __name__ == "__main__":
    main()
