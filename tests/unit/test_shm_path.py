"""The client's side of a daemon that comes back to its pool: mappings stay, holds end, readers see every retraction."""

from __future__ import annotations

import array
import gc
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvd.memory.holders import Holders
from kvd.memory.pool import Pool, open_pool
from kvd.types import Location
from kvd.wire import lifeline as wire
from kvd.wire.errors import ProtocolMismatch, Unavailable
from kvd.wire.lifeline import TABLE_HEADER
from kvd.wire.spans import whole
from kvd_client import mapping
from kvd_client.lifeline import Lifeline
from kvd_client.mapping import housekeeper
from kvd_client.path import Piece
from kvd_client.shm import ShmPath
from tests.wait import wait_until

POOL_BYTES = 1 << 20
SLOT = Location(0, 8192, 77)


class FakeDaemon:
    """One life: a pool, and a lifeline socket that welcomes everybody."""

    def __init__(self, directory: Path, daemon_id: int, *, named: bool = True) -> None:
        pool = str(directory / "pool") if named else None
        self.id = daemon_id
        self.pool: Pool = open_pool(POOL_BYTES, daemon_id=daemon_id, directory=pool)
        self.path = str(directory / f"sock{daemon_id}")
        self.said = daemon_id  # in the answer
        self._connections: list[socket.socket] = []
        self._welcoming = threading.Lock()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(self.path)
        self._listener.listen(8)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def connect(self) -> ShmPath:
        """A path of a new session."""
        lifeline = Lifeline.open(self.path, 10)
        with self._welcoming:  # its own copy of the holder is closed
            return ShmPath(lifeline)

    def end(self, *, remove: bool = False) -> None:
        """The daemon is killed, or stopped for good."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(10)
        for connection in self._connections:
            connection.close()
        if remove:
            self.pool.remove()
        self.pool.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with self._welcoming:
                self._welcome(connection)
            self._connections.append(connection)

    def _welcome(self, connection: socket.socket) -> None:
        connection.recv(wire.MAX_MESSAGE_BYTES)
        descriptors = [self.pool.segment.data_fd, self.pool.segment.table_fd]
        holder = None if self.pool.holders is None else self.pool.holders.hand_out(self.id)
        ours, theirs = socket.socketpair()
        self._connections.append(ours)
        descriptors.append(theirs.fileno())
        counts = (1, 0 if holder is None else 1, 0)
        message = wire.WELCOME.pack(wire.MAGIC, wire.VERSION, wire.Status.OK, self.said, bytes(16), *counts)
        message += wire.SEGMENT.pack(*self.pool.segment.info)
        rights = array.array("i", descriptors if holder is None else [*descriptors, holder])
        connection.sendmsg([message], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        theirs.close()
        if holder is not None:
            os.close(holder)


@pytest.fixture(autouse=True)
def brisk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(mapping, "TICK_S", 0.01)
    yield
    housekeeper.release()
    gc.collect()
    assert mapped() == []


def mapped(name: str = "") -> list[str]:
    """Lines of this process's map that are of a client's mapping of a pool."""
    known = {entry.address for entry in list(mapping._known.values())}
    with open("/proc/self/maps") as maps:
        return [line for line in maps if name in line and int(line.split("-")[0], 16) in known]


def address(path: ShmPath) -> int:
    return path._mappings[0].address


def wait_for_end(holders: Holders | None, life: int) -> None:
    """Waits until no hold of ``life`` is left: another thread may be the one that lets it go."""
    assert holders is not None
    wait_until(lambda: holders.gone(life), what="the hold to end")


def soon() -> float:
    return time.monotonic() + 10


def copy(path: ShmPath, data: bytearray, *, write: bool = False) -> bool:
    pieces = [Piece(SLOT, whole(len(data)), data)]
    return (path.write if write else path.read)(1, pieces, soon())[0]


def test_sessions_of_one_process_share_the_mapping_and_each_has_its_own_hold(tmp_path: Path) -> None:
    daemon = FakeDaemon(tmp_path, 8)
    assert daemon.pool.holders is not None
    first, second = daemon.connect(), daemon.connect()
    assert address(first) == address(second)
    first.close()
    assert not daemon.pool.holders.gone(8) and second.alive
    second.close()
    wait_for_end(daemon.pool.holders, 8)
    daemon.end()


def test_a_client_that_stayed_up_maps_nothing_anew(tmp_path: Path) -> None:
    daemon = FakeDaemon(tmp_path, 8)
    daemon.pool.segment.publish(SLOT)
    path = daemon.connect()
    assert copy(path, bytearray(b"stored"), write=True)
    at = address(path)
    daemon.end()
    assert not path.alive
    path.retain()
    path.close()
    assert len(mapped("kvd-pool")) == 1
    daemon = FakeDaemon(tmp_path, 12)
    path = daemon.connect()
    assert address(path) == at and path.memory()[0].nbytes == POOL_BYTES
    assert bytes(path.memory()[0][8192:8198]) == b"stored"
    path.close()
    daemon.end()


@pytest.mark.parametrize("asked", [True, False])
def test_the_hold_of_a_dead_daemon_ends_although_the_mapping_stays(tmp_path: Path, asked: bool) -> None:
    daemon = FakeDaemon(tmp_path, 8)
    path = daemon.connect()
    memory = path.memory()
    daemon.end()
    daemon = FakeDaemon(tmp_path, 12)
    assert daemon.pool.holders is not None
    if asked:
        assert not path.alive
        wait_for_end(daemon.pool.holders, 8)
    else:
        wait_for_end(daemon.pool.holders, 8)  # the idle path lets go by itself
    assert path.view(SLOT, 10) is None and path.memory()[0] is memory[0]
    again = daemon.connect()
    assert address(again) == address(path), "registered memory stays registered"
    path.close()
    again.close()
    memory[0].release()
    memory.clear()
    daemon.end()


def test_a_view_keeps_the_hold_whatever_else_has_ended(tmp_path: Path) -> None:
    daemon = FakeDaemon(tmp_path, 8)
    path = daemon.connect()
    view = path.view(SLOT, 4096)
    assert view is not None
    part = view[100:200]
    del view
    daemon.end()
    assert not path.alive
    path.close()
    del path
    later = FakeDaemon(tmp_path, 12)
    assert later.pool.holders is not None
    part[:4] = b"late"
    assert not later.pool.holders.gone(8), "somebody may be writing"
    del part
    wait_for_end(later.pool.holders, 8)
    assert bytes(later.pool.segment.data[8292:8296]) == b"late"
    later.end()


def test_readers_of_the_former_life_learn_of_every_slot_that_the_new_one_retracts(tmp_path: Path) -> None:
    daemon = FakeDaemon(tmp_path, 8)
    assert daemon.pool.journal is not None
    other = Location(0, 16384, 78)
    for location in (SLOT, other):
        daemon.pool.segment.publish(location)
    path = daemon.connect()
    daemon.end()
    assert path.intact([SLOT, other]) == [True, True], "what was copied in time may be used"
    assert not path.alive
    assert path.intact([SLOT, other]) == [True, True]
    # Neither has an entry in the slot table: the new life clears their words.
    daemon = FakeDaemon(tmp_path, 12)
    assert daemon.pool.former is not None
    assert path.intact([SLOT, other]) == [False, False]
    path.close()
    daemon.end()


def test_memory_without_a_name_goes_back_at_once(tmp_path: Path) -> None:
    for number, named in ((4, False), (8, True)):
        daemon = FakeDaemon(tmp_path, number, named=named)
        path = daemon.connect()
        daemon.end(remove=True)
        assert not path.alive
        path.retain()
        path.close()
        assert mapped() == []


@pytest.mark.parametrize("how", ["time", "name", "another", "released"])
def test_what_was_retained_is_let_go(tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapping, "RETAIN_S", 0.05 if how == "time" else 100)
    daemon = FakeDaemon(tmp_path, 8)
    path = daemon.connect()
    daemon.end()
    path.retain()
    path.close()
    if how == "name":
        assert len(mapped("kvd-pool")) == 1
        daemon.pool.remove()
    elif how == "another":
        (tmp_path / "other").mkdir()
        other = FakeDaemon(tmp_path / "other", 12)
        path = other.connect()
        assert len(mapped("kvd-pool")) == 1
        path.close()
        other.end()
    elif how == "released":
        housekeeper.release()
        assert mapped() == []
    wait_until(lambda: not mapped(), what="the mapping to end")


def test_the_thread_ends_when_there_is_nothing_to_look_after(tmp_path: Path) -> None:
    def watching() -> bool:
        return any(thread.name == "kvd-mappings" for thread in threading.enumerate())

    wait_until(lambda: not watching(), what="the thread of other tests to end")
    daemon = FakeDaemon(tmp_path, 8)
    path = daemon.connect()
    assert watching()
    path.close()
    wait_until(lambda: not watching(), what="the thread to end")
    path = daemon.connect()
    assert watching()
    path.close()
    daemon.end()


@pytest.mark.parametrize(
    ("break_it", "error"),
    [
        (lambda daemon: setattr(daemon, "said", 9), Unavailable),
        (lambda daemon: _write(daemon, 0, b"KVDGENS9"), ProtocolMismatch),
        (lambda daemon: os.truncate(daemon.pool.segment.data_fd, 4096), ProtocolMismatch),
    ],
    ids=["another life", "another format", "too small"],
)
def test_a_pool_that_does_not_fit_the_welcome_is_not_used(
    tmp_path: Path, break_it: Callable[[FakeDaemon], None], error: type[Exception]
) -> None:
    daemon = FakeDaemon(tmp_path, 8)
    break_it(daemon)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(error):
        daemon.connect()
    assert daemon.pool.holders is not None
    gc.collect()
    wait_for_end(daemon.pool.holders, 8)
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= before + 2, what="the descriptors to be closed")
    daemon.end()


def _write(daemon: FakeDaemon, at: int, data: bytes) -> None:
    assert at + len(data) <= TABLE_HEADER.size
    daemon.pool.segment.generations._map[at : at + len(data)] = data
