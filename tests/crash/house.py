"""A daemon that dies again and again over the same pool and the same disk, and what it owes to those who stored there.

What a client was told is STORED is a *promise*: it is there after every death of the daemon, as long as there was room
for it, and these houses have room for all that is promised. What has other sizes is *scratch*: it may go at any time.
"""

from __future__ import annotations

import random
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import grpc

from kvd.failpoints import VARIABLE
from kvd.wire.pb import kvd_pb2, kvd_pb2_grpc
from kvd_client import Client, StoreOutcome
from tests.arch.sources import written
from tests.daemon import Daemon
from tests.soak.corpus import Corpus, chained
from tests.wait import wait_until

#: A namespace each, told apart by their chunk sizes. Twice the pool, two thirds of the disk.
KEPT = (Corpus(8 << 10, 1 << 20), Corpus(24_007, 2 << 20), Corpus(64 << 10, 3 << 20))
SCRATCH = (Corpus(12 << 10, 1 << 20), Corpus(40_001, 3 << 19))
#: Of clients that come, store, and go.
VISITED = Corpus(4 << 10, 64 << 10)
#: Never committed by anybody.
SCRIBBLED = Corpus(16_385, 1 << 20)

POOL_BYTES = 4 << 20
SPILL_BYTES = 16 << 20
QUARANTINE_S = 0.2
TIMEOUT_S = 5.0
#: What must come about comes about long before this.
PATIENCE_S = 30.0

THERE = (StoreOutcome.STORED, StoreOutcome.PRESENT)


_CALL = re.compile(r"\breach\((.*?)\)")
#: Every fail point in the source: a new one is tested from the moment it is written down.
NAMES = sorted(
    {
        argument.strip('"')
        for module in written("kvd")
        if module.name != "kvd.failpoints"
        for argument in _CALL.findall(module.text)
    }
)


class Promises:
    """Which chunks clients were told are stored. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._keys: set[tuple[int, bytes]] = set()

    def note(self, corpus: Corpus, keys: list[bytes], outcomes: list[StoreOutcome]) -> None:
        """What a store of ``keys`` was answered."""
        if corpus in KEPT:
            told = [key for key, outcome in zip(keys, outcomes, strict=True) if outcome in THERE]
            with self._lock:
                self._keys.update((corpus.chunk_bytes, key) for key in told)

    def count(self, corpus: Corpus, keys: list[bytes]) -> int:
        """How many of ``keys``, from the first on, are promised."""
        with self._lock:
            missing = (i for i, key in enumerate(keys) if (corpus.chunk_bytes, key) not in self._keys)
            return next(missing, len(keys))

    def forget(self) -> None:
        """Nothing is owed any more."""
        with self._lock:
            self._keys.clear()

    def __len__(self) -> int:
        return len(self._keys)


class House:
    """The daemon, its pool, its disk, and the promises. ``options``: of ``kvd serve``.

    Without a ``disk`` the pool must have room for everything.
    """

    def __init__(self, *, disk: bool = True, pool_bytes: int = POOL_BYTES, **options: object) -> None:
        self._environment = {VARIABLE: ""}
        self.daemon = Daemon(
            start=False,
            warm=True,
            env=self._environment,
            **{
                "pool": f"{pool_bytes}B",
                "quarantine": QUARANTINE_S,
                "drain_timeout": 0.5,
                **({"spill": f"{SPILL_BYTES}B", "spill_floor": "0"} if disk else {}),
                **options,
            },
        )
        self.pool_bytes = pool_bytes
        self.disk = disk
        self.promises = Promises()
        self.deaths = 0

    # -- lives and deaths

    def begin(self, fail_point: str = "", count: int = 1) -> None:
        """Starts the daemon without waiting for it. It dies when it comes by ``fail_point`` the ``count``-th time."""
        self._environment[VARIABLE] = f"{fail_point}:{count}" if fail_point else ""
        self.daemon.start(wait=False)

    def start(self, fail_point: str = "", count: int = 1) -> bool:
        """Starts the daemon; whether it serves, and has not died on the way as it was told to."""
        self.begin(fail_point, count)
        try:
            self.daemon.wait_ready()
        except AssertionError:
            if not fail_point or not self.dead:
                raise
            return False
        return True

    @property
    def dead(self) -> bool:
        """Whether the daemon has died of SIGKILL; fails when it ended in any other way by itself."""
        code = self.daemon.exit_code
        assert code in (None, -signal.SIGKILL), f"the daemon ended with {code}:\n{self.daemon.log[-4000:]}"
        return code is not None

    def kill(self) -> None:
        """SIGKILL."""
        self.daemon.kill()
        self.deaths += 1

    def close(self) -> None:
        """Leaves nothing behind."""
        self.daemon.close()

    def __enter__(self) -> House:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- what people tell it

    @contextmanager
    def admin(self) -> Iterator[Any]:
        """The stub of the daemon's Admin service."""
        with grpc.insecure_channel(self.daemon.unix_endpoint) as channel:
            yield kvd_pb2_grpc.AdminStub(channel)  # type: ignore[no-untyped-call]

    def drop(self, corpus: Corpus | None = None) -> int:
        """Drops what nobody holds of a namespace, or of all; how many chunks were kept. Raises ``grpc.RpcError``."""
        namespace_id = b""
        if corpus is not None:
            known = {one.chunk_bytes: one.namespace_id for one in self.daemon.stats().namespaces}
            if corpus.chunk_bytes not in known:
                return 0
            namespace_id = known[corpus.chunk_bytes]
        with self.admin() as stub:
            answer = stub.Drop(kvd_pb2.DropRequest(namespace_id=namespace_id), timeout=10)
        return int(answer.kept)

    def client(self, way: str = "shm") -> Client:
        """A client that is connected."""
        client = Client(self.endpoint(way), name=way, timeout_s=TIMEOUT_S)
        client.connect(20)
        return client

    def endpoint(self, way: str) -> str:
        """Where clients find it over ``way``: "shm" or "tcp"."""
        return self.daemon.unix_endpoint if way == "shm" else self.daemon.tcp_endpoint

    # -- what it owes

    @property
    def degraded(self) -> str:
        """Why the disk is not used; empty when it is."""
        return " ".join(drive.reason for drive in self.daemon.stats().disk.drives)

    def fill(self, client: Client) -> None:
        """Stores everything that is kept."""
        for corpus in KEPT:
            namespace = client.namespace(corpus.identity, corpus.chunk_bytes)
            for number in range(corpus.prefixes):
                keys = corpus.keys(number)
                data = [data_of(corpus, key) for key in keys]

                def stored(corpus: Corpus = corpus, namespace=namespace, keys=keys, data=data) -> bool:  # type: ignore[no-untyped-def]
                    outcomes = client.store(namespace, chained(keys), data)
                    self.promises.note(corpus, keys, outcomes)
                    return all(outcome in THERE for outcome in outcomes)

                wait_until(stored, PATIENCE_S, "room for what is kept")

    def settle(self, *, held: bool = False) -> None:
        """Waits until nothing is left to do. ``held``: somebody has slots, and may keep them and all that were being
        written when he was given them."""

        def settled() -> bool:
            stats = self.daemon.stats()
            pool, disk = stats.pool, stats.disk
            scanned = all(one.state != "scanning" and one.scanned_extents == one.found_extents for one in disk.drives)
            return (
                bool(disk.drives) is self.disk
                and scanned
                and not (
                    disk.queue_chunks
                    or disk.promoting_chunks
                    or pool.unverified_chunks
                    or (pool.writing_bytes + pool.quarantined_bytes and not held)
                )
            )

        try:
            wait_until(settled, PATIENCE_S, "the daemon to settle")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.daemon.stats()}\n{self.daemon.log[-4000:]}") from error

    def check_books(self) -> None:
        """The books agree with each other, the pool's parts are the pool."""
        findings = self.daemon.audit()
        assert findings == [], "\n".join(findings)
        pool = self.daemon.stats().pool
        parts = (pool.free_bytes, pool.ready_bytes, pool.writing_bytes, pool.quarantined_bytes, pool.idle_slot_bytes)
        assert sum(parts) == pool.bytes == self.pool_bytes, parts

    def check(self, client: Client, *, held: bool = False) -> None:
        """After a start: every promise is kept, every byte is right, the books are clean before and after."""
        self.check_books()
        recovery = self.daemon.stats().pool.recovery
        assert not recovery.skipped, f"a death is no damage, and yet: {recovery}"
        wait_until(lambda: client.connected, PATIENCE_S, "the client to be connected again")
        self.settle(held=held)
        self.check_books()
        assert "Traceback" not in self.daemon.log, self.daemon.log[-6000:]
        degraded = "left alone" in self.daemon.log  # a drive that hangs for seconds keeps nothing, and may do that
        for corpus in (*KEPT, *SCRATCH, VISITED, SCRIBBLED):
            for number in range(corpus.prefixes):
                keys = corpus.keys(number)
                promised = 0 if degraded else self.promises.count(corpus, keys)
                self.read(client, corpus, keys, promised)
        self.check_books()

    def read(self, client: Client, corpus: Corpus, keys: list[bytes], promised: int = 0) -> int:
        """Loads a prefix; every byte is right, and ``promised`` chunks come at least. How many came."""
        namespace = client.namespace(corpus.identity, corpus.chunk_bytes)
        buffers = [bytearray(corpus.chunk_bytes) for _ in keys]
        deadline = time.monotonic() + PATIENCE_S
        while True:
            count = client.load(namespace, keys, buffers)
            for number, (key, buffer) in enumerate(zip(keys[:count], buffers, strict=False)):
                right = data_of(corpus, key)
                assert buffer == right, f"chunk {number} of {len(keys)} is wrong: {describe(corpus, buffer, right)}"
            if count >= promised:
                return count
            assert time.monotonic() < deadline, (
                f"{count} of {promised} promised chunks of {corpus.chunk_bytes} bytes, key {keys[count].hex()[:16]}\n"
                f"{self.daemon.stats()}\n{self.daemon.log[-4000:]}"
            )
            time.sleep(0.02)

    def check_damaged(self, client: Client, *, lossless: bool = False) -> int:
        """After damage: nothing that is served is wrong; how many of the promised chunks were. Nothing is owed then.

        ``lossless``: the damage is none that costs a promised chunk.
        """
        self.check_books()
        wait_until(lambda: client.connected, PATIENCE_S, "the client to be connected again")
        self.settle()
        served = set()
        for corpus in KEPT:
            for number in range(corpus.prefixes):
                keys = corpus.keys(number)
                promised = self.promises.count(corpus, keys)
                count = min(promised, self.read(client, corpus, keys, promised if lossless else 0))
                served.update((corpus, key) for key in keys[:count])
        assert "Traceback" not in self.daemon.log, self.daemon.log[-6000:]
        self.promises.forget()
        self.check_books()
        return len(served)

    def check_empty(self) -> None:
        """Drops everything: then nothing is left in pool or disk."""
        wait_until(lambda: self.drop() == 0, PATIENCE_S, "everything to be dropped")
        self.settle()
        self.promises.forget()
        self.check_books()
        stats = self.daemon.stats()
        assert stats.pool.free_bytes == stats.pool.bytes, stats.pool
        assert (stats.disk.records, stats.disk.live_bytes) == (0, 0), stats.disk


@cache
def data_of(corpus: Corpus, key: bytes) -> bytes:
    """The bytes of a chunk."""
    return corpus.data(key)


def empty(house: House, *, pool: bool) -> None:
    """Removes all files of the pool, or of the disk, of a daemon that is down."""
    directory = house.daemon.pool_directory if pool else house.daemon.spill_directory
    assert directory is not None
    shutil.rmtree(directory)
    directory.mkdir(0o700)


def describe(corpus: Corpus, found: bytes | bytearray, right: bytes) -> str:
    """Where bytes differ, and whose they are, for whoever looks for the cause."""
    first = next(i for i, (a, b) in enumerate(zip(found, right, strict=True)) if a != b)
    differing = sum(a != b for a, b in zip(found, right, strict=True))
    begin = bytes(found[first : first + 16]).hex()
    return f"{differing} of {corpus.chunk_bytes} bytes differ, from {first} on: {begin}"


def seeded(*what: object) -> random.Random:
    """Dice that fall the same way in every run."""
    return random.Random(" ".join(map(str, what)))
