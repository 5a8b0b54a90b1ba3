"""A client that stores and loads random prefixes, and checks every byte it is given, until its input closes.

    python -m tests.soak.worker ENDPOINT TOTAL_BYTES SEED

Prints ``ready`` when it is connected and, when it ends, its counts as one line of JSON. A wrong byte ends it at once
with exit code 1 and says which. On SIGUSR1 it stops for ever in the middle of its next store, says ``half`` and waits
to be killed: half of a chunk's bytes are in its slot by then.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable

from kvd_client import Client, Location, NamespaceHandle, Piece, ReadLease, ReserveStatus, Span, Unavailable, whole
from tests.soak.corpus import Corpus, chained, corpora

#: Long: what is looked for here is wrong bytes and leaks, on machines that are busy.
TIMEOUT_S = 30.0

#: Squared draws: the first prefixes are asked for far more often than the last ones.
FAVOUR = 2.0


class WrongBytes(Exception):
    """What was read is not what was stored."""


class Worker:
    """One client at work."""

    def __init__(self, endpoint: str, total_bytes: int, seed: int) -> None:
        self.counts: Counter[str] = Counter()
        self.half = threading.Event()
        self._random = random.Random(seed)
        self._client = Client(endpoint, name=f"soak {seed}", timeout_s=TIMEOUT_S)
        self._client.connect(TIMEOUT_S)
        self._spaces = [
            (corpus, self._client.namespace(corpus.identity, corpus.chunk_bytes)) for corpus in corpora(total_bytes)
        ]
        self._ways: list[tuple[Callable[[Corpus, NamespaceHandle, list[bytes]], None], int]] = [
            (self._load_then_store, 12),
            (self._read_late, 3),
            (self._look_in_place, 3),
            (self._copy_slowly, 2),
            (self._change_its_mind, 2),
            (self._hold, 1),
        ]

    def step(self) -> None:
        """Does one thing with one prefix."""
        corpus, namespace = self._random.choice(self._spaces)
        keys = corpus.keys(int(corpus.prefixes * self._random.random() ** FAVOUR))
        if self.half.is_set():
            self._stop_half_way(corpus, namespace, keys)
        way = self._random.choices([way for way, _ in self._ways], [weight for _, weight in self._ways])[0]
        try:
            way(corpus, namespace, keys)
        except Unavailable as error:
            # A deadline on a machine with more processes than it can run: the daemon is fine, and so are we.
            self.counts["unavailable"] += 1
            print(f"unavailable: {error}", file=sys.stderr)
            time.sleep(0.1)

    def close(self) -> None:
        """Ends the session."""
        self._client.close()

    # -- what there is to do

    def _load_then_store(self, corpus: Corpus, namespace: NamespaceHandle, keys: list[bytes]) -> None:
        """What engines do: take what is there, compute the rest, store it."""
        keys = keys[: self._random.randint(1, len(keys))]
        buffers = [bytearray(corpus.chunk_bytes) for _ in keys]
        count = self._client.load(namespace, keys, buffers)
        for key, buffer in zip(keys[:count], buffers, strict=False):
            self._check(corpus, key, buffer)
        items = chained(keys)[count:]
        if items:
            outcomes = self._client.store(namespace, items, [corpus.data(key) for key, _ in items])
            self.counts.update(outcome.name for outcome in outcomes)

    def _read_late(self, corpus: Corpus, namespace: NamespaceHandle, keys: list[bytes]) -> None:
        """Reads when the lease is over: a refusal is fine, and so are the right bytes, but nothing else."""
        with self._client.lookup(namespace, keys) as lease:
            pass
        if not lease.locations:
            return
        time.sleep(self._random.random() * 0.2)
        buffers = [bytearray(corpus.chunk_bytes) for _ in lease.locations]
        for key, buffer, good in zip(keys, buffers, self._read(lease, corpus, buffers), strict=False):
            if good:
                self._check(corpus, key, buffer)
            self.counts["late" if good else "too late"] += 1

    def _look_in_place(self, corpus: Corpus, namespace: NamespaceHandle, keys: list[bytes]) -> None:
        """Compares in the slots themselves, where there is a view of them."""
        path = self._client.path()
        with self._client.lookup(namespace, keys) as lease:
            for key, location in zip(keys, lease.locations, strict=False):
                view = path.view(location, corpus.chunk_bytes)
                if view is not None:
                    equal = view == corpus.data(key)
                    # The lease may have ended meanwhile, on a slow machine: then the bytes count for nothing.
                    if path.intact([location]) == [True] and not equal:
                        raise WrongBytes(f"in place: {corpus.chunk_bytes} bytes of {key.hex()} at {location}")
                    self.counts["in place"] += 1

    def _copy_slowly(self, corpus: Corpus, namespace: NamespaceHandle, keys: list[bytes]) -> None:
        """Copies half a chunk, dawdles with no lease, copies the rest: the table must say if others were there."""
        path = self._client.path()
        with self._client.lookup(namespace, keys) as lease:
            pass
        views = [path.view(location, corpus.chunk_bytes) for location in lease.locations]
        half = corpus.chunk_bytes // 2
        first = [bytes(view[:half]) for view in views if view is not None]
        time.sleep(self._random.random())
        second = [bytes(view[half:]) for view in views if view is not None]
        if second:
            for i, good in enumerate(path.intact(lease.locations)):
                if good:
                    self._check(corpus, keys[i], first[i] + second[i])
                self.counts["slowly" if good else "too slowly"] += 1

    def _change_its_mind(self, corpus: Corpus, namespace: NamespaceHandle, keys: list[bytes]) -> None:
        """Reserves, writes rubbish into a part, and aborts: nobody may ever read that."""
        with self._client.reserve(namespace, chained(keys)) as lease:
            granted = [result.location for result in lease.results if result.location is not None]
            self._write_half(corpus, lease.lease_id, granted[: self._random.randint(0, len(granted))])
            self.counts["aborted"] += len(granted)

    def _hold(self, corpus: Corpus, namespace: NamespaceHandle, keys: list[bytes]) -> None:
        """Keeps a lease while others press for room, then reads under it: every byte must still be there."""
        with self._client.lookup(namespace, keys) as lease:
            if not lease.locations:
                return
            time.sleep(self._random.random())
            renewed = lease.renew()
            buffers = [bytearray(corpus.chunk_bytes) for _ in lease.locations]
            for key, buffer, good in zip(keys, buffers, self._read(lease, corpus, buffers), strict=False):
                if good:
                    self._check(corpus, key, buffer)
                elif renewed:
                    self.counts["lost under lease"] += 1
            self.counts["held"] += 1

    def _stop_half_way(self, corpus: Corpus, namespace: NamespaceHandle, keys: list[bytes]) -> None:
        """Waits to be killed with a chunk half written; goes on if nothing was granted this time."""
        with self._client.reserve(namespace, chained(keys)) as lease:
            granted = [result.location for result in lease.results if result.status is ReserveStatus.GRANTED]
            places = [location for location in granted if location is not None]
            if not places:
                return
            self._write_half(corpus, lease.lease_id, places)
            print("half", flush=True)
            while True:
                signal.pause()

    # -- how

    def _read(self, lease: ReadLease, corpus: Corpus, buffers: list[bytearray]) -> list[bool]:
        span = whole(corpus.chunk_bytes)
        pieces = [Piece(location, span, buffer) for location, buffer in zip(lease.locations, buffers, strict=True)]
        return self._client.path().read(lease.lease_id, pieces, time.monotonic() + TIMEOUT_S)

    def _write_half(self, corpus: Corpus, lease_id: int, places: list[Location]) -> None:
        half = corpus.chunk_bytes // 2
        rubbish = self._random.randbytes(half)
        pieces = [Piece(location, Span(0, half, half, 1), rubbish) for location in places]
        self._client.path().write(lease_id, pieces, time.monotonic() + TIMEOUT_S)

    def _check(self, corpus: Corpus, key: bytes, buffer: bytes | bytearray) -> None:
        self.counts["read"] += 1
        self.counts["read bytes"] += len(buffer)
        if buffer != corpus.data(key):
            raise WrongBytes(f"{corpus.chunk_bytes} bytes of {key.hex()}, beginning with {bytes(buffer[:16]).hex()}")


def main() -> int:
    """The worker's process."""
    endpoint, total_bytes, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    worker = Worker(endpoint, total_bytes, seed)
    signal.signal(signal.SIGUSR1, lambda *_: worker.half.set())
    stop = threading.Event()

    def wait_for_the_end() -> None:
        # Closed by whoever started us, or by the kernel when they are gone.
        while os.read(0, 4096):
            pass
        stop.set()

    threading.Thread(target=wait_for_the_end, daemon=True).start()
    print("ready", flush=True)
    try:
        while not stop.is_set():
            worker.step()
    except WrongBytes as error:
        print(f"WRONG BYTES: {error}", file=sys.stderr, flush=True)
        return 1
    worker.close()
    print(json.dumps(worker.counts), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
