"""What a former life left in the pool: which entries of its slot table can be believed. Touches no payload.

Two files tell of every slot that somebody may use: its entry, and its word in the generation table, published after the
entry was written and retracted before the entry was freed. A process that ends in between leaves entries without words,
never words without entries. So a word that no entry explains is damage, like an entry that contradicts the checks
here: the slot's size is unknown, and somebody may be writing there. Nothing can be said of it but this: when no process
of a former life is left (``Holders.anybody``), nobody writes anywhere, and what is not believed is free; otherwise the
pool as a whole is not used, and those processes keep it to themselves until they let go.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import NamedTuple

from kvd.memory.generations import GenerationTable
from kvd.memory.slabs import SlabAllocator
from kvd.memory.slot_format import Entries
from kvd.types import Namespace, SlotEntry
from kvd.wire.lifeline import GRANULE_BYTES


class Former(NamedTuple):
    """What the new daemon's books begin with.

    ``entries``: ascending by offset, none overlapping, each where the allocator would put it, each with a namespace.
    Those that are not ready belong to the life ``entry.life``: see ``Holders.gone``. ``last_generation``: new ones
    must be higher. ``life``: of the last daemon. ``skipped``: slots that are not believed, by reason.
    """

    entries: list[SlotEntry]
    last_generation: int
    life: int
    namespaces: dict[bytes, Namespace]
    skipped: dict[str, int]


class Stock(NamedTuple):
    """What can be believed: entries by number in the table. What cannot, by reason, and how many of those slots
    somebody may be writing for all that is known."""

    entries: dict[int, SlotEntry]
    namespaces: dict[bytes, Namespace]
    skipped: dict[str, int]
    doubtful: int


def take_stock(found: Entries, table: GenerationTable, namespaces: dict[bytes, Namespace], pool_bytes: int) -> Stock:
    """Checks the entries against the pool, the generation table, the namespaces and each other."""
    skipped: dict[str, int] = {}
    within = {index: entry for index, entry in found.intact.items() if _within(entry, pool_bytes)}
    _count(skipped, "damaged", found.damaged)
    _count(skipped, "outside the pool", len(found.intact) - len(within))
    _count(skipped, "in use and unknown", table.strays(sorted(within.values(), key=attrgetter("offset"))))
    entries: dict[int, SlotEntry] = {}
    slots = SlabAllocator(pool_bytes)
    overlapping = _overlapping(within)
    free = 0
    for index, entry in within.items():
        # 0: not published yet, or retracted already.
        if table.word(table.segment, entry.offset) not in (0, entry.generation):
            _count(skipped, "of another generation", 1)
        elif index in overlapping:
            _count(skipped, "overlapping", 1)
        elif not _claimed(slots, entry):
            _count(skipped, "where no slot can lie", 1)
        elif problem := _problem(namespaces.get(entry.namespace_id), entry):
            _count(skipped, problem, 1)
            free += entry.ready
        else:
            entries[index] = entry
    return Stock(entries, namespaces, skipped, sum(skipped.values()) - free)


def _count(skipped: dict[str, int], reason: str, number: int) -> None:
    if number:
        skipped[reason] = skipped.get(reason, 0) + number


def _within(entry: SlotEntry, pool_bytes: int) -> bool:
    return 0 < entry.chunk_bytes <= pool_bytes - entry.offset and not entry.offset % GRANULE_BYTES


def _problem(namespace: Namespace | None, entry: SlotEntry) -> str:
    if namespace is None:
        return "of an unknown namespace"
    return "" if namespace.chunk_bytes == entry.chunk_bytes else "of another size than their namespace"


def _overlapping(entries: Mapping[int, SlotEntry]) -> set[int]:
    """Numbers of the entries whose slots have bytes in common with another one's."""
    found = set()
    end, last = 0, -1
    for index, entry in sorted(entries.items(), key=lambda item: item[1].offset):
        if entry.offset < end:
            found |= {last, index}
        if entry.offset + entry.chunk_bytes > end:
            end, last = entry.offset + entry.chunk_bytes, index
    return found


def _claimed(slots: SlabAllocator, entry: SlotEntry) -> bool:
    try:
        slots.claim(entry.offset, slots.slot_bytes(entry.chunk_bytes))
    except ValueError:
        return False
    return True
