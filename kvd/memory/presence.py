"""The presence table (``kvd/wire/presence.py``), as the daemon writes it."""

from __future__ import annotations

import os

from kvd.memory.backing import published_memory
from kvd.wire.presence import (
    ASK_ALWAYS,
    FLAGS_WORD,
    HEADER,
    MAGIC,
    OVERFLOW,
    TAGS,
    VERSION,
    may_hold,
    place,
    table_bytes,
)

#: A table has at least so many buckets (256 KiB) and at most so many (256 MiB): beyond 10 million keys it grows fuller.
MIN_BUCKETS, MAX_BUCKETS = 1 << 12, 1 << 22
#: Free and taken tags for every key that is expected.
_TAGS_PER_KEY = 3


def buckets_for(expected_keys: int) -> int:
    """Buckets of a table in which ``expected_keys`` keys take a third of the tags, or less."""
    wanted = -(-expected_keys * _TAGS_PER_KEY // TAGS)
    return min(max(1 << (wanted - 1).bit_length() if wanted > 0 else 0, MIN_BUCKETS), MAX_BUCKETS)


class PresenceTable:
    """Which keys can be found; see ``Presence`` in ``kvd.ledger.terms``. Only touched pages of it cost memory.

    ``fd``: what clients receive; through it the table cannot be written. ``size_bytes``: what they map.
    """

    def __init__(self, expected_keys: int, daemon_id: int, *, ask_always: bool = False) -> None:
        """An empty table. ``ask_always``: clients ask whatever it says. Raises OSError."""
        self._buckets = buckets_for(expected_keys)
        self.size_bytes = table_bytes(self._buckets)
        self.fd, self._map = published_memory("kvd-presence", self.size_bytes)
        self._words = memoryview(self._map).cast("Q")
        self._keys = 0
        HEADER.pack_into(self._map, 0, MAGIC, VERSION, daemon_id, self._buckets, ASK_ALWAYS if ask_always else 0)

    def __len__(self) -> int:
        """Keys in the table: taken tags, and keys that found none free."""
        return self._keys

    def add(self, namespace_id: bytes, key: bytes) -> None:
        """The key can be found from now on."""
        first, tag = place(namespace_id, key, self._buckets)
        words = self._words
        self._keys += 1
        for at in range(first, first + TAGS):
            if not words[at]:
                words[at] = tag
                return
        words[first + OVERFLOW] += 1

    def remove(self, namespace_id: bytes, key: bytes) -> None:
        """The key, which was added, can not be found any more. Of two keys with equal tags the other one stays."""
        first, tag = place(namespace_id, key, self._buckets)
        words = self._words
        for at in range(first, first + TAGS):
            if words[at] == tag:
                words[at] = 0
                self._keys -= 1
                return
        if words[first + OVERFLOW]:
            words[first + OVERFLOW] -= 1
            self._keys -= 1

    def may_hold(self, namespace_id: bytes, key: bytes) -> bool:
        """What a reader makes of the key; for the audit."""
        return may_hold(self._words, namespace_id, [key]) == 1

    def close(self) -> None:
        """From now on clients ask, and hear that nobody answers. The books may still write what nobody reads."""
        self._words[FLAGS_WORD] |= ASK_ALWAYS
        os.close(self.fd)
