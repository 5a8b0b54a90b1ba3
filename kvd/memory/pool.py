"""The pool, opened: anonymous, or with a name that the next daemon finds again.

A pool with a name is taken over when everything fits: same format, sizes and pages, same boot, files of this user's own
that belong together. Otherwise it is made anew, and ``Pool.cold`` says why. Whoever still uses the former files keeps
them: they lose their names, not their bytes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvd import names
from kvd.failpoints import reach
from kvd.memory.backing import anonymous_backing, named_backing, whole_pages
from kvd.memory.files import PoolFiles, Unusable, create_own, discard, files_in, open_own, own_directory
from kvd.memory.former import Former, take_stock
from kvd.memory.generations import GenerationTable
from kvd.memory.holders import Holders
from kvd.memory.numa import Node, divide, place
from kvd.memory.segment import Segment
from kvd.memory.slabs import Part, region_bytes_for
from kvd.memory.slot_format import Header
from kvd.memory.slot_table import SlotTable

_BOOT_ID = "/proc/sys/kernel/random/boot_id"


@dataclass
class Pool:
    """A pool as this daemon's life begins with it.

    ``journal`` and ``holders`` are None for anonymous memory: nothing outlives the daemon, nobody need prove anything.
    ``former``: what the daemon before left, None after a cold start; ``cold`` then says why it is one.
    ``parts``: where it lies on several memory nodes, what of it on which.
    """

    segment: Segment
    journal: SlotTable | None = None
    holders: Holders | None = None
    former: Former | None = None
    cold: str = ""
    parts: tuple[Part, ...] = ()
    _files: PoolFiles | None = field(default=None, repr=False)

    def close(self) -> None:
        """Unmaps and closes. The files stay. Nobody may hold a view of the segment's data any more: BufferError."""
        self.segment.close()
        if self.journal is not None:
            self.journal.close()
        if self.holders is not None:
            self.holders.close()

    @property
    def directory(self) -> str | None:
        """Where small files that share the pool's fate may lie; None when it has no files. Takes write(2), as the
        directory of the pool itself may not."""
        return None if self._files is None else os.path.dirname(self._files.slots)

    def remove(self) -> None:
        """Removes the files, if there are any: the next daemon starts cold. Raises OSError."""
        if self._files is not None:
            discard(self._files)
            if self.directory != os.path.dirname(self._files.pool):
                with contextlib.suppress(OSError):  # somebody else has something there
                    os.rmdir(os.path.dirname(self._files.slots))


def open_pool(
    size: int,
    *,
    daemon_id: int,
    directory: str | None = None,
    huge_pages: bool = False,
    nodes: Sequence[Node] = (),
) -> Pool:
    """A pool of ``size`` bytes, cut to whole pages; in ``directory`` (tmpfs or hugetlbfs) when given, else anonymous.

    The caller has made sure that no other daemon uses ``directory``. ``daemon_id``: of this life, never used before.
    ``nodes``: the memory nodes to lie on; a kernel that does not let kvd choose is none. Raises OSError.
    """
    pool = _open(size, daemon_id, directory, huge_pages)
    segment = pool.segment
    parts = divide(segment.size, nodes)
    if parts and place(segment.address, segment.info.page_bytes, parts):
        pool.parts = parts
    return pool


def _open(size: int, daemon_id: int, directory: str | None, huge_pages: bool) -> Pool:
    if directory is None:
        backing = anonymous_backing(size, huge_pages=huge_pages)
        segment = Segment(backing, GenerationTable.anonymous(backing.size, daemon_id))
        return Pool(segment, cold="the pool is anonymous memory")
    files = files_in(directory)
    try:
        return _take_over(files, size, daemon_id, huge_pages)
    except Unusable as error:
        cold = str(error)
    discard(files)
    return _make(files, size, daemon_id, huge_pages, cold)


def _make(files: PoolFiles, size: int, daemon_id: int, huge_pages: bool, cold: str) -> Pool:
    """A new pool. The slot table comes last: until it is there, there is no pool."""
    try:
        with contextlib.ExitStack() as stack:
            fd = create_own(files.pool)
            stack.callback(os.close, fd)
            backing = named_backing(files.pool, fd, size, huge_pages=huge_pages)
            table = GenerationTable.create(files.generations, backing.size, daemon_id)
            stack.callback(table.close)
            holders = Holders.create(files.holders)
            stack.callback(holders.close)
            own_directory(files.namespaces)
            header = _header(files, backing.size, backing.page_bytes, huge_pages)
            journal = SlotTable.create(files, header, daemon_id)
            stack.callback(journal.close)
            segment = Segment(backing, table)
            stack.pop_all()
    except BaseException:
        discard(files)
        raise
    return Pool(segment, journal, holders, None, cold, _files=files)


def _take_over(files: PoolFiles, size: int, daemon_id: int, huge_pages: bool) -> Pool:
    if not os.path.lexists(files.slots):
        raise Unusable("there is no pool of a former daemon")
    try:
        own_directory(files.namespaces)
    except PermissionError as error:
        raise Unusable(str(error.strerror)) from None
    size, page_bytes = whole_pages(size, os.path.dirname(files.pool))
    with contextlib.ExitStack() as stack:
        journal = SlotTable.open(files, _header(files, size, page_bytes, huge_pages))
        stack.callback(journal.close)
        fd = open_own(files.pool, os.O_RDWR)
        stack.callback(os.close, fd)
        if os.fstat(fd).st_size != size:
            raise Unusable(f"kvd-pool has {os.fstat(fd).st_size} bytes, not {size}")
        holders = Holders.open(files.holders)
        stack.callback(holders.close)
        table = GenerationTable.open(files.generations, size)
        stack.callback(table.close)

        stock = take_stock(journal.read(), table, names.load(files.namespaces), size)
        if stock.doubtful and holders.anybody():
            told = ", ".join(f"{number} {reason}" for reason, number in stock.skipped.items())
            raise Unusable(f"a process of a former life may be writing, and some slots cannot be made out: {told}")

        segment = Segment(named_backing(files.pool, fd, size, huge_pages=huge_pages), table)
        entries = sorted(stock.entries.values(), key=lambda entry: entry.offset)
        in_use = {entry.namespace_id for entry in entries}
        namespaces = {key: namespace for key, namespace in stock.namespaces.items() if key in in_use}
        former = Former(entries, journal.last_generation, journal.life, namespaces, stock.skipped)
        reach("pool.recovery.before")
        # Words first: an entry may lack its word, never a word its entry.
        table.take_over(daemon_id, [entry for entry in entries if entry.ready])
        reach("pool.recovery.words")
        journal.take_over({entry.offset: index for index, entry in stock.entries.items()}, daemon_id)
        for unused in stock.namespaces.keys() - in_use:
            journal.forget(unused)
        reach("pool.recovery.after")
        stack.pop_all()
    return Pool(segment, journal, holders, former, _files=files)


def _header(files: PoolFiles, size: int, page_bytes: int, huge_pages: bool) -> Header:
    """What the slot table of this pool says at its begin. Raises Unusable when a file is missing."""
    with open(_BOOT_ID) as file:
        boot_id = bytes.fromhex(file.read().strip().replace("-", ""))
    try:
        pool, generations, holders = (os.lstat(path).st_ino for path in (files.pool, files.generations, files.holders))
    except FileNotFoundError as error:
        raise Unusable(f"{os.path.basename(error.filename)} is missing") from None
    return Header(size, region_bytes_for(size), page_bytes, int(huge_pages), pool, generations, holders, boot_id)
