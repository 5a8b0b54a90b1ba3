"""What is measured of the disk tier and of restarts: writing behind, promoting, scanning, and coming back."""

from __future__ import annotations

import os
import struct
import tempfile
import time
from collections.abc import Callable
from contextlib import closing

from kvd.wire.chunks import ROOT
from kvd.wire.errors import KvdError
from kvd.wire.identity import Identity
from kvd.wire.pb import kvd_pb2 as pb
from kvd_client.bench.daemon import BenchDaemon
from kvd_client.bench.disks import PAGE_BYTES, BareDisk
from kvd_client.bench.figures import GIB, Figure, beside, figure, interleave, single, timed
from kvd_client.bench.parts import CALL_TIMEOUT_S, CONNECT_TIMEOUT_S, chain
from kvd_client.client import Client, StoreOutcome

MIB = 1 << 20
CHUNK_BYTES = 2 * MIB
#: A record is its chunk and a page before it.
RECORD_BYTES = CHUNK_BYTES + PAGE_BYTES
#: Stored in one call: a session may have half of the pool half-written, and no more.
STORE_BYTES = 16 * MIB
#: Chunks of one round: so many that the start and the end of the pipeline do not decide.
SET_CHUNKS = 384
#: As many reads, and writes, the daemon has under way on one drive.
READERS, WRITERS = 8, 4
#: Rounds that are not counted.
WARMUP = 1
#: Single chunks that are promoted, and single blocks that are read, in turn, in one round.
SINGLES = 20
#: Small records, for the rate at which a start finds them, and starts that are counted at most.
SMALL_CHUNK_BYTES = 4096
SMALL_CHUNKS = 1 << 16
STARTS = 5
RESTART_POOL_BYTES = 1 * GIB

#: How often that is looked at which comes by itself, seconds.
LOOK_S = 0.002
#: Nothing that is waited for takes so long, seconds.
PATIENCE_S = 120.0

Part = Callable[[], float]


def bench_spill(rounds: int, directory: str) -> list[Figure]:
    """The disk tier in ``directory``, against the same disk without kvd in the same run.

    Written are new chunks, from their store to the last one's being on the disk; read are chunks that are nowhere but
    there, from the lookup that finds them to the one that leases the last.
    """
    with tempfile.TemporaryDirectory(prefix="kvd-bench-", dir=os.path.abspath(directory)) as home:
        return _bandwidths(rounds, home) + _scans(min(rounds, STARTS), home)


def bench_restart(rounds: int) -> list[Figure]:
    """A start after a SIGKILL with a pool that is nearly full, against one with an empty pool; and when a client that
    stays up has its first hit, and hits for all that was there."""
    first_s: list[float] = []
    all_s: list[float] = []
    with (
        BenchDaemon(RESTART_POOL_BYTES, warm=True, populate="lazy") as daemon,
        Client(daemon.unix_endpoint, timeout_s=CALL_TIMEOUT_S) as client,
    ):
        client.connect(CONNECT_TIMEOUT_S)
        tier = Tier(client, RESTART_POOL_BYTES // CHUNK_BYTES * 15 // 16)
        tier.store()
        (keys,) = tier.stored

        def warm() -> float:
            began = time.perf_counter()
            daemon.restart(crash=True)
            tier.wait_held(keys, 1)
            first_s.append(time.perf_counter() - began)
            tier.wait_held(keys, len(keys))
            all_s.append(time.perf_counter() - began)
            return daemon.start_s

        def cold() -> float:
            with BenchDaemon(RESTART_POOL_BYTES, populate="lazy") as other:
                return other.start_s

        samples = interleave({"start after SIGKILL": warm, "cold start": cold}, min(rounds, STARTS), WARMUP)
        tier.check(keys)
    samples |= {"first hit after SIGKILL": first_s[WARMUP:], "all hits after SIGKILL": all_s[WARMUP:]}
    return [figure(name, "s", samples, "cold start") for name in samples if name != "cold start"]


# ---------------------------------------------------------------- the parts


class Tier:
    """Sets of ``chunks`` chunks that are stored and read through a client, each set a prefix of its own."""

    def __init__(self, client: Client, chunks: int, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._client = client
        self._namespace = client.namespace(Identity("bench", f"tiers {chunk_bytes}"), chunk_bytes)
        self._chunk_bytes = chunk_bytes
        self._data = [bytearray(os.urandom(chunk_bytes)) for _ in range(chunks)]
        #: Keys of what was stored, set by set, and the records that these are.
        self.stored: list[list[bytes]] = []
        self.records = 0

    def store(self) -> None:
        """A new set."""
        keys = chain(len(self._data))
        self._store(list(zip(keys, [ROOT, *keys], strict=False)))
        self.stored.append(keys)

    def write(self) -> float:
        """GiB/s of a new set on its way to the disk."""

        def work() -> None:
            self.store()
            self.wait_records()

        return len(self._data) * self._chunk_bytes / timed(work) / GIB

    def write_singles(self, count: int) -> list[bytes]:
        """So many chunks, each a prefix by itself; their keys."""
        keys = chain(count)
        for first in range(0, count, len(self._data)):
            self._store([(key, ROOT) for key in keys[first : first + len(self._data)]])
            self.wait_records()
        return keys

    def read(self, keys: list[bytes]) -> float:
        """GiB/s at which a set comes from the disk."""
        return len(keys) * self._chunk_bytes / timed(lambda: self.wait_held(keys, len(keys))) / GIB

    def promote(self, key: bytes) -> float:
        """Microseconds until a client that waits for a chunk from the disk can read it."""

        def work() -> None:
            with self._client.lookup(self._namespace, [key], wait_s=PATIENCE_S) as lease:
                if not len(lease):
                    raise RuntimeError("a chunk that lay on the disk was not found")

        return timed(work) * 1e6

    def wait_held(self, keys: list[bytes], count: int) -> None:
        """Asks for ``keys`` until the first ``count`` of them can be had; it may be that nobody answers at first."""
        began = time.perf_counter()
        while self._held(keys) < count:
            _pause(began)

    def wait_records(self) -> None:
        """Waits until all that was stored has a record, and nothing more is to be written."""
        began = time.perf_counter()
        while (disk := self._disk()).records < self.records or disk.queue_chunks:
            _pause(began)

    def check(self, keys: list[bytes]) -> None:
        """Every byte of a set, beside the measurement."""
        into = [bytearray(self._chunk_bytes) for _ in keys]
        if self._client.load(self._namespace, keys, into, timeout_s=PATIENCE_S) != len(keys):
            raise RuntimeError("not everything was loaded")
        for number, (key, chunk) in enumerate(zip(keys, into, strict=True)):
            self._stamp(number, key)
            if chunk != self._data[number]:
                raise RuntimeError("what was loaded is not what was stored")

    def _store(self, items: list[tuple[bytes, bytes]]) -> None:
        for number, (key, _) in enumerate(items):
            self._stamp(number, key)
        size = max(1, STORE_BYTES // self._chunk_bytes)
        for first in range(0, len(items), size):
            part = slice(first, min(first + size, len(items)))
            outcomes = self._client.store(self._namespace, items[part], self._data[part], timeout_s=CALL_TIMEOUT_S)
            if set(outcomes) != {StoreOutcome.STORED}:
                raise RuntimeError(f"not everything was stored: {set(outcomes)}")
        self.records += len(items)

    def _stamp(self, number: int, key: bytes) -> None:
        """No two chunks are equal: one in the place of another would be seen."""
        struct.pack_into(f"{len(key)}s", self._data[number], 0, key)

    def _held(self, keys: list[bytes]) -> int:
        try:
            with self._client.lookup(self._namespace, keys, again=True, timeout_s=CALL_TIMEOUT_S) as lease:
                return len(lease)
        except KvdError:
            return 0

    def _disk(self) -> pb.DiskStats:
        return self._client.stats(CALL_TIMEOUT_S).disk


def _bandwidths(rounds: int, home: str) -> list[Figure]:
    total, set_bytes = rounds + WARMUP, SET_CHUNKS * RECORD_BYTES
    with (
        closing(BareDisk(home, RECORD_BYTES, WRITERS, set_bytes)) as to_write,
        closing(BareDisk(home, RECORD_BYTES, READERS, set_bytes)) as to_read,
        BenchDaemon(
            3 * SET_CHUNKS * CHUNK_BYTES,
            spill_dir=home,
            spill_bytes=2 * (total + 1) * (set_bytes + SINGLES * RECORD_BYTES),  # nothing has to be reclaimed
        ) as daemon,
        Client(daemon.unix_endpoint, timeout_s=CALL_TIMEOUT_S) as client,
    ):
        client.connect(CONNECT_TIMEOUT_S)
        tier = Tier(client, SET_CHUNKS)
        bare_write, bare_read = f"{to_write.tool}, write", f"{to_read.tool}, read"
        writes: dict[str, Part] = {"spill": tier.write, bare_write: to_write.write}
        samples = interleave(writes, rounds, WARMUP)
        tier.write()  # for the check
        singles, sets = tier.write_singles(total * SINGLES), list(tier.stored)
        with closing(BareDisk(home, RECORD_BYTES, 1, total * SINGLES * RECORD_BYTES)) as blocks:
            daemon.restart(crash=False)  # its pool is anonymous memory: what it knows now is on the disk
            client.connect(CONNECT_TIMEOUT_S)
            tier.wait_records()
            one_by_one = _Singles(daemon, tier, singles, blocks)
            reads: dict[str, Part] = {
                "promote": lambda: tier.read(sets.pop()),
                bare_read: to_read.read,
                "one by one": one_by_one.round,
            }
            samples |= interleave(reads, rounds, WARMUP)
        tier.check(sets.pop())
    return [
        figure("spill", "GiB/s", samples, bare_write),
        figure("promote", "GiB/s", samples, bare_read),
        *one_by_one.figures(),
    ]


class _Singles:
    """Single chunks promoted, each followed by a read of one block of the same size without kvd. Blocks and records are
    read once each. What the daemon takes for a chunk is the time from its order to the verified chunk."""

    def __init__(self, daemon: BenchDaemon, tier: Tier, keys: list[bytes], blocks: BareDisk) -> None:
        self._daemon, self._tier, self._keys, self._blocks = daemon, tier, keys, blocks
        self._rounds: list[tuple[float, float, float]] = []  # mean microseconds: daemon, client, bare

    def round(self) -> float:
        """Microseconds of the daemon for one chunk, the mean of ``SINGLES``."""
        (seconds, count), client_us, bare_us = self._daemon.promotions(), 0.0, 0.0
        for _ in range(SINGLES):
            client_us += self._tier.promote(self._keys.pop())
            bare_us += self._blocks.read_block()
        seconds, count = (now - then for now, then in zip(self._daemon.promotions(), (seconds, count), strict=True))
        self._rounds.append((seconds / count * 1e6, client_us / SINGLES, bare_us / SINGLES))
        return self._rounds[-1][0]

    def figures(self) -> list[Figure]:
        """Of the rounds that count."""
        daemon_us, client_us, bare_us = (list(column) for column in zip(*self._rounds[WARMUP:], strict=True))
        return [
            beside(single(name, "us", samples), "one pread", bare_us)
            for name, samples in (("promote of one chunk", daemon_us), ("promote of one chunk, client", client_us))
        ]


def _scans(rounds: int, home: str) -> list[Figure]:
    """Starts over a directory full of small records, from SERVING to the last record's being found."""
    name, records_bytes = "records found by a start", SMALL_CHUNKS * (SMALL_CHUNK_BYTES + PAGE_BYTES)
    with (
        tempfile.TemporaryDirectory(prefix="small-", dir=home) as directory,
        BenchDaemon(64 * MIB, spill_dir=directory, spill_bytes=2 * records_bytes) as daemon,
        Client(daemon.unix_endpoint, timeout_s=CALL_TIMEOUT_S) as client,
    ):
        client.connect(CONNECT_TIMEOUT_S)
        tier = Tier(client, 1 << 10, SMALL_CHUNK_BYTES)
        while tier.records < SMALL_CHUNKS:
            tier.write()

        def start() -> float:
            daemon.restart(crash=True)
            client.connect(CONNECT_TIMEOUT_S)
            return tier.records / timed(tier.wait_records)

        return [figure(name, "1/s", interleave({name: start}, rounds, WARMUP))]


def _pause(began: float) -> None:
    if time.perf_counter() - began > PATIENCE_S:
        raise RuntimeError(f"something that should have come has not come for {PATIENCE_S:.0f} s")
    time.sleep(LOOK_S)
