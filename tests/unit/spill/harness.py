"""Drives in a directory of their own, a pool, movers, and somebody who listens; for the tests of the spill."""

from __future__ import annotations

import errno
import itertools
import mmap
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from kvd.spill import codec
from kvd.spill.drive import Attachment, Drive, DriveState
from kvd.spill.engine import Movers, Threads
from kvd.spill.extents import Extents
from kvd.spill.files import Files
from kvd.spill.health import Patience
from kvd.spill.record import padded
from kvd.spill.scan import Batch, Scan
from kvd.spill.transfer import checksum_of
from kvd.types import ROOT, Found, Move, Namespace, Order, Outcome, Place, Read, Result, Seal, Verify, Write
from kvd.wire.identity import Identity
from tests.wait import wait_until

KIB = 1024
MIB = 1024 * KIB
PAGE = 4 * KIB
DEADLINE_S = 20.0


def namespace(name: str = "m", chunk_bytes: int = 64 * KIB, layers: int = 2, heads: int = 2) -> Namespace:
    """A namespace of the tenant ``t``."""
    identity = Identity(model=name, weights_revision="1", num_layers=layers, num_kv_heads=heads)
    return Namespace(identity.namespace_id("t"), "t", identity, chunk_bytes)


def key(number: int) -> bytes:
    """The key with this number."""
    return number.to_bytes(32, "big")


class Listener:
    """Hears everything; keeps it."""

    def __init__(self) -> None:
        self.results: dict[int, Result] = {}
        self.answers = 0
        self.twice: list[int] = []
        self.states: list[tuple[int, DriveState, str]] = []
        self.attachments: dict[int, Attachment] = {}
        self.losses: list[tuple[int, list[int]]] = []
        self.room: list[tuple[int, int]] = []
        self._changed = threading.Condition()

    def complete(self, result: Result) -> None:
        with self._changed:
            if result.ticket in self.results:
                self.twice.append(result.ticket)  # an exception here would only be logged
            self.results[result.ticket] = result
            self.answers += 1
            self._changed.notify_all()

    def wait(self, tickets: Iterable[int]) -> list[Result]:
        wanted = list(tickets)
        with self._changed:
            assert self._changed.wait_for(lambda: all(t in self.results for t in wanted), DEADLINE_S), "no answer"
        return [self.results[ticket] for ticket in wanted]

    def attached(self, drive: int, attachment: Attachment) -> None:
        self.attachments[drive] = attachment

    def state_changed(self, drive: int, state: DriveState, reason: str) -> None:
        self.states.append((drive, state, reason))

    def available(self, drive: int, extents: int) -> None:
        self.room.append((drive, extents))

    def lost(self, drive: int, extents: list[int]) -> None:
        self.losses.append((drive, extents))


class Rig:
    """Movers over drives in ``parents``, with the space of the books, driven by hand. A context manager."""

    def __init__(
        self,
        parents: Sequence[Path],
        *,
        drive_bytes: int = 33 * MIB,
        pool_bytes: int = 16 * MIB,
        floor_bytes: int = 0,
        files: Files | None = None,
        patience: Patience | None = None,
        threads: Threads | None = None,
        encoder: codec.Encoder | None = None,
        start: bool = True,
    ) -> None:
        self.listener = Listener()
        self.memory = mmap.mmap(-1, pool_bytes)
        self.pool = memoryview(self.memory)
        self.drives = [
            Drive(number, str(parent), drive_bytes, floor_bytes=floor_bytes, files=files, patience=patience)
            for number, parent in enumerate(parents)
        ]
        self.space = Extents(len(parents), first_sequence=1)
        self.movers = Movers(
            self.pool,
            self.drives,
            self.listener.complete,
            self.listener,
            encoder=encoder,
            threads=threads or Threads(readers=2, writers=2, sealers=1),
        )
        self._tickets = itertools.count(1)
        for drive in self.drives:
            attachment = drive.open()
            if attachment is not None:
                self.space.attach(drive.index, *attachment)
        if start:
            self.movers.start()

    def __enter__(self) -> Rig:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.movers.close(DEADLINE_S), "threads are left"
        for drive in self.drives:
            if drive.state is not DriveState.CLOSED:  # never started
                drive.close()
                drive.run()
        assert self.space.audit() == [] and self.listener.twice == []

    @property
    def drive(self) -> Drive:
        """The first."""
        return self.drives[0]

    # -- orders

    def fill(self, offset: int, chunk: bytes) -> None:
        """Bytes into a slot."""
        self.pool[offset : offset + len(chunk)] = chunk

    def chunk(self, offset: int, length: int) -> bytes:
        """Bytes of a slot."""
        return bytes(self.pool[offset : offset + length])

    def submit(self, make: Callable[[int], Order]) -> int:
        """Submits the order that ``make`` makes of a ticket."""
        ticket = next(self._tickets)
        self.movers.submit(make(ticket))
        return ticket

    def do(self, make: Callable[[int], Order]) -> Result:
        """Submits, and waits for the result."""
        return self.listener.wait([self.submit(make)])[0]

    def seal(self, space: Namespace, offset: int, *, encode: bool = False) -> Result:
        return self.do(lambda ticket: Seal(ticket, offset, space, encode))

    def verify(self, offset: int, length: int, checksum: int) -> Result:
        return self.do(lambda ticket: Verify(ticket, offset, length, checksum))

    def write(
        self,
        space: Namespace,
        name: bytes,
        chunk: bytes,
        *,
        parent: bytes = ROOT,
        offset: int = 0,
        place: Place | None = None,
    ) -> tuple[Place, Result]:
        """Writes a chunk by way of the slot at ``offset``."""
        self.fill(offset, chunk)
        found = place or self.space.allocate(len(chunk))
        assert found is not None
        checksum = checksum_of(memoryview(chunk))
        return found, self.do(lambda ticket: Write(ticket, space, name, parent, offset, checksum, None, found))

    def stored(self, space: Namespace, name: bytes, chunk: bytes, *, parent: bytes = ROOT) -> Place:
        """The same; it must succeed."""
        place, result = self.write(space, name, chunk, parent=parent)
        assert result.outcome is Outcome.OK
        return place

    def read(self, space: Namespace, name: bytes, place: Place, *, parent: bytes = ROOT, offset: int = 0) -> Result:
        return self.do(lambda ticket: Read(ticket, space, name, parent, place, offset))

    def move(self, space: Namespace, name: bytes, source: Place, target: Place, *, parent: bytes = ROOT) -> Result:
        return self.do(lambda ticket: Move(ticket, space, name, parent, source, target))

    def clear(self, offset: int, length: int) -> None:
        """So that what a read leaves in a slot was not there before."""
        self.fill(offset, bytes(padded(length)))

    # -- files and scans

    def extent_path(self, place: Place) -> Path:
        """The file in which a record lies."""
        return Path(self.drives[place.drive].path) / f"{place.extent:08d}.extent"

    def scan(self, threads: int = 2) -> tuple[list[Found], dict[str, int]]:
        """Adopts what lies on the drives, as the books would."""
        found: list[Found] = []
        skipped: dict[str, int] = {}
        lock = threading.Lock()

        def hear(batch: Batch) -> None:
            with lock:
                found.extend(batch.found)
                for record in batch.found:
                    self.space.adopt(record.place)
                if batch.last:
                    self.space.scanned(batch.drive, batch.extent)

        for drive in self.drives:
            attachment = self.listener.attachments[drive.index]
            scan = Scan(drive, attachment.existing, hear, threads=threads)
            scan.start()
            assert scan.join(DEADLINE_S)
            assert scan.progress.extents_done == len(attachment.existing)
            for reason, count in scan.progress.skipped.items():
                skipped[reason] = skipped.get(reason, 0) + count
        return found, skipped

    def wait_state(self, state: DriveState, drive: int = 0) -> None:
        """Waits for a drive to be in a state."""
        wait_until(lambda: self.drives[drive].state is state, DEADLINE_S, f"drive {drive} to be {state.value}")


class FaultyFiles(Files):
    """Calls that fail when told to. ``fail[name]``: an errno for the call of this name, until it is taken out."""

    def __init__(self) -> None:
        self.fail: dict[str, int] = {}
        self.calls: list[str] = []
        self.hold: dict[str, threading.Event] = {}
        self.held: set[str] = set()
        self.free: int | None = None
        self.short = 0

    def _pass(self, name: str) -> None:
        self.calls.append(name)
        if name in self.hold:
            self.held.add(name)
            assert self.hold[name].wait(DEADLINE_S), "held for ever"
        if name in self.fail:
            raise OSError(self.fail[name], os.strerror(self.fail[name]))

    def open(self, path: str, flags: int) -> int:
        self._pass("open")
        return super().open(path, flags)

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        self._pass("preadv")
        return super().preadv(fd, self._shortened(buffers), offset)

    def pwritev(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        self._pass("pwritev")
        return super().pwritev(fd, self._shortened(buffers), offset)

    def sync(self, fd: int) -> None:
        self._pass("sync")
        super().sync(fd)

    def allocate(self, fd: int, length: int) -> None:
        self._pass("allocate")
        super().allocate(fd, length)

    def free_bytes(self, path: str) -> int:
        self._pass("free_bytes")
        return super().free_bytes(path) if self.free is None else self.free

    def _shortened(self, buffers: Sequence[memoryview]) -> Sequence[memoryview]:
        if not self.short:
            return buffers
        return [buffers[0][: self.short]]


EIO, ENOSPC, EROFS = errno.EIO, errno.ENOSPC, errno.EROFS
