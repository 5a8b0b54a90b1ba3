"""Making room: which chunks go when a slot is needed and none is free."""

from __future__ import annotations

from collections.abc import Iterator

from kvd.ledger.books import Books, SlabWindow
from kvd.ledger.chunk import Chunk

#: Windows whose chunks are looked at one by one, the coldest by their slabs' mean ages first.
_WINDOWS_WEIGHED = 4


class RoomMaker:
    """Gets slots for the items of one Reserve. Made anew for each request: it remembers what has been tried.

    Two ways to make room are compared by what they lose per byte that they gain: evicting the next victim of the same
    slot size, or emptying a window of slabs of other sizes. The chance that a chunk is wanted again is taken to be
    inverse to its age, the uses of chunks since its own last one; what is free already loses nothing. Scanning the
    windows is O(slabs), so it is done once per request and again only when the slot size has no victim left.
    """

    def __init__(self, books: Books, slot_bytes: int) -> None:
        self._books = books
        self._slot_bytes = slot_bytes
        self._compared = False
        self._full = False

    def slot(self) -> int | None:
        """Offset of a slot, made free by eviction if need be; None when nothing can be evicted now."""
        if self._full:
            return None
        offset = self._books.slots.allocate(self._slot_bytes)
        if offset is None and self._make():
            offset = self._books.slots.allocate(self._slot_bytes)
        self._full = offset is None
        return offset

    def _make(self) -> bool:
        victim = self._books.policy.coldest(self._slot_bytes)
        if victim is None or not self._compared:
            self._compared = True
            slabs = self._coldest_window(victim)
            if slabs:
                self._empty(slabs)
                return True
        if victim is None:
            return False
        self._books.counters.evicted_chunks += self._books.evict(victim)
        return True

    def _coldest_window(self, victim: Chunk | None) -> tuple[int, ...]:
        """The slabs of the window that loses least, if that is less than ``victim`` loses; otherwise nothing."""
        least = float("inf") if victim is None else 1.0 / self._age(victim)
        best: tuple[int, ...] = ()
        for floor, window in sorted(self._emptiable())[:_WINDOWS_WEIGHED]:
            if floor >= least:
                break
            loss = self._loss(window)
            if loss < least:
                least, best = loss, window.slabs
        return best

    def _emptiable(self) -> Iterator[tuple[float, SlabWindow]]:
        """The windows in which nothing is held, each with a loss that it cannot be below: by its slabs' mean ages."""
        homes = self._books.homes
        next_stamp = self._books.last_stamp + 1
        for window in self._books.slots.windows(self._slot_bytes):
            inside = [homes[slab] for slab in window.slabs]
            if not any(home.held for home in inside):
                floor = sum(home.chunks * home.slot_bytes / (next_stamp - home.heat / home.chunks) for home in inside)
                yield floor / window.size_bytes, window

    def _loss(self, window: SlabWindow) -> float:
        """Loss by the chunks themselves: what lies below them in other slabs goes too, and gains nothing."""
        going: set[Chunk] = set()
        left = self._inside(window.slabs)
        while left:
            chunk = left.pop()
            if chunk not in going:  # otherwise all below it has been seen too
                going.add(chunk)
                left.extend(chunk.children())
        return sum(chunk.space.slot_bytes / self._age(chunk) for chunk in going) / window.size_bytes

    def _age(self, chunk: Chunk) -> int:
        return self._books.last_stamp + 1 - chunk.touched

    def _inside(self, slabs: tuple[int, ...]) -> list[Chunk]:
        by_offset = self._books.by_offset
        return [by_offset[offset] for slab in slabs for offset in self._books.slots.used_slots(slab)]

    def _empty(self, slabs: tuple[int, ...]) -> None:
        for chunk in self._inside(slabs):
            if self._books.by_offset.get(chunk.location.offset) is chunk:  # not gone with its parent yet
                self._books.counters.evicted_chunks += self._books.evict(chunk)


def make_room_for_namespace(books: Books, max_namespaces: int) -> bool:
    """Whether there may be one more namespace, after dropping the one that was used the longest ago if need be.

    Only namespaces that no session has open are dropped. O(namespaces + chunks dropped).
    """
    if len(books.spaces) < max_namespaces:
        return True
    unused = [space for space in books.spaces.values() if not space.sessions and not space.writing + space.leaving]
    for space in sorted(unused, key=lambda space: space.touched):
        if any(chunk.holds for chunk in space.chunks.values()):
            continue  # a transfer of a session that has ended is still under way
        for chunk in [chunk for chunk in space.chunks.values() if chunk.parent is None]:
            books.counters.evicted_chunks += books.evict(chunk)
        return True
    return False
