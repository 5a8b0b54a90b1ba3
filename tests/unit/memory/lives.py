"""A daemon's life as the pool sees it: the books' calls in the books' order, and what must be found afterwards."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from kvd.memory.pool import Pool, open_pool
from kvd.memory.slabs import SlabAllocator
from kvd.types import ROOT, Location, Namespace, SlotEntry
from kvd.wire.identity import Identity

POOL_BYTES = 1 << 20


def namespace(model: str, chunk_bytes: int) -> Namespace:
    identity = Identity(model=model, weights_revision="1")
    return Namespace(identity.namespace_id("default"), "default", identity, chunk_bytes)


#: Two chunk sizes whose slots lie in slabs of their own.
SMALL, LARGE = namespace("small", 4000), namespace("large", 20000)


@dataclass
class Slot:
    """One slot in use. ``published``: a writer may be writing, or a reader reading."""

    entry: SlotEntry
    ready: bool = False
    published: bool = False
    checksum: int | None = None

    @property
    def expected(self) -> tuple[object, ...]:
        """What a new life must say of it, hints left out."""
        return (*facts(self.entry)[:6], self.ready, self.checksum if self.ready else None, self.entry.life)


def facts(entry: SlotEntry) -> tuple[object, ...]:
    """An entry without its hints (touched, uses), which nothing guards."""
    return (
        entry.offset,
        entry.generation,
        entry.namespace_id,
        entry.key,
        entry.parent,
        entry.chunk_bytes,
        entry.ready,
        entry.checksum,
        entry.life,
    )


class Life:
    """One daemon on the pool in ``directory``."""

    def __init__(
        self, directory: str, daemon_id: int, *, size: int = POOL_BYTES, seed: int = 0, huge_pages: bool = False
    ) -> None:
        self.pool: Pool = open_pool(size, daemon_id=daemon_id, directory=directory, huge_pages=huge_pages)
        assert self.pool.journal is not None and self.pool.holders is not None
        self.journal, self.holders = self.pool.journal, self.pool.holders
        self.id = daemon_id
        self.random = Random(seed)
        self.allocator = SlabAllocator(self.pool.segment.size)
        self.slots: dict[int, Slot] = {}
        self.doing: set[int] = set()  # offsets that the call under way is about
        self.described: set[bytes] = set()
        former = self.pool.former
        self.generation = 1000 if former is None else former.last_generation
        for entry in () if former is None else former.entries:
            self.allocator.claim(entry.offset, self.allocator.slot_bytes(entry.chunk_bytes))
            self.slots[entry.offset] = Slot(entry, entry.ready, entry.ready, entry.checksum)
            if entry.ready:
                self.pool.segment.publish(self._location(entry.offset))
            self.described.add(entry.namespace_id)

    def grant(self, one: Namespace = SMALL, parent: bytes = ROOT, *, publish: bool = True) -> int | None:
        """A slot for a writer; its offset, or None when there is none."""
        if one.id not in self.described:
            self.journal.describe(one)
            self.described.add(one.id)
        offset = self.allocator.allocate(self.allocator.slot_bytes(one.chunk_bytes))
        if offset is None:
            return None
        self.generation += 1
        key = self.random.randbytes(32)
        entry = SlotEntry(offset, self.generation, one.id, key, parent, one.chunk_bytes, False, None, 0, 0, self.id)
        self.doing = {offset}
        self.slots[offset] = Slot(entry)
        self.journal.granted(offset, self.generation, one.id, key, parent, one.chunk_bytes)
        if publish:
            self.pool.segment.publish(self._location(offset))
            self.slots[offset].published = True
        self.doing = set()
        return offset

    def ready(self, offset: int) -> None:
        """The chunk is complete."""
        self.doing = {offset}
        self.journal.ready(offset, self.random.randrange(1 << 30), self.random.randrange(100))
        self.slots[offset].ready = True
        self.doing = set()

    def seal(self, offset: int) -> None:
        """Its checksum was taken."""
        checksum = self.random.getrandbits(64)
        self.doing = {offset}
        self.journal.sealed(offset, checksum)
        self.slots[offset].checksum = checksum
        self.doing = set()

    def use(self, offset: int) -> None:
        """It was used."""
        self.journal.used(offset, self.random.randrange(1 << 30), self.random.randrange(100))

    def retract(self, offset: int) -> None:
        """Nobody uses it any more: evicted, or its writer is proven gone."""
        self.doing = {offset}
        self.pool.segment.retract(self._location(offset))
        self.slots[offset].published = False
        self.doing = set()

    def free(self, offset: int) -> None:
        """The slot goes back."""
        self.retract(offset)
        self.doing = {offset}
        self.journal.freed(offset)
        del self.slots[offset]
        self.allocator.free(offset)
        self.doing = set()

    def step(self) -> None:
        """Something that happens in a daemon's day."""
        writing = [at for at, slot in self.slots.items() if not slot.ready]
        ready = [at for at, slot in self.slots.items() if slot.ready]
        kind, parent = self.random.choice((SMALL, LARGE)), self.random.choice((ROOT, os.urandom(32)))
        choices = [lambda: self.grant(kind, parent)] * 3
        if writing:
            choices += [lambda: self.ready(self.random.choice(writing))] * 2  # type: ignore[list-item]
            choices += [lambda: self.free(self.random.choice(writing))]  # type: ignore[list-item]
        if ready:
            choices += [lambda: self.seal(self.random.choice(ready))]  # type: ignore[list-item]
            choices += [lambda: self.use(self.random.choice(ready))]  # type: ignore[list-item]
            choices += [lambda: self.free(self.random.choice(ready))]  # type: ignore[list-item]
        self.random.choice(choices)()

    def end(self) -> None:
        """The daemon is gone; its files stay."""
        self.pool.close()

    def _location(self, offset: int) -> Location:
        return Location(0, offset, self.slots[offset].entry.generation)


def successor(life: Life, daemon_id: int = 0xB0B, **options: Any) -> Life:
    """The next daemon."""
    life.end()
    return Life(str(Path(life.journal._files.slots).parent), daemon_id, **options)


def found(life: Life) -> list[tuple[object, ...]]:
    """What a daemon was left."""
    return [] if life.pool.former is None else [facts(entry) for entry in life.pool.former.entries]


def expected(life: Life) -> list[tuple[object, ...]]:
    """What the next daemon must find."""
    return [slot.expected for _, slot in sorted(life.slots.items())]
