"""The presence table: which keys a Lookup may find, for every process of the node to see without a call.

A file in memory that the daemon writes and its clients map read-only. All words are unsigned, 64 bits, little-endian. A
header of one page, then buckets of eight words: seven tags, and the number of keys that found no free tag. A key of a
namespace is mixed into a bucket and a tag that is never 0; 0 is a free place.

Every word is written by one store, tags never move, and a reader takes no lock: it finds the tag of every key that is
there, or a count that is not 0 and so may stand for it. What it does not find is not there, or has come in this very
moment. A key that it finds may be missing all the same; who asks the daemon learns that.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from kvd.wire.identity import KEY_BYTES

MAGIC = b"KVDHELD1"
VERSION = 1
HEADER = struct.Struct("<8sQQQQ")  # magic, version, daemon id, number of buckets (a power of two), flags
HEADER_BYTES = 4096
#: A bit of the flags: the table does not count, every key may be there.
ASK_ALWAYS = 1

WORD_BYTES = 8
HEADER_WORDS = HEADER_BYTES // WORD_BYTES
FLAGS_WORD = 4
#: Of a bucket: it fills one line of the processor's cache.
BUCKET_WORDS = 8
_BUCKET = struct.Struct(f"{BUCKET_WORDS}Q")  # native: each word is one load
#: Tags of a bucket; the word behind them counts the keys without one.
TAGS = OVERFLOW = 7

#: Odd, and its words are too: whatever bits two keys differ in, the middle words of the product differ as well.
_MULTIPLIER = 0xD6E8FEB86659FD93_165667B19E3779F9_C2B2AE3D27D4EB4F_9E3779B97F4A7C15
_WORD = (1 << 64) - 1


def table_bytes(buckets: int) -> int:
    """Size of a table."""
    return HEADER_BYTES + buckets * BUCKET_WORDS * WORD_BYTES


def buckets_of(size_bytes: int) -> int | None:
    """Number of buckets of a table of this size; None: no table has it."""
    buckets, rest = divmod(size_bytes - HEADER_BYTES, BUCKET_WORDS * WORD_BYTES)
    return buckets if buckets > 0 and not rest and not buckets & (buckets - 1) else None


def place(namespace_id: bytes, key: bytes, buckets: int) -> tuple[int, int]:
    """The first word of the key's bucket, and its tag: words 4 and 3 of (key xor namespace) * multiplier."""
    mixed = (int.from_bytes(key, "little") ^ int.from_bytes(namespace_id, "little")) * _MULTIPLIER >> 192
    return HEADER_WORDS + (mixed >> 64 & buckets - 1) * BUCKET_WORDS, mixed & _WORD or 1


def may_hold(words: memoryview[int], namespace_id: bytes, keys: Sequence[bytes]) -> int:
    """How many of ``keys``, from the first on, may be there. ``words``: the whole table.

    A key of the wrong length may: the daemon will say what it thinks of it. ValueError when ``words`` is no table.
    """
    buckets = buckets_of(words.nbytes)
    if buckets is None:
        raise ValueError(f"{words.nbytes} bytes are no presence table")
    if words[FLAGS_WORD] & ASK_ALWAYS:
        return len(keys)
    for number, key in enumerate(keys):
        if len(key) == KEY_BYTES:
            first, tag = place(namespace_id, key, buckets)
            bucket = _BUCKET.unpack_from(words, first * WORD_BYTES)
            if not bucket[OVERFLOW] and tag not in bucket:
                return number
    return len(keys)
