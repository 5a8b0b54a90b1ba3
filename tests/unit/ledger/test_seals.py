"""A checksum that the data plane has computed is the chunk's from then on, and is nothing else's."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from kvd.ledger.eviction import LeafLru
from kvd.ledger.spilling import Habits
from kvd.memory.slabs import SlabAllocator
from kvd.spill.extents import Extents
from kvd.store import ChunkStore, Disks, Limits
from kvd.types import ROOT, CommitStatus, Location, Namespace, Outcome, Result, Seal, Write
from kvd.wire.frames import Item, ItemStatus, Op
from kvd.wire.identity import Identity
from kvd.wire.spans import Span, whole
from tests.unit.ledger.harness import GRANULE, Clock, Pool, Reserved, Table, chain, key
from tests.unit.ledger.tier_life import Budget, Journal

SUM, OTHER = 0x1234, 0x5678


def begin(pool: Pool, session: int, op: Op, lease: int, at: Location, span: Span | None = None) -> object:
    ticket, statuses = pool.store.begin_io(session, op, lease, [Item(*at, span or whole(GRANULE))])
    assert statuses == [ItemStatus.OK]
    return ticket


def move(
    pool: Pool, session: int, op: Op, lease: int, at: Location, sums: Mapping[int, int], span: Span | None = None
) -> None:
    pool.store.end_io(begin(pool, session, op, lease, at, span), (), sums)  # type: ignore[arg-type]


def reserved(pool: Pool, session: int, namespace: Namespace) -> Reserved:
    return pool.reserve(session, namespace, *chain(1))


def committed(pool: Pool, session: int, namespace: Namespace, slot: Reserved) -> None:
    assert pool.commit(session, namespace, slot.lease, key(1)) == [CommitStatus.STORED]


def known(pool: Pool, session: int, namespace: Namespace, at: Location) -> int | None:
    """The checksum that a READ of the chunk is given."""
    lease, found = pool.lease(session, namespace, key(1))
    assert found == 1
    ticket, _ = pool.store.begin_io(session, Op.READ, lease, [Item(*at, whole(GRANULE))])
    pool.store.end_io(ticket)
    pool.store.release(session, [lease])
    return ticket.checksums[0]


def test_a_chunk_that_was_written_whole_has_the_checksum_of_what_arrived(
    pool: Pool, session: int, namespace: Namespace
) -> None:
    slot = reserved(pool, session, namespace)
    move(pool, session, Op.WRITE, slot.lease, slot.locations[0], {0: SUM})
    committed(pool, session, namespace, slot)
    assert known(pool, session, namespace, slot.locations[0]) == SUM


@pytest.mark.parametrize("span", [Span(0, GRANULE // 2, GRANULE // 2, 1), Span(1, GRANULE - 1, GRANULE - 1, 1)])
def test_the_checksum_of_a_part_is_nobodys(pool: Pool, session: int, namespace: Namespace, span: Span) -> None:
    slot = reserved(pool, session, namespace)
    move(pool, session, Op.WRITE, slot.lease, slot.locations[0], {0: SUM}, span)
    committed(pool, session, namespace, slot)
    lease, _ = pool.lease(session, namespace, key(1))
    move(pool, session, Op.READ, lease, slot.locations[0], {0: SUM}, span)
    assert known(pool, session, namespace, slot.locations[0]) is None


@pytest.mark.parametrize("second", [whole(GRANULE), Span(8, 8, 8, 1)])
def test_what_is_written_over_leaves_no_checksum_behind(
    pool: Pool, session: int, namespace: Namespace, second: Span
) -> None:
    slot = reserved(pool, session, namespace)
    move(pool, session, Op.WRITE, slot.lease, slot.locations[0], {0: SUM})
    move(pool, session, Op.WRITE, slot.lease, slot.locations[0], {0: OTHER}, second)
    committed(pool, session, namespace, slot)
    assert known(pool, session, namespace, slot.locations[0]) is None


@pytest.mark.parametrize("first_ends_first", [True, False])
def test_writes_at_the_same_time_leave_no_checksum(
    pool: Pool, session: int, namespace: Namespace, first_ends_first: bool
) -> None:
    slot = reserved(pool, session, namespace)
    tickets = [begin(pool, session, Op.WRITE, slot.lease, slot.locations[0]) for _ in range(2)]
    for ticket in tickets if first_ends_first else reversed(tickets):
        pool.store.end_io(ticket, (), {0: SUM})  # type: ignore[arg-type]
    committed(pool, session, namespace, slot)
    assert known(pool, session, namespace, slot.locations[0]) is None


def test_who_reads_a_whole_chunk_first_computes_its_checksum_for_all(
    pool: Pool, session: int, namespace: Namespace
) -> None:
    slot = pool.write(session, namespace, (key(1), ROOT))  # through shared memory: nobody has seen the bytes
    assert known(pool, session, namespace, slot.locations[0]) is None
    lease, _ = pool.lease(session, namespace, key(1))
    move(pool, session, Op.READ, lease, slot.locations[0], {0: SUM})
    assert known(pool, session, namespace, slot.locations[0]) == SUM
    move(pool, session, Op.READ, lease, slot.locations[0], {0: OTHER})
    assert known(pool, session, namespace, slot.locations[0]) == SUM, "what it was is what the bytes are held against"


class House:
    """A store with a journal, and with a disk that makes records fewer bytes when ``encode``."""

    def __init__(self, *, disk: bool = False) -> None:
        self.journal = Journal()
        extents = Extents(1, first_sequence=1)
        extents.attach(0, 16 * GRANULE, 4, set())
        disks = Disks(extents, LeafLru(), Always(), Habits(encode=True)) if disk else None
        self.store = ChunkStore(
            SlabAllocator(16 * GRANULE), Table(), Limits(), Clock(), journal=self.journal, disks=disks
        )
        self.store.open_session(1, "t")
        self.namespace = self.store.open_namespace(1, Identity("m", "r"), GRANULE)

    def stored(self) -> Location:
        """A chunk that came over the data plane."""
        location = self.store.reserve(1, self.namespace.id, 1, [(key(1), ROOT)])[0].location
        assert location is not None
        ticket, _ = self.store.begin_io(1, Op.WRITE, 1, [Item(*location, whole(GRANULE))])
        self.store.end_io(ticket, (), {0: SUM})
        assert self.store.commit(1, self.namespace.id, 1, [(key(1), ())]) == [CommitStatus.STORED]
        return location


class Always(Budget):
    """Never used up."""

    def __init__(self) -> None:
        pass

    def take(self, size_bytes: int) -> bool:
        return True


def test_nobody_reads_the_bytes_again_for_a_checksum_that_is_known() -> None:
    house = House()
    at = house.stored()
    assert house.store.tiers.orders.take() == []
    assert house.journal.entries[at.offset].checksum == SUM
    assert house.store.audit() == []


def test_what_a_reader_has_computed_outlives_the_daemon() -> None:
    house = House()
    (granted,) = house.store.reserve(1, house.namespace.id, 1, [(key(1), ROOT)])
    assert granted.location is not None
    house.store.commit(1, house.namespace.id, 1, [(key(1), ())])
    house.store.lookup(1, house.namespace.id, 2, [key(1)])
    ticket, _ = house.store.begin_io(1, Op.READ, 2, [Item(*granted.location, whole(GRANULE))])
    house.store.end_io(ticket, (), {0: SUM})
    assert house.journal.entries[granted.location.offset].checksum == SUM


def test_a_chunk_with_a_known_checksum_is_encoded_before_it_is_written_and_keeps_it() -> None:
    house = House(disk=True)
    house.stored()
    (seal,) = house.store.tiers.orders.take()
    assert isinstance(seal, Seal)
    assert seal.encode
    encoded = memoryview(bytes(GRANULE))
    house.store.tiers.orders.finish(Result(seal.ticket, Outcome.OK, OTHER, encoded))
    (write,) = house.store.tiers.orders.take()
    assert isinstance(write, Write)
    assert (write.checksum, write.encoded) == (SUM, encoded)


def test_what_found_no_room_when_it_was_encoded_is_not_encoded_again_and_again() -> None:
    house = House(disk=True)
    house.stored()
    (seal,) = house.store.tiers.orders.take()
    reclaiming = house.store.tiers.spilling._reclaiming
    assert reclaiming is not None
    allocate = reclaiming.allocate
    reclaiming.allocate = lambda payload_bytes: None  # type: ignore[method-assign]
    house.store.tiers.orders.finish(Result(seal.ticket, Outcome.OK, SUM, memoryview(bytes(GRANULE))))
    assert house.store.tiers.orders.take() == [], "there is no room"
    reclaiming.allocate = allocate  # type: ignore[method-assign]
    house.store.tiers.spilling.pump()
    (write,) = house.store.tiers.orders.take()
    assert isinstance(write, Write)
    assert write.encoded is None
