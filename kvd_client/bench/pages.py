"""What huge pages gain: the same pool on them and on ordinary pages, in turn.

A pool counts for a kind of page when its daemon says so, by the kernel's account, and never for what was asked for.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import mmap
import multiprocessing
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection

from kvd.wire.chunks import ROOT, Location
from kvd.wire.spans import whole
from kvd_client.bench.daemon import SHARED_MEMORY, BenchDaemon
from kvd_client.bench.disks import PAGE_BYTES, takes_direct
from kvd_client.bench.figures import GIB, Figure, beside, interleave, single, timed
from kvd_client.bench.limits import together
from kvd_client.bench.parts import CALL_TIMEOUT_S, CONNECT_TIMEOUT_S, Mover, Size, Slots, chain
from kvd_client.bench.tiers import CHUNK_BYTES, READERS, RECORD_BYTES, STARTS, WRITERS
from kvd_client.client import Client
from kvd_client.lifeline import Lifeline
from kvd_client.mapping import READ_WRITE, map_file
from kvd_client.path import Attachment, Piece, open_path

POOL_BYTES = 1 * GIB
#: Copied in one round, and how often each of them is written to the disk or read from it.
CHUNKS, RECORDS = 64, 4
#: Rounds that are not counted: by then the process that stays has mapped what it copies to and from.
WARMUP = 2
#: Of the pool; a kernel that is short of memory in one piece gives less.
LEAST_PERCENT = 99
#: No process here takes so long to answer, seconds.
PATIENCE_S = 120.0
#: What first copies write.
PATTERN = b"k" * CHUNK_BYTES

ORDINARY, TRANSPARENT, HUGETLB = "ordinary pages", "transparent huge pages", "hugetlb pages"

#: In this order, with their units.
UNITS = {
    "start": "s",
    "start again": "s",
    "map": "ms",
    "first write": "GiB/s",
    "path write": "GiB/s",
    "path read": "GiB/s",
    "disk write": "GiB/s",
    "disk read": "GiB/s",
}

_PR_SET_THP_DISABLE, _PR_GET_THP_DISABLE = 41, 42
_libc = ctypes.CDLL(None, use_errno=True)
_libc.memcmp.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t]


class NotGiven(RuntimeError):
    """A daemon did not get its pool on the pages of ``kind``; ``got`` says what it got, for people."""

    def __init__(self, kind: Kind, backing: str) -> None:
        self.kind, self.got = kind, f"{kind.place} got: {backing}"
        super().__init__(f"{kind.name}: {self.got}")


@dataclass(frozen=True)
class Kind:
    """A kind of page, and where daemons have their pools on it: in ``/dev/shm`` (``named``), or in anonymous memory."""

    name: str
    named: bool = False

    @property
    def place(self) -> str:
        """For people."""
        return f"a pool in {SHARED_MEMORY}" if self.named else "an anonymous pool"

    def serve(self) -> BenchDaemon:
        """A daemon whose whole pool lies on such pages. Raises NotGiven, and whatever keeps a daemon from starting."""
        with _transparent_forbidden() if self.name == ORDINARY else contextlib.nullcontext():
            daemon = BenchDaemon(POOL_BYTES, warm=self.named, huge_pages=self.name == HUGETLB)
        try:
            if kind_of(backing := backing_of(daemon)) != self.name:
                raise NotGiven(self, backing)
        except BaseException:
            daemon.close()
            raise
        return daemon

    def start(self) -> float:
        """Seconds from exec to SERVING, with a pool whose memory was taken from the system by then."""
        with self.serve() as daemon:
            return daemon.start_s


def bench_pages(rounds: int, directory: str) -> tuple[list[Figure], list[str]]:
    """Starts, first and further copies, and the disk in ``directory`` past the page cache: a pool on each kind of huge
    pages that this machine gives, against the same pool on ordinary ones. The figures, and what was left out."""
    kinds, notes = _given()
    while kinds:
        reference = Kind(ORDINARY, next((kind.named for kind in kinds if kind.name == TRANSPARENT), False))
        try:
            figures, more = _measured([reference, *kinds], rounds, directory)
        except NotGiven as error:
            if error.kind == reference:
                raise
            kinds.remove(error.kind)  # it got them at first
            notes.append(str(error))
        else:
            return figures, notes + more
    return [], notes


def backing_of(daemon: BenchDaemon) -> str:
    """What the memory of its pool is, in the words of ``kvd status``."""
    with Client(daemon.unix_endpoint, timeout_s=CALL_TIMEOUT_S) as client:
        client.connect(CONNECT_TIMEOUT_S)
        return client.stats().pool.backing


def kind_of(backing: str) -> str | None:
    """The kind of page that a pool lies on; None when that is not known, or a part lies on each."""
    if share := re.search(r"(\d+) % on huge pages", backing):
        percent = int(share[1])
        return TRANSPARENT if percent >= LEAST_PERCENT else None if percent else ORDINARY
    if backing.startswith("hugetlb"):
        return HUGETLB if re.search(r"\d+ MiB pages", backing) else None
    return ORDINARY if re.search(r"\d+ KiB pages", backing) else None


def _given() -> tuple[list[Kind], list[str]]:
    """The kinds of huge pages that daemons really get here, and why not the others."""
    kinds, notes = [], []
    for candidates in ((Kind(TRANSPARENT), Kind(TRANSPARENT, named=True)), (Kind(HUGETLB),)):
        refusals = []
        for kind in candidates:
            try:
                kind.start()
            except NotGiven as error:
                refusals.append(error.got)
            except (OSError, RuntimeError) as error:
                if not kind.named:
                    raise
                refusals.append(f"{kind.place}: {error}")
            else:
                kinds.append(kind)
                break
        else:
            notes.append(f"{candidates[0].name}: {'; '.join(refusals)}")
    return kinds, notes


def _measured(kinds: list[Kind], rounds: int, directory: str) -> tuple[list[Figure], list[str]]:
    """``kinds``: the reference first. Raises NotGiven."""
    samples = _starts(kinds, min(rounds, STARTS))
    with contextlib.ExitStack() as stack:
        home = stack.enter_context(tempfile.TemporaryDirectory(prefix="kvd-bench-", dir=os.path.abspath(directory)))
        direct = takes_direct(os.path.join(home, "direct"))
        pools = [stack.enter_context(contextlib.closing(Pool(kind, home))) for kind in kinds]
        parts: dict[str, Callable[[], float]] = {}
        for what in pools[0].parts:
            for pool in pools:
                if direct or not what.startswith("disk"):
                    parts[_named(what, pool.kind)] = pool.parts[what]
        samples |= interleave(parts, rounds, WARMUP)
        for pool in pools:
            pool.check(disk=direct)
    figures = []
    for what, unit in UNITS.items():
        for kind in kinds[1:]:
            if (name := _named(what, kind)) in samples:
                figures.append(beside(single(name, unit, samples[name]), ORDINARY, samples[_named(what, kinds[0])]))
    return figures, [] if direct else [f"the disk, with huge pages: nothing passes the page cache in {directory}"]


def _starts(kinds: list[Kind], rounds: int) -> dict[str, list[float]]:
    """Each start is followed at once by another of its kind, which gets the memory that the first has just given back:
    a virtual machine may have to ask its host for memory that was free for longer, and that takes longer than all else.
    """
    again: dict[str, list[float]] = {_named("start again", kind): [] for kind in kinds}

    def twice(kind: Kind) -> float:
        first_s = kind.start()
        again[_named("start again", kind)].append(kind.start())
        return first_s

    # Nothing to warm up: each has started before.
    return interleave({_named("start", kind): functools.partial(twice, kind) for kind in kinds}, rounds, 0) | again


def _named(what: str, kind: Kind) -> str:
    return f"{what}, {kind.name}"


class Pool:
    """A pool on pages of ``kind``, its client in this process, slots that stay leased for writing, and a file of
    their records in ``directory``. ``parts``: what is measured, by name."""

    def __init__(self, kind: Kind, directory: str) -> None:
        self.kind = kind
        self._path = os.path.join(directory, kind.name)
        with contextlib.ExitStack() as stack:
            daemon = stack.enter_context(kind.serve())
            client = stack.enter_context(Client(daemon.unix_endpoint, timeout_s=CALL_TIMEOUT_S))
            client.connect(CONNECT_TIMEOUT_S)
            self._mover = Mover(client, Size(CHUNK_BYTES, CHUNKS, rounds=1))
            steady = stack.enter_context(contextlib.closing(Slots(self._mover)))
            keys = chain(CHUNKS)
            self._lease = client.reserve(
                self._mover.namespace, list(zip(keys, [ROOT, *keys], strict=False)), timeout_s=CALL_TIMEOUT_S
            )
            stack.callback(self._lease.abort)
            self._locations = [result.location for result in self._lease.results if result.location is not None]
            views = [client.path(CALL_TIMEOUT_S).view(at, CHUNK_BYTES) for at in self._locations]
            self._views = [view for view in views if view is not None]
            stack.callback(self._views.clear)
            if len(self._views) < CHUNKS:
                raise RuntimeError("not every slot was granted")
            self._attachment = client.attachment()
            self._stack = stack.pop_all()
        self.parts: dict[str, Callable[[], float]] = {
            "map": self._map,
            "first write": self._first_write,
            "path write": steady.write,
            "path read": steady.read,
            "disk write": self._disk_write,
            "disk read": self._disk_read,
        }

    def check(self, *, disk: bool) -> None:
        """Every byte of one more round, beside the measurement."""
        self._mover.check()
        self._clear()
        self._first_write()
        self._compare("what a new process has written")
        if disk:
            self._disk_write()
            self._clear()
            self._disk_read()
            self._compare("what was read from the disk")

    def close(self) -> None:
        """Ends client and daemon. The file is the directory's."""
        self._stack.close()

    def _map(self) -> float:
        """Milliseconds in which a new process maps the pool and fills its page tables, as it does beside its copies."""
        return _elsewhere(_map, self._attachment, self._lease.lease_id, self._locations) * 1e3

    def _first_write(self) -> float:
        """GiB/s of the first copies of a new process, into a pool that it has just mapped."""
        seconds = _elsewhere(_write, self._attachment, self._lease.lease_id, self._locations)
        return CHUNKS * CHUNK_BYTES / seconds / GIB

    def _disk_write(self) -> float:
        """GiB/s of records from the slots to the file, each header and chunk in one call, as the disk tier does it."""
        return self._transfer(os.pwritev, os.O_WRONLY | os.O_CREAT, WRITERS)

    def _disk_read(self) -> float:
        """GiB/s of records from the file to the slots."""
        return self._transfer(os.preadv, os.O_RDONLY, READERS)

    def _transfer(self, call: Callable[[int, list[mmap.mmap | memoryview], int], int], flags: int, depth: int) -> float:
        records = RECORDS * CHUNKS
        headers = [mmap.mmap(-1, PAGE_BYTES) for _ in range(depth)]
        fd = os.open(self._path, flags | os.O_DIRECT, 0o600)

        def work(number: int) -> None:
            for at in range(number, records, depth):
                if call(fd, [headers[number], self._views[at % CHUNKS]], at * RECORD_BYTES) != RECORD_BYTES:
                    raise OSError(errno.EIO, "the disk has not moved a whole record")

        try:
            if flags & os.O_CREAT:
                os.posix_fallocate(fd, 0, records * RECORD_BYTES)  # what is there already stays
            return records * CHUNK_BYTES / timed(lambda: together(work, depth)) / GIB
        finally:
            os.close(fd)

    def _clear(self) -> None:
        for view in self._views:
            ctypes.memset(_address(view), 0, CHUNK_BYTES)

    def _compare(self, what: str) -> None:
        if any(_libc.memcmp(_address(view), PATTERN, CHUNK_BYTES) for view in self._views):
            raise RuntimeError(f"{what} is not what it should be")


def _address(view: memoryview) -> ctypes.c_void_p:
    return ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(view)))


# ---------------------------------------------------------------- in a process of its own

_Work = Callable[[Attachment, int, list[Location]], float]


def _map(attachment: Attachment, lease_id: int, locations: list[Location]) -> float:
    lifeline = Lifeline.attach(attachment.address, attachment.token, CALL_TIMEOUT_S)
    began = time.perf_counter()
    for descriptors in lifeline.segments:
        mapping = map_file(descriptors.data_fd, descriptors.info.data_bytes, READ_WRITE)
        mapping.fault_in(0, mapping.length)
    return time.perf_counter() - began


def _write(attachment: Attachment, lease_id: int, locations: list[Location]) -> float:
    span, copies = whole(CHUNK_BYTES), [bytearray(PATTERN) for _ in locations]  # there before anything is measured
    pieces = [Piece(at, span, copy) for at, copy in zip(locations, copies, strict=True)]
    path = open_path(attachment, timeout_s=CALL_TIMEOUT_S)
    began = time.perf_counter()
    done = path.write(lease_id, pieces, time.monotonic() + CALL_TIMEOUT_S)
    seconds = time.perf_counter() - began
    if not all(done):
        raise RuntimeError("not every chunk was copied")
    return seconds


def _elsewhere(work: _Work, attachment: Attachment, lease_id: int, locations: list[Location]) -> float:
    """What ``work`` returns in a process that has nothing mapped yet: a worker of the session. Raises RuntimeError."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(theirs, work, attachment, lease_id, locations), daemon=True)
    process.start()
    theirs.close()
    try:
        if not ours.poll(PATIENCE_S):
            raise RuntimeError(f"a new client has not answered for {PATIENCE_S:.0f} s")
        seconds: float = ours.recv()
        return seconds
    except EOFError:
        raise RuntimeError("a new client has failed: see what it has said above") from None
    finally:
        ours.close()
        process.kill()  # it has nothing left to do
        process.join()


def _answer(answer: Connection, work: _Work, attachment: Attachment, lease_id: int, locations: list[Location]) -> None:
    answer.send(work(attachment, lease_id, locations))


# ---------------------------------------------------------------- ordinary pages


@contextlib.contextmanager
def _transparent_forbidden() -> Iterator[None]:
    """What is started meanwhile gets no transparent huge pages, whatever the machine gives: it inherits that."""
    before = _libc.prctl(_PR_GET_THP_DISABLE, 0, 0, 0, 0)
    if _libc.prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "this system does not let a process do without huge pages")
    try:
        yield
    finally:
        _libc.prctl(_PR_SET_THP_DISABLE, before, 0, 0, 0)
