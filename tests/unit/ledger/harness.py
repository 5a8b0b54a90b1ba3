"""A store with a clock that stands still and a generation table that can be read, for the tests of the books."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from kvd.ledger.chunk import Chunk
from kvd.ledger.eviction import EvictionPolicy
from kvd.memory.slabs import SlabAllocator
from kvd.store import ChunkStore, Limits
from kvd.types import ROOT, CommitStatus, Location, Namespace, ReserveResult, ReserveStatus, SessionId
from kvd.wire.frames import Item
from kvd.wire.identity import Identity
from kvd.wire.spans import whole

KIB = 1024
GRANULE = 4 * KIB


def key(number: int) -> bytes:
    """The key with this number."""
    return number.to_bytes(32, "big")


def keys(*numbers: int) -> list[bytes]:
    """The keys with these numbers."""
    return [key(number) for number in numbers]


def chain(*numbers: int, parent: bytes = ROOT) -> list[tuple[bytes, bytes]]:
    """Items of Reserve: each key the child of the one before."""
    named = keys(*numbers)
    return list(zip(named, [parent, *named], strict=False))


class Clock:
    """Stands still until it is told to go on."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Table:
    """Generation words by offset; insists that a word is 0 before a slot is used again."""

    def __init__(self) -> None:
        self.words: dict[int, int] = {}
        self.log: list[tuple[str, Location]] = []

    def publish(self, location: Location) -> None:
        assert location.offset not in self.words, "a slot was granted while its old generation was published"
        assert location.generation > 0
        self.words[location.offset] = location.generation
        self.log.append(("publish", location))

    def retract(self, location: Location) -> None:
        assert self.words.pop(location.offset, None) == location.generation, "the wrong generation was retracted"
        self.log.append(("retract", location))

    def word(self, segment: int, offset: int) -> int:
        assert segment == 0
        return self.words.get(offset, 0)


class Shown:
    """A presence table that insists on one addition and one removal of every key."""

    def __init__(self) -> None:
        self.keys: set[tuple[bytes, bytes]] = set()

    def __len__(self) -> int:
        return len(self.keys)

    def add(self, namespace_id: bytes, key: bytes) -> None:
        assert (namespace_id, key) not in self.keys, "a key was added that is there"
        self.keys.add((namespace_id, key))

    def remove(self, namespace_id: bytes, key: bytes) -> None:
        self.keys.remove((namespace_id, key))

    def may_hold(self, namespace_id: bytes, key: bytes) -> bool:
        return (namespace_id, key) in self.keys


class Pool:
    """A store over ``granules`` of 4 KiB, with shorthand for what tests do all the time."""

    def __init__(
        self, granules: int = 16, *, policy: EvictionPolicy[Chunk] | None = None, ttl_s: float = 0.0, **limits: float
    ) -> None:
        self.clock = Clock()
        self.table = Table()
        self.shown = Shown()
        self.limits = Limits(**{"max_writing_share": 1.0, **limits})  # type: ignore[arg-type]
        self.slabs = SlabAllocator(granules * GRANULE)
        self.store = ChunkStore(
            self.slabs, self.table, self.limits, self.clock, policy, ttl_s=ttl_s, presence=self.shown
        )
        self.leases = itertools.count(1)
        self._sessions = itertools.count(1)

    def session(self, tenant: str = "default") -> SessionId:
        """A new session."""
        number = next(self._sessions)
        self.store.open_session(number, tenant)
        return number

    def namespace(
        self, session: SessionId, model: str = "m", granules: int = 1, layers: int = 1, heads: int = 1
    ) -> Namespace:
        """A namespace whose chunks take ``granules`` of 4 KiB."""
        identity = Identity(model=model, weights_revision="r", num_layers=layers, num_kv_heads=heads)
        return self.store.open_namespace(session, identity, granules * GRANULE)

    def reserve(self, session: SessionId, namespace: Namespace, *items: tuple[bytes, bytes]) -> Reserved:
        """One Reserve under a new lease."""
        lease = next(self.leases)
        return Reserved(lease, self.store.reserve(session, namespace.id, lease, items))

    def write(self, session: SessionId, namespace: Namespace, *items: tuple[bytes, bytes]) -> Reserved:
        """Reserve, all of it granted, and Commit, all of it stored."""
        reserved = self.reserve(session, namespace, *items)
        assert reserved.all(ReserveStatus.GRANTED), reserved.results
        statuses = self.commit(session, namespace, reserved.lease, *[name for name, _ in items])
        assert set(statuses) == {CommitStatus.STORED}, statuses
        return reserved

    def commit(self, session: SessionId, namespace: Namespace, lease: int, *names: bytes) -> list[CommitStatus]:
        """Commit of whole chunks."""
        return self.store.commit(session, namespace.id, lease, [(name, ()) for name in names])

    def lease(self, session: SessionId, namespace: Namespace, *names: bytes, skip: int = 0) -> tuple[int, int]:
        """One Lookup under a new lease: the lease and how many chunks it holds."""
        lease = next(self.leases)
        return lease, len(self.store.lookup(session, namespace.id, lease, names, skip).locations)

    def stored(self, session: SessionId, namespace: Namespace, *names: bytes) -> int:
        """How many chunks a lookup finds; nothing stays leased."""
        lease, found = self.lease(session, namespace, *names)
        self.store.release(session, [lease])
        return found

    def fill(self, session: SessionId, namespace: Namespace, first: int = 1000) -> None:
        """Ask for more single chunks than 16 slots hold: all that can be evicted goes."""
        for number in range(first, first + 20):
            reserved = self.reserve(session, namespace, (key(number), ROOT))
            if reserved.all(ReserveStatus.GRANTED):
                self.commit(session, namespace, reserved.lease, key(number))

    def item(self, namespace: Namespace, location: Location) -> Item:
        """A data-plane item that names the whole chunk."""
        return Item(*location, whole(namespace.chunk_bytes))

    def pass_time(self, seconds: float) -> None:
        """Let the clock go on and the store notice."""
        self.clock.now += seconds
        self.store.tick()

    def audited(self) -> None:
        """Every test ends here."""
        assert self.store.audit() == []
        pool = self.store.stats().pool
        parts = (
            pool.free_bytes,
            pool.ready_bytes,
            pool.writing_bytes,
            pool.quarantined_bytes,
            pool.idle_slot_bytes,
        )
        assert sum(parts) == pool.bytes
        assert min(parts) >= 0


class Reserved:
    """The answers to one Reserve."""

    def __init__(self, lease: int, results: Sequence[ReserveResult]) -> None:
        self.lease = lease
        self.results = results

    @property
    def statuses(self) -> list[ReserveStatus]:
        return [result.status for result in self.results]

    @property
    def locations(self) -> list[Location]:
        return [result.location for result in self.results if result.location is not None]

    def all(self, status: ReserveStatus) -> bool:
        return set(self.statuses) == {status}
