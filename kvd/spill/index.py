"""The index of an extent: what the headers of its records say, once more, in a small file beside it.

    index:  [batch][batch]...
    batch:  [batch header][entry][entry]...[check, 16 bytes]

A scan that finds an index reads that, and headers only from where it ends. It is a shortcut and no second truth: it
holds the records that lie one behind the other from the extent's begin on, each of which is on the disk before it comes
in. A batch counts only if it bears a BLAKE2b that is keyed like a header's, is of the extent's present life, and goes
on where the batch before it ends. Whatever else is in the file, headers say it better.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from itertools import accumulate, repeat
from typing import NamedTuple

from kvd.spill.record import CHECK_BYTES, FORMAT_VERSION, HEADER_BYTES, Header, check_of
from kvd.types import Found, Place

_MAGIC = b"kvd:idx\x01"
#: Magic, format, extent, entries, where the first one's record lies, life.
_BATCH = struct.Struct("<8sHHIIQ16s")
#: Record's bytes, its sequence, the chunk's bytes, how much of the parent counts, namespace, key, parent.
_ENTRY = struct.Struct("<QQQB32s32s32s")
ENTRY_BYTES = _ENTRY.size
#: What a batch takes beside its entries.
BATCH_BYTES = _BATCH.size + CHECK_BYTES
MAX_ENTRIES = 2048
#: Records that wait for one before them to be written. It is not written any more when there are so many.
_MAX_BEHIND = 1024


class Part(NamedTuple):
    """What a batch says: its records, in the order of their places, at least one. ``size_bytes``: of the batch."""

    found: list[Found]
    size_bytes: int

    @property
    def end(self) -> int:
        """Where the last record ends in the extent."""
        last = self.found[-1].place
        return last.offset + last.record_bytes


@dataclass(slots=True, eq=False)
class Run:
    """The records of one life of an extent that lie one behind the other from its begin on, as far as they are known.

    ``size_bytes``: of the index file, what counts of it. ``begin``: of the first record that it does not have. ``end``:
    of the last of the run. ``entries``: of the records between.
    """

    life: bytes
    size_bytes: int = 0
    begin: int = HEADER_BYTES
    end: int = HEADER_BYTES
    entries: bytearray = field(default_factory=bytearray)
    _behind: dict[int, tuple[int, bytes]] = field(default_factory=dict)

    def add(self, header: Header) -> None:
        """A record that is there. One behind a gap joins the run when the gap is filled; maybe never."""
        entry = header.record_bytes, _pack_entry(header)
        if header.offset != self.end:
            if len(self._behind) == _MAX_BEHIND:
                self._behind.clear()  # the gap stays: a write has failed
            self._behind[header.offset] = entry
            return
        following: tuple[int, bytes] | None = entry
        while following is not None:
            self.end += following[0]
            self.entries += following[1]
            following = self._behind.pop(self.end, None)

    def skip(self, part: Part) -> None:
        """The index has these records, which come next."""
        self.size_bytes += part.size_bytes
        self.begin = self.end = part.end

    def wrote(self, entries: bytes | bytearray, batch_bytes: int) -> None:
        """The first entries, these, are in the index now, in a batch of so many bytes."""
        del self.entries[: len(entries)]
        self.size_bytes += batch_bytes
        self.begin += sum(fields[0] for fields in _ENTRY.iter_unpack(entries))


def pack_batch(extent: int, life: bytes, begin: int, entries: bytes | bytearray, secret: bytes) -> bytes:
    """A batch with ``entries``, whose first record lies at ``begin``."""
    count = len(entries) // ENTRY_BYTES
    content = _BATCH.pack(_MAGIC, FORMAT_VERSION, 0, extent, count, begin, life) + entries
    return content + check_of(content, secret)


def parse_batch(content: memoryview, drive: int, extent: int, life: bytes, begin: int, secret: bytes) -> Part | None:
    """The batch at the begin of ``content``; None when there is none that counts with its first record at ``begin``."""
    if len(content) < BATCH_BYTES:
        return None
    magic, version, _, number, count, first, named = _BATCH.unpack_from(content)
    if (magic, version, number, first, named) != (_MAGIC, FORMAT_VERSION, extent, begin, life):
        return None
    end = _BATCH.size + count * ENTRY_BYTES
    if not 0 < count <= MAX_ENTRIES or len(content) < end + CHECK_BYTES:
        return None
    if check_of(content[:end], secret) != content[end : end + CHECK_BYTES]:
        return None
    columns = zip(*_ENTRY.iter_unpack(content[_BATCH.size : end]), strict=True)
    sizes, sequences, chunk_bytes, parent_bytes, namespaces, keys, parents = columns
    life_number = int.from_bytes(life[8:], "little")
    offsets = accumulate(sizes[:-1], initial=begin)
    places = map(Place, repeat(drive), repeat(extent), offsets, sizes, sequences, repeat(life_number))
    above = [parent[:length] for parent, length in zip(parents, parent_bytes, strict=True)]
    return Part(list(map(Found, namespaces, keys, above, chunk_bytes, places)), end + CHECK_BYTES)


def _pack_entry(header: Header) -> bytes:
    return _ENTRY.pack(
        header.record_bytes,
        header.sequence,
        header.chunk_bytes,
        len(header.parent),
        header.namespace_id,
        header.key,
        header.parent,
    )
