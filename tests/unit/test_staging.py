"""The staging ring's books, and the registration of shared memory in pieces."""

from __future__ import annotations

import threading

from hypothesis import given
from hypothesis import strategies as st

from kvd_client.memory import address_of
from kvd_client.pinning import Pinning
from kvd_client.staging import Ring
from tests.wait import wait_until


@given(st.integers(1, 8), st.lists(st.tuples(st.booleans(), st.integers(0, 9))))
def test_no_slot_is_handed_out_twice_and_all_come_back(slots: int, steps: list[tuple[bool, int]]) -> None:
    ring = Ring(slots)
    held: list[tuple[int, set[int]]] = []
    for take, number in steps:
        if take:
            free = ring.free
            first = ring.take(number)
            assert (first is not None) == (0 < number <= free)
            if first is not None:
                run = {(first + i) % slots for i in range(number)}
                assert len(run) == number and not any(run & other for _, other in held)
                held.append((first, run))
        elif held:
            ring.give(held.pop(number % len(held))[0])
        assert ring.free <= slots - sum(len(run) for _, run in held)
    for first, _ in held:
        ring.give(first)
    assert ring.free == slots
    assert ring.take(slots) is not None and ring.take(1) is None


class FakeRegistrar:
    """Remembers registrations; refuses from ``limit`` on; ``gate`` holds it."""

    def __init__(self, limit: int = 100) -> None:
        self.pieces: dict[int, int] = {}
        self.limit = limit
        self.calls = 0
        self.gate = threading.Event()
        self.gate.set()

    def register(self, address: int, size_bytes: int) -> None:
        self.calls += 1
        assert self.gate.wait(10)
        if len(self.pieces) >= self.limit:
            raise RuntimeError("out of memory to pin")
        self.pieces[address] = size_bytes

    def unregister(self, address: int) -> None:
        del self.pieces[address]


def area(size_bytes: int) -> tuple[memoryview, int]:
    """Memory to register, and its address."""
    memory = memoryview(bytearray(size_bytes))
    return memory, address_of(memory)


def test_memory_is_registered_in_pieces_behind_the_callers_back() -> None:
    registrar = FakeRegistrar()
    registrar.gate.clear()
    pinning = Pinning(registrar, piece_bytes=100)
    memory, at = area(250)
    pinning.add(memory)
    pinning.add(memory)
    assert registrar.pieces == {}
    registrar.gate.set()
    wait_until(lambda: registrar.pieces == {at: 100, at + 100: 100, at + 200: 50}, what="all pieces")
    pinning.clear()
    assert registrar.pieces == {}


def test_memory_that_comes_again_before_it_has_gone_stays_registered() -> None:
    registrar = FakeRegistrar()
    pinning = Pinning(registrar, piece_bytes=100)
    memory, at = area(250)
    pinning.add(memory)
    wait_until(lambda: len(registrar.pieces) == 3, what="all pieces")
    pinning.add(memoryview(memory))  # the path to the restarted daemon; the old one goes afterwards
    pinning.remove(at)
    assert len(registrar.pieces) == 3 and registrar.calls == 3
    assert pinning.edges(at, 250) == [at + 100, at + 200]
    pinning.remove(at)
    assert registrar.pieces == {} and pinning.edges(at, 250) == []


def test_edges_are_those_between_pieces_registered_or_not() -> None:
    pinning = Pinning(FakeRegistrar(limit=1), piece_bytes=100)
    memory, at = area(250)
    pinning.add(memory)
    assert pinning.edges(at, 250) == [at + 100, at + 200]
    assert pinning.edges(at + 100, 100) == []
    assert pinning.edges(at + 150, 51) == [at + 200]
    assert pinning.edges(at - 100, 100) == [] and pinning.edges(at + 250, 100) == []
    pinning.clear()
    assert pinning.edges(at, 250) == []


def test_removal_in_the_middle_of_a_registration_leaves_nothing_registered() -> None:
    registrar = FakeRegistrar()
    registrar.gate.clear()
    pinning = Pinning(registrar, piece_bytes=100)
    memory, at = area(1000)
    pinning.add(memory)
    remover = threading.Thread(target=pinning.remove, args=(at,))
    remover.start()
    wait_until(lambda: pinning._areas[at].stop.is_set(), what="the removal to begin")
    registrar.gate.set()
    remover.join(10)
    assert not remover.is_alive() and registrar.pieces == {}
    assert registrar.calls == 1, "the rest is not registered any more"
    pinning.remove(at)


def test_memory_that_cannot_be_pinned_is_left_unregistered_and_unregistered_cleanly() -> None:
    registrar = FakeRegistrar(limit=1)
    pinning = Pinning(registrar, piece_bytes=100)
    memory, at = area(300)
    pinning.add(memory)
    wait_until(lambda: registrar.pieces == {at: 100}, what="the first piece")
    pinning.remove(at)
    assert registrar.pieces == {}
