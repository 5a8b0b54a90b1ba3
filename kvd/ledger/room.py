"""Making room: which chunks go when a slot is needed and none is free."""

from __future__ import annotations

from collections.abc import Iterator

from kvd.ledger.books import Books, SlabWindow
from kvd.ledger.chunk import Chunk
from kvd.ledger.index import Space
from kvd.types import Namespace

#: Windows that may be emptied and whose chunks are looked at one by one, the coldest by their slabs' mean ages first.
_WINDOWS_WEIGHED = 4
#: Chunks that make way for one slot inside a hard share, at most. More than one only where slots differ in size.
_FOR_ONE_SLOT = 64
#: Slots freed ahead in one round of ``keep_free``, at most, and the part of the pool that they may be.
_AHEAD = 256
_AHEAD_SHARE = 0.01
#: A pool with less than this in no slab is full: what is freed ahead is not for just anybody.
_ROOM_SHARE = 2 * _AHEAD_SHARE


class RoomMaker:
    """Gets slots for the items of one Reserve. Made anew for each request: it remembers what has been tried.

    Two ways to make room are compared by what they lose per byte that they gain: evicting the next victim of the same
    slot size, or emptying a window of slabs of other sizes. The chance that a chunk is wanted again is taken to be
    inverse to its age, the uses of chunks since its own last one; what is free already loses nothing. Scanning the
    windows is O(slabs), so it is done once per request and again only when the slot size has no victim left, or its
    victim is worth more than who comes.

    Where shares say what may be taken for whom (``kvd.ledger.shares``), this is asked first of everything. Of the slots
    that are free, one on the memory node ``near`` is preferred; who goes for one has nothing to do with it.
    """

    def __init__(self, books: Books, space: Space, near: int | None = None) -> None:
        self._books = books
        self._space = space
        self._near = near
        self._slot_bytes = space.slot_bytes
        self._ample_bytes = books.slots.total_bytes * _ROOM_SHARE
        self._compared = False
        self._refused = False
        self._full = False
        self._next: Chunk | None = None  # the victim, when that is known
        self._slabs: tuple[int, ...] = ()  # what is emptied instead of it, when that is known
        books.settle()

    def slot(self, newcomer: bytes | None = None, parent: Chunk | None = None) -> int | None:
        """Offset of a slot, made free by eviction if need be; None when nothing can be evicted now.

        None as well when the policy says that ``newcomer``, below ``parent``, is worth less than who would go for it.
        """
        self._next, self._slabs = None, ()
        if self._full or (newcomer is not None and not self._admits(newcomer, parent)):
            return None
        offset = None
        if self._within_hard_share():
            if not self._slabs:
                offset = self._allocate()
            if offset is None:
                offset = self._make()
        self._full = offset is None
        if not self._full:
            self._books.wanted[self._space] += 1
        return offset

    def _admits(self, newcomer: bytes, parent: Chunk | None) -> bool:
        """Whether ``newcomer`` is let in: always while there is room, and always on its way to a disk.

        Otherwise it is compared with who would go for it; of another size as well, or chunks of a size that comes late
        would only ever have the places of each other.
        """
        books = self._books
        if books.records is not None or books.slots.room_bytes(self._slot_bytes) > self._ample_bytes:
            return True
        victim = self._next = self._victim()
        if victim is None or books.policy.admits(self._space, newcomer, parent, victim):
            return True
        if not self._refused:
            slabs = self._coldest_window(victim)
            if all(books.policy.admits(self._space, newcomer, parent, chunk) for chunk in self._inside(slabs)):
                self._slabs = slabs
            self._refused = not self._slabs
        return bool(self._slabs)

    def _within_hard_share(self) -> bool:
        """Whether there may be one more slot of the namespace, after evicting others in its share if need be."""
        shares, namespace = self._books.shares, self._space.namespace
        if shares is None:
            return True
        for _ in range(_FOR_ONE_SLOT):
            if shares.fits(namespace, self._slot_bytes):
                return True
            # Of any size: else a size that comes late would never get more of the share than it has.
            victim = shares.victim(namespace, self._slot_bytes, None)
            if victim is None:
                return False
            self._evict(victim)
        return shares.fits(namespace, self._slot_bytes)

    def _allocate(self) -> int | None:
        return self._books.slots.allocate(self._slot_bytes, self._near)

    def _make(self) -> int | None:
        """A slot made free, when there is none."""
        victim = self._next or self._victim()
        slabs = self._slabs
        if not slabs and (victim is None or not self._compared):
            self._compared = True
            slabs = self._coldest_window(victim)
        if slabs:
            self._empty(slabs)
            return self._allocate()
        if victim is None:
            return None
        self._books.counters.evicted_chunks += 1
        return self._books.replace(victim)

    def _victim(self) -> Chunk | None:
        shares = self._books.shares
        if shares is None:
            return self._books.policy.coldest(self._slot_bytes)
        return shares.victim(self._space.namespace, self._slot_bytes, self._slot_bytes)

    def _coldest_window(self, victim: Chunk | None) -> tuple[int, ...]:
        """The slabs of the window that loses least, if that is less than ``victim`` loses; otherwise nothing."""
        least = (True, float("inf")) if victim is None else (self._last_resort(victim), 1.0 / self._age(victim))
        best: tuple[int, ...] = ()
        weighed = 0
        for floor, window in sorted(self._emptiable()):
            if weighed == _WINDOWS_WEIGHED or (False, floor) >= least:
                break
            loss = self._loss(window)
            if loss is not None:
                weighed += 1
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

    def _loss(self, window: SlabWindow) -> tuple[bool, float] | None:
        """Loss by the chunks themselves: what lies below them in other slabs goes too, and gains nothing.

        Before it, whether only the last resort would take them; None when shares forbid it altogether.
        """
        shares = self._books.shares
        taking = None if shares is None else shares.taking(self._space.namespace)
        going: set[Chunk] = set()
        left = self._inside(window.slabs)
        while left:
            chunk = left.pop()
            if chunk in going:
                continue  # all below it has been seen too
            going.add(chunk)
            left.extend(chunk.children())
            if taking is not None and shares is not None:
                space = chunk.space
                if not taking.add(shares.accounts(space.namespace), space.slot_bytes):
                    return None
        loss = sum(chunk.space.slot_bytes / self._age(chunk) for chunk in going) / window.size_bytes
        return taking is not None and taking.last_resort, loss

    def _last_resort(self, victim: Chunk) -> bool:
        shares = self._books.shares
        if shares is None:
            return False
        taking = shares.taking(self._space.namespace)
        taking.add(shares.accounts(victim.space.namespace), self._slot_bytes)
        return taking.last_resort

    def _age(self, chunk: Chunk) -> int:
        return self._books.last_stamp + 1 - chunk.touched

    def _inside(self, slabs: tuple[int, ...]) -> list[Chunk]:
        by_offset = self._books.by_offset
        return [by_offset[offset] for slab in slabs for offset in self._books.slots.used_slots(slab)]

    def _empty(self, slabs: tuple[int, ...]) -> None:
        for chunk in self._inside(slabs):
            if self._books.by_offset.get(chunk.location.offset) is chunk:  # not gone with its parent yet
                self._evict(chunk)

    def _evict(self, chunk: Chunk) -> None:
        self._next = None
        self._books.counters.evicted_chunks += self._books.evict(chunk)


def keep_free(books: Books) -> None:
    """A round of the background: what was asked for in the time since the last one is made free ahead of the next.

    So as many slots are free as are wanted from one round to the next, of the sizes and inside the shares of those who
    want them, within a small bound; and a pool that nobody stores into stays full. A share that was made smaller also
    gives back some of what it has too much. O(1) when nothing was asked for, or more is free than that bound.
    """
    wanted = dict(books.wanted)
    most_bytes = int(books.slots.total_bytes * _AHEAD_SHARE)
    left = _AHEAD
    if books.slots.free_bytes < most_bytes:
        for space, count in wanted.items():
            if books.spaces.get(space.namespace.id) is space:
                ahead = min(count, left, most_bytes // space.slot_bytes)
                _free_ahead(books, space, ahead)
                left -= ahead
                most_bytes -= ahead * space.slot_bytes
    books.wanted.clear()
    books.settle()
    while books.shares is not None and left > 0 and (chunk := books.shares.beyond()) is not None:
        books.counters.evicted_chunks += books.evict(chunk)
        left -= 1


def _free_ahead(books: Books, space: Space, count: int) -> None:
    """Let at least ``count`` slots of ``space`` be free, if that many can be: take them, and give them back."""
    room = RoomMaker(books, space)
    taken: list[int] = []
    while len(taken) < count and (offset := room.slot()) is not None:
        books.charge(space, space.slot_bytes)
        taken.append(offset)
    for offset in taken:
        books.slots.free(offset)
        books.charge(space, -space.slot_bytes)


def make_room_for_namespace(books: Books, newcomer: Namespace, max_namespaces: int) -> bool:
    """Whether there may be one more namespace, after dropping the one that was used the longest ago if need be.

    Only namespaces that no session has open are dropped, and none with anything pinned, held, or kept by a share. Their
    records on the disks go as well. O(namespaces + chunks dropped).
    """
    if len(books.spaces) < max_namespaces:
        return True
    unused = [space for space in books.spaces.values() if not space.sessions and not space.writing + space.leaving]
    for space in sorted(unused, key=lambda space: space.touched):
        held = any(chunk.holds for chunk in space.chunks.values()) or any(
            record.holds for record in space.records.values()
        )
        if not held and _may_take_all(books, newcomer, space):
            _drop_all(books, space)
            return True
    return False


def _may_take_all(books: Books, newcomer: Namespace, space: Space) -> bool:
    """Whether shares allow that all of ``space`` goes for ``newcomer``."""
    pool, disks = books.shares, None if books.records is None else books.records.shares
    return (
        pool is None or pool.taking(newcomer).add(pool.accounts(space.namespace), space.slots * space.slot_bytes)
    ) and (disks is None or disks.taking(newcomer).add(disks.accounts(space.namespace), space.record_bytes))


def _drop_all(books: Books, space: Space) -> None:
    for chunk in [chunk for chunk in space.chunks.values() if chunk.parent is None]:
        books.counters.evicted_chunks += books.evict(chunk)
    if books.records is not None:
        for record in [record for record in space.records.values() if record.parent is None]:
            books.counters.dropped_records += books.records.drop(record)
    books.forget_if_empty(space)
