"""The format of the slot table, in little-endian words of 8 bytes. Pure: bytes in, entries out.

A header of 64 KiB, then entries of 192 bytes. The header says once and for all what the table belongs to (``Header``);
beside that it has three words that change: the life (id of the daemon) that writes it, how many entries were ever used,
and a bound below which all generations lie. The last two carry check bits in the same word.

An entry is four words that change by one aligned store each, then the body: what is known when the slot is granted,
under a checksum of its own that depends on the entry's number.

    state       0 = free; WRITING or READY, each combined with the generation. Written last on the way up, first on the
                way down. Anything else is damage: the entry is not believed
    use         44 bits ``touched``, 20 bits ``uses``; hints, under no checksum
    checksum    of the chunk's bytes, xxh3_64
    seal        SEALED combined with checksum and generation: the checksum is there; 0: it is not; else damage
    body        offset, generation, chunk bytes, life, flags (1: has a parent), namespace id, key, parent, check

A process that is killed has executed its stores in their order, up to one of them. So whatever the instant, an entry
whose state word is not right is not there, and one whose state word is right is whole.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

import xxhash

from kvd.types import ROOT, SlotEntry
from kvd.wire.lifeline import GRANULE_BYTES

MAGIC = b"KVDSLOTS"
#: Rises with every change of this format, of the generation table's, or of where the allocator puts slots.
FORMAT = 1
#: A multiple of every page size, so that entries can be mapped from here on.
HEADER_BYTES = 64 << 10
ENTRY_BYTES = 192
#: Entries are used, and memory for them is taken, in blocks of so many.
BLOCK_ENTRIES = 4096
BLOCK_BYTES = BLOCK_ENTRIES * ENTRY_BYTES

WORD_BYTES = 8
#: Words of the header that change, by their number.
LIFE_WORD, REACH_WORD, GENERATIONS_WORD = 64, 65, 66
#: Words of an entry, counted from its begin.
STATE, USE, CHECKSUM, SEAL, _OFFSET, GENERATION = range(6)
BODY_BYTE = 4 * WORD_BYTES

WRITING = 0x9D1C5A37E2B84F61
READY = 0x4E83B6D90F5A2C17
SEALED = 0xC7295E8A13F6D04B

_USES_BITS = 20
_MOST_USES = (1 << _USES_BITS) - 1
_MOST_TOUCHED = (1 << 44) - 1
_GUARD_BITS = 20
#: Generations are bounded in steps of this: a new life begins above the bound that it finds.
GENERATION_STEP = 1 << 20

_HEADER = struct.Struct("<8sIIQQIIIIQQQ16s")
_CHECK = struct.Struct("<Q")
_BODY = struct.Struct("<QQQQQ32s32s32s")
_ENTRY = struct.Struct("<QQQQQQQQQ32s32s32sQ16x")
_NO_PARENT = bytes(32)
_EMPTY_BLOCK = bytes(BLOCK_BYTES)
assert _ENTRY.size == ENTRY_BYTES
assert _BODY.size + BODY_BYTE + _CHECK.size <= ENTRY_BYTES


class Header(NamedTuple):
    """What a slot table belongs to. Sizes in bytes; inodes are those of the other files of the pool."""

    pool_bytes: int
    region_bytes: int
    page_bytes: int
    huge_pages: int  # 1: transparent ones were asked for
    pool_inode: int
    generations_inode: int
    holders_inode: int
    boot_id: bytes

    def pack(self) -> bytes:
        """As it stands at the begin of the file."""
        shape = (self.pool_bytes, self.region_bytes, GRANULE_BYTES, self.page_bytes, self.huge_pages, 0)
        packed = _HEADER.pack(MAGIC, FORMAT, ENTRY_BYTES, *shape, *self[4:])
        return packed + _CHECK.pack(xxhash.xxh3_64_intdigest(packed))

    def differs(self, found: bytes) -> str:
        """Why a file that begins with ``found`` is not the slot table of this pool; "" when it is."""
        expected = self.pack()
        if found == expected:
            return ""
        packed = found[: _HEADER.size]
        if len(found) < len(expected) or found[:8] != MAGIC:
            return "the slot table's header is damaged"
        _, version, *_ = _HEADER.unpack(packed)
        if found[_HEADER.size :] != _CHECK.pack(xxhash.xxh3_64_intdigest(packed)):
            return "the slot table's header is damaged"
        if version != FORMAT:
            return f"the slot table has format {version}, this daemon writes {FORMAT}"
        fields = _HEADER.unpack(packed)[2:]
        wanted = _HEADER.unpack(expected[: _HEADER.size])[2:]
        for (reason, unit), here, there in zip(_FIELDS, wanted, fields, strict=True):
            if here != there:
                return reason + (f": {there} {unit}, not {here}" if unit else "")
        return "the slot table's header is damaged"


#: For people, in the order of the header: what differs, and its unit ("" = the values say nothing).
_FIELDS = (
    ("the size of an entry has changed", "bytes"),
    ("the pool had another size", "bytes"),
    ("the pool was cut in other regions", "bytes"),
    ("the granule has changed", "bytes"),
    ("the pool had other pages", "bytes"),
    ("huge pages were asked for, or not", ""),
    ("the slot table's header is damaged", ""),
    ("kvd-pool is not the file that it was", ""),
    ("kvd-generations is not the file that it was", ""),
    ("kvd-holders is not the file that it was", ""),
    ("it was left before this machine was started", ""),
)
#: What ``Header.pack`` and ``body`` give, as one value.
HEADER = struct.Struct(f"{_HEADER.size + _CHECK.size}s")
BODY = struct.Struct(f"{_BODY.size + _CHECK.size}s")


class Entries(NamedTuple):
    """What a table has: intact entries by their number, and how many are not believed."""

    intact: dict[int, SlotEntry]
    damaged: int


def file_bytes(pool_bytes: int) -> int:
    """Size of the slot table of a pool; most of it is never used and takes no memory."""
    blocks = -(-pool_bytes // GRANULE_BYTES // BLOCK_ENTRIES)
    return HEADER_BYTES + blocks * BLOCK_BYTES


def guarded(value: int) -> int:
    """A word that carries ``value`` (44 bits) and check bits."""
    return value << _GUARD_BITS | xxhash.xxh3_64_intdigest(value.to_bytes(8, "little")) & (1 << _GUARD_BITS) - 1


def unguarded(word: int) -> int | None:
    """The value of a guarded word, None when its check bits are not right."""
    value = word >> _GUARD_BITS
    return value if guarded(value) == word else None


def use_word(touched: int, uses: int) -> int:
    """Both in one word; each stays at its largest value."""
    if touched > _MOST_TOUCHED:
        touched = _MOST_TOUCHED
    return touched << _USES_BITS | (uses if uses < _MOST_USES else _MOST_USES)


def seal_word(checksum: int, generation: int) -> int:
    """The mark that makes ``checksum`` count."""
    return SEALED ^ checksum ^ generation


def body(
    index: int, offset: int, generation: int, chunk_bytes: int, life: int, names: tuple[bytes, bytes, bytes]
) -> bytes:
    """The body of entry ``index`` with its checksum; ``names`` are namespace id, key and parent (or ROOT)."""
    namespace_id, key, parent = names
    flags = 0 if parent == ROOT else 1
    packed = _BODY.pack(offset, generation, chunk_bytes, life, flags, namespace_id, key, parent or _NO_PARENT)
    return packed + _CHECK.pack(xxhash.xxh3_64_intdigest(packed, seed=index))


def read_entries(blocks: Iterator[bytes]) -> Entries:
    """The entries of a table, given block by block from the first."""
    intact: dict[int, SlotEntry] = {}
    damaged = 0
    for number, block in enumerate(blocks):
        if block == _EMPTY_BLOCK:
            continue
        first = number * BLOCK_ENTRIES
        for index, fields in enumerate(_ENTRY.iter_unpack(block), first):
            if fields[0] == 0:
                continue
            begin = (index - first) * ENTRY_BYTES + BODY_BYTE
            entry = _entry(fields, xxhash.xxh3_64_intdigest(block[begin : begin + _BODY.size], seed=index))
            if entry is None:
                damaged += 1
            else:
                intact[index] = entry
    return Entries(intact, damaged)


def _entry(fields: tuple[Any, ...], check: int) -> SlotEntry | None:
    state, use, checksum, seal, offset, generation, chunk_bytes, life, flags = fields[:9]
    namespace_id, key, parent, found_check = fields[9:]
    if found_check != check or state not in (WRITING ^ generation, READY ^ generation):
        return None
    if seal not in (0, seal_word(checksum, generation)):
        return None  # not to be taken for a chunk that has no checksum yet: nobody would check its bytes
    ready = state == READY ^ generation
    return SlotEntry(
        offset,
        generation,
        namespace_id,
        key,
        parent if flags else ROOT,
        chunk_bytes,
        ready,
        checksum if ready and seal else None,
        use >> _USES_BITS,
        use & _MOST_USES,
        life,
    )
