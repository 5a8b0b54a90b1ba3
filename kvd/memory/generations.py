"""The generation table of a segment (``kvd/wire/lifeline.py``): which slot may be used, for every process to see."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable

from kvd.failpoints import reach
from kvd.memory.backing import published_memory
from kvd.memory.files import Unusable, create_own, open_own
from kvd.types import Location, SlotEntry
from kvd.wire.lifeline import GRANULE_BYTES, TABLE_HEADER, TABLE_HEADER_BYTES, TABLE_MAGIC, WORD_BYTES

_HEADER_WORDS = TABLE_HEADER_BYTES // WORD_BYTES
_DAEMON_ID_WORD = 3
#: Words that are looked through at a time.
_PIECE_WORDS = 1 << 20


class GenerationTable:
    """One word per granule, mapped. ``fd``: what clients receive; through it the table cannot be written.

    ``publish`` and ``retract`` are the store's way into the table; every other thread and process only reads it.
    """

    def __init__(self, fd: int, mapping: mmap.mmap, segment: int) -> None:
        """Takes ``fd`` and ``mapping`` over; see the three functions below."""
        self.fd = fd
        self.segment = segment
        self._map = mapping
        self._words = memoryview(mapping).cast("Q")

    @classmethod
    def anonymous(cls, data_bytes: int, daemon_id: int, segment: int = 0) -> GenerationTable:
        """A table that ends with its last user. Nobody else can ever write it. Raises OSError."""
        table = cls(*published_memory("kvd-generations", table_bytes(data_bytes)), segment)
        table._write_header(data_bytes, daemon_id)
        return table

    @classmethod
    def create(cls, path: str, data_bytes: int, daemon_id: int, segment: int = 0) -> GenerationTable:
        """A table with a name, its memory taken already. It can be written by this user only. Raises OSError."""
        writable = create_own(path)
        try:
            # A file system that is full must say so now, not with SIGBUS when a word is written.
            os.posix_fallocate(writable, 0, table_bytes(data_bytes))
            table = cls(_readable(path), mmap.mmap(writable, table_bytes(data_bytes)), segment)
        finally:
            os.close(writable)
        table._write_header(data_bytes, daemon_id)
        return table

    @classmethod
    def open(cls, path: str, data_bytes: int, segment: int = 0) -> GenerationTable:
        """The table that a former life left. Its header still has the former daemon's id. Raises Unusable."""
        writable = open_own(path, os.O_RDWR)
        try:
            if os.fstat(writable).st_size != table_bytes(data_bytes):
                raise Unusable("the generation table has another size")
            table = cls(_readable(path), mmap.mmap(writable, table_bytes(data_bytes)), segment)
        finally:
            os.close(writable)
        if table._header(0)[:4] != _header_of(data_bytes, segment, 0)[:4]:
            table.close()
            raise Unusable("the generation table's header is damaged")
        return table

    @property
    def inode(self) -> int:
        """Number of the file."""
        return os.fstat(self.fd).st_ino

    @property
    def bytes(self) -> int:
        """Size of the table."""
        return len(self._map)

    def publish(self, location: Location) -> None:
        """From now on the slot's bytes count as those of this generation."""
        reach("pool.publish.before")
        self._words[_HEADER_WORDS + location.offset // GRANULE_BYTES] = location.generation
        reach("pool.publish.after")

    def retract(self, location: Location) -> None:
        """The slot may be used for something else from now on: whoever copied from it must notice."""
        reach("pool.retract.before")
        self._words[_HEADER_WORDS + location.offset // GRANULE_BYTES] = 0
        reach("pool.retract.after")

    def word(self, segment: int, offset: int) -> int:
        """What the table says of the slot at ``offset`` bytes; for the audit. ``segment`` is this one's index."""
        assert segment == self.segment
        return self._words[_HEADER_WORDS + offset // GRANULE_BYTES]

    def strays(self, entries: Iterable[SlotEntry]) -> int:
        """How many words are set that belong to none of ``entries`` (ascending by offset)."""
        return sum(len(_set_words(rest)) for _, rest in self._without(entries))

    def take_over(self, daemon_id: int, kept: Iterable[SlotEntry]) -> None:
        """Clears every word but those of ``kept`` (ascending by offset), and puts the new daemon's id in the header."""
        for first, rest in self._without(kept):
            for index in _set_words(rest):
                self._words[first + index] = 0
        self._words[_DAEMON_ID_WORD] = daemon_id

    def close(self) -> None:
        """Unmaps and closes."""
        self._words.release()
        self._map.close()
        os.close(self.fd)

    def _without(self, entries: Iterable[SlotEntry]) -> Iterable[tuple[int, bytearray]]:
        """The table in pieces, (number of the first word, copy), in which the words of ``entries`` are 0."""
        waiting = iter(entries)
        entry = next(waiting, None)
        for first in range(_HEADER_WORDS, len(self._words), _PIECE_WORDS):
            piece = bytearray(self._words[first : first + _PIECE_WORDS])
            words = memoryview(piece).cast("Q")
            while entry is not None and _HEADER_WORDS + entry.offset // GRANULE_BYTES < first + len(words):
                at = _HEADER_WORDS + entry.offset // GRANULE_BYTES - first
                if words[at] == entry.generation:
                    words[at] = 0
                entry = next(waiting, None)
            words.release()
            yield first, piece

    def _header(self, at: int) -> tuple[object, ...]:
        return TABLE_HEADER.unpack_from(self._map, at)

    def _write_header(self, data_bytes: int, daemon_id: int) -> None:
        TABLE_HEADER.pack_into(self._map, 0, *_header_of(data_bytes, self.segment, daemon_id))


def table_bytes(data_bytes: int) -> int:
    """Size of the table of a segment."""
    return TABLE_HEADER_BYTES + data_bytes // GRANULE_BYTES * WORD_BYTES


def _header_of(data_bytes: int, segment: int, daemon_id: int) -> tuple[bytes, int, int, int, int]:
    return TABLE_MAGIC, GRANULE_BYTES, segment, data_bytes // GRANULE_BYTES, daemon_id


def _readable(path: str) -> int:
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)


def _set_words(piece: bytearray) -> list[int]:
    """Numbers of the words that are not 0."""
    if piece.count(0) == len(piece):
        return []
    return [index for index, word in enumerate(memoryview(piece).cast("Q")) if word]
