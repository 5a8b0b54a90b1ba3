"""The bytes: shared memory for the slots, the tables that say what they hold, and what of it a new daemon finds again.

    pool.open_pool()          the one way in: an anonymous pool, or the one in a directory, taken over or made anew
      segment.Segment         the mapped bytes; publish and retract; backing.py says where they come from
        generations           the table that every client reads
      slot_table.SlotTable    the journal of the books (``SlotJournal``), in the format of slot_format.py
      holders.Holders         who of a former life may still be writing
      former.Former           what a new life begins with: entries that can be believed
      numa                    which part of it lies on which memory node, where there are several
    slabs.SlabAllocator       which bytes are in use; ``claim`` rebuilds it from the entries
    files.py                  names, owners and modes of the files

A new life: ``open_pool``; claim every entry in the allocator; chunks for those that are ready, published again;
quarantine for the others until ``holders.gone(entry.life)``. An entry that the books do not want they retract and free
like any other. New generations begin above ``former.last_generation``.
"""

from __future__ import annotations

#: Where a crash test can end the daemon (``kvd.failpoints``).
FAILPOINTS = (
    "pool.create.before",
    "pool.create.named",
    "pool.create.after",
    "pool.recovery.before",
    "pool.recovery.words",
    "pool.recovery.entries",
    "pool.recovery.after",
    "pool.describe.before",
    "pool.describe.after",
    "pool.forget.before",
    "pool.forget.after",
    "pool.grow.before",
    "pool.grow.after",
    "pool.granted.before",
    "pool.granted.body",
    "pool.granted.after",
    "pool.publish.before",
    "pool.publish.after",
    "pool.ready.before",
    "pool.ready.after",
    "pool.sealed.before",
    "pool.sealed.checksum",
    "pool.sealed.after",
    "pool.retract.before",
    "pool.retract.after",
    "pool.freed.before",
    "pool.freed.after",
)
