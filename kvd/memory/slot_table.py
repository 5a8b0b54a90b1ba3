"""The slot table: what a new daemon knows of the pool that a former one left. Format: ``slot_format``.

The file is as large as the pool could ever need and sparse. Memory is taken in blocks before the first entry of each is
used, so that a full file system is an error here and not a SIGBUS.
"""

from __future__ import annotations

import logging
import mmap
import os
from collections.abc import Iterator

from kvd import names
from kvd.failpoints import reach
from kvd.memory.files import PoolFiles, Unusable, create_own, open_own
from kvd.memory.slot_format import (
    BLOCK_BYTES,
    BLOCK_ENTRIES,
    BODY,
    BODY_BYTE,
    CHECKSUM,
    ENTRY_BYTES,
    GENERATION,
    GENERATION_STEP,
    GENERATIONS_WORD,
    HEADER,
    HEADER_BYTES,
    LIFE_WORD,
    REACH_WORD,
    READY,
    SEAL,
    STATE,
    USE,
    WORD_BYTES,
    WRITING,
    Entries,
    Header,
    body,
    file_bytes,
    guarded,
    read_entries,
    seal_word,
    unguarded,
    use_word,
)
from kvd.types import Namespace

log = logging.getLogger(__name__)


class SlotTable:
    """The table, mapped: a ``SlotJournal``. Belongs to the event loop.

    Calls for slots that it does not know do nothing: those of a slot that found no room in the table.
    """

    def __init__(self, files: PoolFiles, fd: int, size: int) -> None:
        """Takes ``fd`` over; see ``create`` and ``open``."""
        self._files = files
        self._fd = fd
        self._map = mmap.mmap(fd, size)
        self._words = memoryview(self._map).cast("Q")
        self._life = 0
        self._most = (size - HEADER_BYTES) // ENTRY_BYTES
        self._reach = 0  # entries that were ever used, a multiple of a block
        self._bound = 0  # all generations are below this many steps
        self._free: list[int] = []
        self._entries: dict[int, int] = {}  # number of the entry's first word, by the offset of the slot
        self._full = False

    @classmethod
    def create(cls, files: PoolFiles, header: Header, life: int) -> SlotTable:
        """An empty table. It gets its name last of all the files of a pool. Raises OSError."""
        reach("pool.create.before")
        unnamed = files.slots + ".new"
        size = file_bytes(header.pool_bytes)
        fd = create_own(unnamed)
        try:
            os.ftruncate(fd, size)
            os.posix_fallocate(fd, 0, HEADER_BYTES)
            table = cls(files, fd, size)
        except BaseException:
            os.close(fd)
            raise
        HEADER.pack_into(table._map, 0, header.pack())
        table._words[REACH_WORD] = table._words[GENERATIONS_WORD] = guarded(0)
        table._life = table._words[LIFE_WORD] = life
        reach("pool.create.named")
        os.rename(unnamed, files.slots)
        reach("pool.create.after")
        return table

    @classmethod
    def open(cls, files: PoolFiles, header: Header) -> SlotTable:
        """The table of a former life; ``read``, then ``take_over``. Raises Unusable when it is not this pool's."""
        fd = open_own(files.slots, os.O_RDWR)
        try:
            if difference := header.differs(os.pread(fd, HEADER.size, 0)):
                raise Unusable(difference)
            size = file_bytes(header.pool_bytes)
            if os.fstat(fd).st_size != size:
                raise Unusable(f"the slot table has {os.fstat(fd).st_size} bytes, not {size}")
            table = cls(files, fd, size)
        except BaseException:
            os.close(fd)
            raise
        reached, bound = (unguarded(table._words[word]) for word in (REACH_WORD, GENERATIONS_WORD))
        if reached is None or bound is None or reached % BLOCK_ENTRIES or reached > table._most:
            table.close()
            raise Unusable("the slot table's header is damaged")
        table._reach, table._bound, table._life = reached, bound, table._words[LIFE_WORD]
        return table

    @property
    def life(self) -> int:
        """Id of the daemon that writes the table, or that wrote it last."""
        return self._life

    @property
    def last_generation(self) -> int:
        """No slot was ever given a higher one."""
        return self._bound * GENERATION_STEP

    def read(self) -> Entries:
        """What the table has; reads the blocks that were ever used and nothing else."""
        return read_entries(self._blocks())

    def take_over(self, kept: dict[int, int], life: int) -> None:
        """Keeps the entries ``kept`` (number by offset of the slot), frees all others. From now on ``life`` writes."""
        used = bytearray(self._reach)
        for offset, index in kept.items():
            self._entries[offset] = self._word(index)
            used[index] = 1
        self._free = [index for index in range(self._reach - 1, -1, -1) if not used[index]]
        for index in self._free:
            self._words[self._word(index)] = 0
        reach("pool.recovery.entries")
        self._life = self._words[LIFE_WORD] = life

    # -- the journal

    def describe(self, namespace: Namespace) -> None:
        """See ``SlotJournal``. When it fails, a restart will not have the namespace."""
        reach("pool.describe.before")
        try:
            names.save(self._files.namespaces, namespace)
        except OSError as error:
            log.error("namespace %s will not survive a restart: %s", namespace.id.hex()[:16], error)
        reach("pool.describe.after")

    def forget(self, namespace_id: bytes) -> None:
        """See ``SlotJournal``."""
        reach("pool.forget.before")
        try:
            names.remove(self._files.namespaces, namespace_id)
        except OSError as error:
            log.warning("the file of namespace %s stays: %s", namespace_id.hex()[:16], error)
        reach("pool.forget.after")

    def granted(
        self, offset: int, generation: int, namespace_id: bytes, key: bytes, parent: bytes, chunk_bytes: int
    ) -> None:
        """See ``SlotJournal``."""
        reach("pool.granted.before")
        if generation >= self._bound * GENERATION_STEP:
            self._bound = generation // GENERATION_STEP + 2
            self._words[GENERATIONS_WORD] = guarded(self._bound)
        if not self._free and not self._grow():
            return
        index = self._free.pop()
        word, words = self._word(index), self._words
        whole = body(index, offset, generation, chunk_bytes, self._life, (namespace_id, key, parent))
        BODY.pack_into(self._map, word * WORD_BYTES + BODY_BYTE, whole)
        words[word + SEAL] = 0
        words[word + USE] = 0
        reach("pool.granted.body")
        words[word + STATE] = WRITING ^ generation
        self._entries[offset] = word
        reach("pool.granted.after")

    def ready(self, offset: int, touched: int, uses: int) -> None:
        """See ``SlotJournal``."""
        reach("pool.ready.before")
        word = self._entries.get(offset)
        if word is not None:
            self._words[word + USE] = use_word(touched, uses)
            self._words[word + STATE] = READY ^ self._words[word + GENERATION]
        reach("pool.ready.after")

    def sealed(self, offset: int, checksum: int) -> None:
        """See ``SlotJournal``."""
        reach("pool.sealed.before")
        word = self._entries.get(offset)
        if word is not None:
            self._words[word + SEAL] = 0
            self._words[word + CHECKSUM] = checksum
            reach("pool.sealed.checksum")
            self._words[word + SEAL] = seal_word(checksum, self._words[word + GENERATION])
        reach("pool.sealed.after")

    def used(self, offset: int, touched: int, uses: int) -> None:
        """See ``SlotJournal``. One store, and too frequent for a fail point."""
        word = self._entries.get(offset)
        if word is not None:
            self._words[word + USE] = use_word(touched, uses)

    def freed(self, offset: int) -> None:
        """See ``SlotJournal``."""
        reach("pool.freed.before")
        word = self._entries.pop(offset, None)
        if word is not None:
            self._words[word + STATE] = 0
            self._free.append((word * WORD_BYTES - HEADER_BYTES) // ENTRY_BYTES)
        reach("pool.freed.after")

    def close(self) -> None:
        """Unmaps and closes."""
        self._words.release()
        self._map.close()
        os.close(self._fd)

    # -- inside

    @staticmethod
    def _word(index: int) -> int:
        return (HEADER_BYTES + index * ENTRY_BYTES) // WORD_BYTES

    def _grow(self) -> bool:
        """One block more. False when the file system is full: the new slot will not survive a restart."""
        reach("pool.grow.before")
        begin = HEADER_BYTES + self._reach * ENTRY_BYTES
        try:
            os.posix_fallocate(self._fd, begin, BLOCK_BYTES)
        except OSError as error:
            if not self._full:
                log.error("the slot table cannot grow (%s): some chunks will not survive a restart", error.strerror)
            self._full = True
            return False
        self._free = list(range(self._reach + BLOCK_ENTRIES - 1, self._reach - 1, -1))
        self._reach += BLOCK_ENTRIES
        self._words[REACH_WORD] = guarded(self._reach)
        reach("pool.grow.after")
        return True

    def _blocks(self) -> Iterator[bytes]:
        for first in range(0, self._reach, BLOCK_ENTRIES):
            begin = HEADER_BYTES + first * ENTRY_BYTES
            yield self._map[begin : begin + BLOCK_BYTES]
