"""A store in rounds: calls go beside the copies, in their order, and nothing stays reserved."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest

from kvd.wire.chunks import CommitStatus, Location, ReserveResult, ReserveStatus
from kvd.wire.errors import Unavailable
from kvd_client.leases import WriteLease
from kvd_client.path import Piece
from kvd_client.rounds import StoreOutcome, store

PATIENCE_S = 20.0
DEADLINE = 1e12

Step = tuple[str, tuple[bytes, ...]]


class Daemon:
    """Grants everything but ``refused``, and remembers what was done, in order. ``before`` is called with each step by
    whoever takes it."""

    def __init__(self, keys: Sequence[bytes], refused: Sequence[bytes] = (), lost: Sequence[bytes] = ()) -> None:
        self.keys = keys
        self.refused = refused
        self.lost = lost
        self.before: Callable[[Step], None] = lambda step: None
        self.steps: list[Step] = []
        self.held: set[bytes] = set()
        self._changed = threading.Condition()

    def step(self, what: str, keys: Sequence[bytes]) -> None:
        self.before((what, tuple(keys)))
        with self._changed:
            self.steps.append((what, tuple(keys)))
            self._changed.notify_all()

    def wait_for(self, what: str, *keys: bytes) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: (what, keys) in self.steps, PATIENCE_S), f"no {what} of {keys!r}"

    def reserve(self, part: slice) -> WriteLease:
        self.step("reserve", self.keys[part])
        return cast(WriteLease, Lease(self, self.keys[part]))


class Lease:
    """A ``WriteLease`` whose session and path are itself."""

    def __init__(self, daemon: Daemon, keys: Sequence[bytes]) -> None:
        self._daemon = daemon
        self._granted = [key for key in keys if key not in daemon.refused]
        self.lease_id = 1
        self.session = self
        self.results = [
            ReserveResult(ReserveStatus.GRANTED, Location(0, 0, 1))
            if key in self._granted
            else ReserveResult(ReserveStatus.PRESENT)
            for key in keys
        ]
        daemon.held.update(self._granted)

    def path(self, deadline: float) -> Lease:
        return self

    def write(self, lease_id: int, pieces: Sequence[Piece], deadline: float) -> list[bool]:
        assert [bytes(piece.buffer) for piece in pieces] == self._granted
        self._daemon.step("copying", self._granted)
        self._daemon.step("write", self._granted)
        return [key not in self._daemon.lost for key in self._granted]

    def commit(self, keys: Sequence[bytes], timeout_s: float) -> list[CommitStatus]:
        self._daemon.step("commit", keys)
        self._daemon.held.difference_update(keys)
        return [CommitStatus.STORED] * len(keys)

    def abort(self, keys: Sequence[bytes], timeout_s: float) -> None:
        self._daemon.step("abort", keys)
        self._daemon.held.difference_update(keys)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self._daemon.held.difference_update(self._granted)


def stored(daemon: Daemon, round_chunks: int) -> list[StoreOutcome]:
    outcomes = [StoreOutcome.FAILED] * len(daemon.keys)
    try:
        store(daemon.reserve, daemon.keys, cast(Any, daemon.keys), 1, round_chunks, DEADLINE, outcomes)
    except Unavailable:
        pass
    assert not daemon.held, "something stays reserved"
    return outcomes


def test_the_next_round_is_reserved_and_the_one_before_committed_while_one_is_copied() -> None:
    daemon = Daemon([b"0", b"1", b"2"])

    def before(step: Step) -> None:
        if step == ("reserve", (b"1",)):
            daemon.wait_for("copying", b"0")
        if step == ("write", (b"0",)):
            daemon.wait_for("reserve", b"1")
        if step == ("write", (b"1",)):
            daemon.wait_for("commit", b"0")
            daemon.wait_for("reserve", b"2")
        if step == ("write", (b"2",)):
            daemon.wait_for("commit", b"1")

    daemon.before = before
    assert stored(daemon, 1) == [StoreOutcome.STORED] * 3


def test_no_round_is_committed_before_its_parents() -> None:
    daemon = Daemon([b"0", b"1", b"2"])

    def before(step: Step) -> None:
        if step == ("commit", (b"1",)):
            daemon.wait_for("write", b"2")  # so the last has nothing left to do but to commit

    daemon.before = before
    assert stored(daemon, 1) == [StoreOutcome.STORED] * 3
    assert [keys for what, keys in daemon.steps if what == "commit"] == [(b"0",), (b"1",), (b"2",)]


def test_outcomes_are_those_of_each_chunk() -> None:
    daemon = Daemon([b"0", b"1", b"2", b"3", b"4"], refused=[b"1", b"4"], lost=[b"2"])
    present, good, lost = StoreOutcome.PRESENT, StoreOutcome.STORED, StoreOutcome.FAILED
    assert stored(daemon, 2) == [good, present, lost, good, present]
    third = [step for step in daemon.steps if {b"2", b"3"} & set(step[1])][3:]
    assert third == [("abort", (b"2",)), ("commit", (b"3",))], "what did not arrive goes before what is committed"


@pytest.mark.parametrize("failing", ["reserve", "write", "commit"])
@pytest.mark.parametrize("number", range(3))
def test_a_round_that_fails_ends_the_store_and_nothing_stays_reserved(failing: str, number: int) -> None:
    daemon = Daemon([b"0", b"1", b"2"])

    def before(step: Step) -> None:
        if step == (failing, (daemon.keys[number],)):
            raise Unavailable("gone")

    daemon.before = before
    outcomes = stored(daemon, 1)
    assert outcomes[number] is StoreOutcome.FAILED
    done = [keys[0] for what, keys in daemon.steps if what == "commit"]
    assert [outcome is StoreOutcome.STORED for outcome in outcomes] == [key in done for key in daemon.keys]
    assert set(done) >= set(daemon.keys[: max(0, number - 1)])
