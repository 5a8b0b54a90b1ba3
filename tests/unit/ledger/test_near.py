"""Slots near the memory node of the session that asks; each test ends in an audit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvd.ledger.eviction import LeafLru
from kvd.ledger.spilling import Habits
from kvd.memory.slabs import Part, SlabAllocator
from kvd.peers import Credentials
from kvd.session import Session, Sessions
from kvd.spill.extents import Extents
from kvd.store import ChunkStore, Disks, Limits
from kvd.types import ROOT, Namespace, Outcome, Read, Result
from kvd.wire.identity import Identity
from tests.unit.ledger.harness import GRANULE, Clock, Table, key, keys

ME = Credentials(pid=1, uid=0, gids=frozenset({0}))
HALF = 16 * GRANULE


class Unlimited:
    """A budget."""

    def take(self, size_bytes: int) -> bool:
        return True

    def give(self, size_bytes: int) -> None:
        pass

    def count(self, size_bytes: int) -> None:
        pass


class House:
    """A store on two memory nodes of sixteen granules each, with a disk, and the sessions with it."""

    def __init__(self) -> None:
        self.slabs = SlabAllocator(2 * HALF, [Part(0, 0, HALF), Part(1, HALF, 2 * HALF)])
        extents = Extents(1, first_sequence=1)
        extents.attach(0, 64 * GRANULE, 16, set())
        self.store = ChunkStore(
            self.slabs,
            Table(),
            Limits(max_writing_share=1.0),
            Clock(),
            disks=Disks(extents, LeafLru(), Unlimited(), Habits(reused_only=False)),
        )
        self.sessions = Sessions(self.store)
        self.lease = 0

    def session(self, numa_node: int | None, *, shared: bool = True) -> tuple[Session, Namespace]:
        """A client over shared memory, or over TCP, that says that it is near a node."""
        lifeline = None
        if shared:
            lifeline = self.sessions.claim(self.sessions.lifeline_opened(ME, close=lambda: None).ticket)
        found = self.sessions.open(client="c", tenant="t", peer="p", lifeline=lifeline, numa_node=numa_node)
        return found, self.store.open_namespace(found.id, Identity(model="m", weights_revision="r"), GRANULE)

    def write(self, who: tuple[Session, Namespace], *numbers: int) -> list[int]:
        """Stores single chunks; the nodes where those lie that found room."""
        self.lease += 1
        session, namespace = who[0].id, who[1].id
        results = self.store.reserve(session, namespace, self.lease, [(one, ROOT) for one in keys(*numbers)])
        self.store.commit(session, namespace, self.lease, [(one, ()) for one in keys(*numbers)])
        return [result.location.offset // HALF for result in results if result.location is not None]

    def work(self) -> list[Read]:
        """Carries out what the disk is asked to do; what was read."""
        reads: list[Read] = []
        while orders := self.store.tiers.orders.take():
            for order in orders:
                reads += [order] if isinstance(order, Read) else []
                self.store.tiers.orders.finish(Result(order.ticket, Outcome.OK))
        return reads


@pytest.fixture
def house() -> Iterator[House]:
    made = House()
    yield made
    assert made.store.audit() == []


@pytest.mark.parametrize("node", [0, 1])
def test_a_session_stores_on_its_node_until_that_is_full(house: House, node: int) -> None:
    who = house.session(node)
    assert house.write(who, *range(16)) == [node] * 16
    assert house.write(who, *range(16, 32)) == [1 - node] * 16


def test_sessions_on_two_nodes_do_not_take_each_others_room(house: House) -> None:
    first, second = house.session(0), house.session(1)
    for number in range(16):
        assert house.write(first, number) == [0]
        assert house.write(second, 100 + number) == [1]
    assert [node.used_bytes for node in house.slabs.nodes()] == [HALF, HALF]


def test_a_full_pool_makes_room_wherever_that_is(house: House) -> None:
    first, second = house.session(0), house.session(1)
    house.write(first, *range(16))
    house.write(second, *range(100, 116))
    house.work()
    assert house.write(second, *range(200, 204)) == [0] * 4  # the coldest were there
    assert house.store.counters.evicted_chunks == 4


def test_what_a_client_on_another_machine_says_of_nodes_means_nothing(house: House) -> None:
    near, remote = house.session(1), house.session(1, shared=False)
    assert (near[0].numa_node, remote[0].numa_node) == (1, None)
    assert set(house.write(remote, *range(8))) == {0, 1}


@pytest.mark.parametrize("node", [None, 5, 1 << 31])
def test_who_is_near_no_node_of_the_pool_gets_slots_on_all(house: House, node: int | None) -> None:
    assert sorted(house.write(house.session(node), *range(32))) == [0] * 16 + [1] * 16


@pytest.mark.parametrize("node", [0, 1])
def test_a_record_comes_back_to_the_node_of_whoever_asks(house: House, node: int) -> None:
    writer, (reader, namespace) = house.session(1 - node), house.session(node)
    assert house.write(writer, 1) == [1 - node]
    house.work()
    books = house.store._books
    books.counters.evicted_chunks += books.evict(next(iter(books.by_offset.values())))
    assert house.store.lookup(reader.id, namespace.id, 900, [key(1)]).promoting == 1
    assert [read.offset // HALF for read in house.work()] == [node]
    assert len(house.store.lookup(reader.id, namespace.id, 901, [key(1)]).locations) == 1
