"""Sessions, tickets and lifelines: who lives, and when nobody can write any more."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any, cast

import pytest

from kvd import authority, session
from kvd.authority import LoopAuthority
from kvd.peers import Credentials
from kvd.session import Lifeline, Session, Sessions
from kvd.store import ChunkStore, IoTicket
from kvd.wire.errors import Draining, LimitReached, SessionUnknown, Unauthenticated
from kvd.wire.frames import ItemStatus, Op

ME = Credentials(pid=1, uid=0, gids=frozenset({0}))


class FakeStore:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int]] = []
        self.tickets = 0

    def open_session(self, session: int, tenant: str, node: int | None) -> None:
        self.told.append(("open", session))

    def close_session(self, session: int) -> None:
        self.told.append(("close", session))

    def writers_gone(self, session: int) -> None:
        self.told.append(("gone", session))

    def begin_io(self, session: int, op: Op, lease: int, items: list[Any]) -> tuple[IoTicket, list[ItemStatus]]:
        self.tickets += 1
        return IoTicket(self.tickets, session), [ItemStatus.OK for _ in items]

    def end_io(self, ticket: IoTicket, failed: Any = (), checksums: Any = ()) -> None:
        self.told.append(("io", len(failed)))


class House:
    """Sessions on a fake store and a clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 100.0
        self.store = FakeStore()
        self.ended: list[int] = []
        self.sessions = Sessions(cast(ChunkStore, self.store), on_end=self.ended.append, clock=lambda: self.now)

    def lifeline(self) -> Lifeline:
        """A process that has asked for a ticket; closing it is heard as the real one is."""
        line = self.sessions.lifeline_opened(ME, close=lambda: self.sessions.lifeline_closed(line))
        return line

    def attach(self, token: bytes) -> Lifeline:
        line = self.sessions.lifeline_attached(ME, token, close=lambda: self.sessions.lifeline_closed(line))
        return line

    def shm(self) -> tuple[Session, Lifeline]:
        line = self.sessions.claim(self.lifeline().ticket)
        return self.sessions.open(client="c", tenant="default", peer=str(ME), lifeline=line), line

    def tcp(self) -> Session:
        return self.sessions.open(client="c", tenant="default", peer="127.0.0.1:1")

    def tick_for(self, seconds: float) -> None:
        """Time passes, with the daemon at work: a tick at least every second."""
        end = self.now + seconds
        while self.now < end:
            self.now = min(self.now + 1.0, end)
            self.sessions.tick()

    def gone(self, found: Session) -> bool:
        return ("gone", found.id) in self.store.told


@pytest.fixture
def house() -> House:
    return House()


def test_a_ticket_is_good_once(house: House) -> None:
    ticket = house.lifeline().ticket
    assert house.sessions.claim(ticket).ticket == b""
    with pytest.raises(Unauthenticated):
        house.sessions.claim(ticket)
    with pytest.raises(Unauthenticated):
        house.sessions.claim(b"")


def test_a_ticket_that_nobody_claims_is_void_after_a_while(house: House) -> None:
    line = house.lifeline()
    ticket = line.ticket
    house.now += session.TICKET_S
    house.sessions.tick()
    assert house.sessions.lifelines == 0
    with pytest.raises(Unauthenticated):
        house.sessions.claim(ticket)


def test_a_claimed_ticket_does_not_end_its_lifeline(house: House) -> None:
    _, line = house.shm()
    house.now += 10 * session.TICKET_S
    house.sessions.tick()
    assert house.sessions.lifelines == 1
    assert line.session is not None


def test_the_ticket_of_a_dead_process_is_void(house: House) -> None:
    line = house.lifeline()
    ticket = line.ticket
    line.close()
    with pytest.raises(Unauthenticated):
        house.sessions.claim(ticket)


def test_tokens_are_long_and_differ(house: House) -> None:
    tokens = {house.tcp().token for _ in range(10)}
    assert {len(token) for token in tokens} == {16}
    assert len(tokens) == 10


def test_writers_are_gone_only_when_the_stream_and_every_lifeline_have_ended(house: House) -> None:
    found, line = house.shm()
    worker = house.attach(found.token)
    house.sessions.end(found)
    assert ("close", found.id) in house.store.told
    assert house.ended == [found.id]
    line.close()
    assert not house.gone(found)
    worker.close()
    assert house.gone(found)
    assert house.sessions.all() == []


def test_the_death_of_a_worker_alone_ends_nothing(house: House) -> None:
    found, _ = house.shm()
    house.attach(found.token).close()
    assert house.sessions.by_token(found.token) is found
    assert not house.gone(found)


def test_writers_are_not_gone_while_a_transfer_is_under_way(house: House) -> None:
    found = house.tcp()
    house.sessions.io_begun(found.id)
    house.sessions.end(found)
    assert not house.gone(found)
    house.sessions.io_ended(found.id)
    assert house.gone(found)


def test_ending_a_session_twice_is_nothing(house: House) -> None:
    found = house.tcp()
    house.sessions.end(found)
    house.sessions.end(found)
    assert house.store.told.count(("close", found.id)) == 1
    assert house.store.told.count(("gone", found.id)) == 1


def test_a_process_cannot_join_a_session_that_has_ended(house: House) -> None:
    found, _ = house.shm()
    house.sessions.end(found)
    with pytest.raises(SessionUnknown):
        house.attach(found.token)
    with pytest.raises(SessionUnknown):
        house.attach(bytes(16))


def test_silence_ends_a_session_over_tcp_and_none_over_shared_memory(house: House) -> None:
    silent, beating, (local, _) = house.tcp(), house.tcp(), house.shm()
    house.tick_for(session.SILENCE_S)
    house.sessions.heard(beating)
    house.sessions.tick()
    assert not silent.ended
    house.tick_for(0.1)
    assert silent.ended
    assert not beating.ended
    assert not local.ended
    assert silent.notes.get_nowait() is None  # its stream ends


def test_a_daemon_that_was_stopped_does_not_take_its_own_silence_for_theirs(house: House) -> None:
    found = house.tcp()
    house.now += 2 * session.SILENCE_S
    house.sessions.tick()
    assert not found.ended
    house.tick_for(session.SILENCE_S + 0.1)
    assert found.ended


def test_everything_is_bounded(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "MAX_SESSIONS", 2)
    monkeypatch.setattr(session, "MAX_TICKETS", 2)
    monkeypatch.setattr(session, "MAX_LIFELINES_PER_SESSION", 1)
    monkeypatch.setattr(session, "MAX_LIFELINES", 3)
    first = house.tcp()
    house.tcp()
    with pytest.raises(LimitReached):
        house.tcp()
    house.lifeline()
    house.lifeline()
    with pytest.raises(LimitReached):
        house.lifeline()
    house.attach(first.token)
    with pytest.raises(LimitReached):
        house.attach(first.token)


def test_a_session_whose_writers_may_live_still_counts(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "MAX_SESSIONS", 1)
    found, line = house.shm()
    house.sessions.end(found)
    with pytest.raises(LimitReached):
        house.tcp()
    line.close()
    house.tcp()


def test_a_draining_daemon_tells_its_sessions_and_takes_no_new_ones(house: House) -> None:
    found = house.tcp()
    house.sessions.drain(5.0)
    note = found.notes.get_nowait()
    assert note is not None
    assert note.draining.deadline_ms == 5000
    with pytest.raises(Draining):
        house.tcp()


def test_a_client_that_takes_no_notes_still_gets_the_end(house: House) -> None:
    found = house.tcp()
    for _ in range(100):
        house.sessions.drain(1.0)
    house.sessions.end(found)
    notes = []
    while not found.notes.empty():
        notes.append(found.notes.get_nowait())
    assert notes[-1] is None


# ---------------------------------------------------------------- the books, asked from other threads


def in_threads(house: House, work: Callable[[LoopAuthority], Any]) -> Any:
    """Runs ``work`` in a thread beside a loop that answers it."""

    async def run() -> Any:
        asked = LoopAuthority(asyncio.get_running_loop(), house.sessions, cast(ChunkStore, house.store))
        return await asyncio.wait_for(asyncio.to_thread(work, asked), 10)

    return asyncio.run(run())


def test_a_transfer_is_counted_from_begin_to_end(house: House) -> None:
    found = house.tcp()

    def work(asked: LoopAuthority) -> None:
        assert asked.admit(found.token) == found.id
        ticket, statuses = asked.begin_io(found.id, Op.WRITE, 1, [])
        assert statuses == []
        assert found.io_in_flight == 1
        asked.end_io(ticket, [0], {})
        assert found.io_in_flight == 0

    in_threads(house, work)
    assert ("io", 1) in house.store.told


def test_an_ended_session_moves_no_bytes(house: House) -> None:
    found = house.tcp()
    house.sessions.io_begun(found.id)  # keeps the record of it
    house.sessions.end(found)

    def work(asked: LoopAuthority) -> None:
        assert asked.admit(found.token) is None
        with pytest.raises(SessionUnknown):
            asked.begin_io(found.id, Op.READ, 1, [])
        with pytest.raises(SessionUnknown):
            asked.begin_io(4711, Op.READ, 1, [])

    in_threads(house, work)


def test_a_question_that_was_given_up_is_never_acted_on(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(authority, "ANSWER_TIMEOUT_S", 0.05)
    found = house.tcp()

    async def run() -> None:
        asked = LoopAuthority(asyncio.get_running_loop(), house.sessions, cast(ChunkStore, house.store))
        failures: list[Exception] = []

        def work() -> None:
            try:
                asked.begin_io(found.id, Op.WRITE, 1, [])
            except LimitReached as error:
                failures.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join(10)  # the loop is busy meanwhile
        await asyncio.sleep(0)
        assert len(failures) == 1

    asyncio.run(run())
    assert house.store.tickets == 0
    assert found.io_in_flight == 0


def test_the_end_of_a_transfer_is_never_lost_however_late_the_loop_is(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = house.tcp()
    house.sessions.io_begun(found.id)
    monkeypatch.setattr(authority, "ANSWER_TIMEOUT_S", 0.05)

    async def run() -> None:
        asked = LoopAuthority(asyncio.get_running_loop(), house.sessions, cast(ChunkStore, house.store))

        def work() -> None:
            with pytest.raises(LimitReached):
                asked.end_io(IoTicket(1, found.id), [], {})

        thread = threading.Thread(target=work)
        thread.start()
        thread.join(10)
        await asyncio.sleep(0)
        assert found.io_in_flight == 0

    asyncio.run(run())
