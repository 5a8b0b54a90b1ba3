"""The audit of the disks' books: records against namespaces, extents, chunks and the policy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

from kvd.ledger.audit_tree import audit_tree
from kvd.ledger.books import Books
from kvd.ledger.index import Space
from kvd.ledger.records import Record, Records
from kvd.ledger.tiers import Tiers


def audit_disks(books: Books, tiers: Tiers) -> Iterator[str]:
    """What does not agree; nothing when there are no disks. O(records)."""
    records = tiers.records
    if records is None:
        return
    held: Counter[Record] = Counter(tiers.promoting.reading())
    held.update(record for space in books.spaces.values() for record in space.records.values() if record.moving)
    if records.pins is not None:
        for named in records.pins.named.values():
            held.update(named)
    known = 0
    for space in books.spaces.values():
        known += len(space.records)
        yield from _space(records, space, held)
    if known != records.count:
        yield f"{records.count} records counted, {known} in the namespaces"
    yield from _extents(books, records)
    yield from records.extents.audit()
    spaces = books.spaces.values()
    yield from audit_tree(
        "disks",
        records,
        {space: set(space.records.values()) for space in spaces},
        {space: space.record_bytes for space in spaces},
    )


def _name(record: Record) -> str:
    return f"record {record.key.hex()[:16]} at {tuple(record.place)}"


def _space(records: Records, space: Space, held: Counter[Record]) -> Iterator[str]:
    below: Counter[Record] = Counter()
    order = [record for record in space.records.values() if record.parent is None]
    for record in order:
        order.extend(record.children())
        if len(order) > len(space.records):
            break
    if len(order) != len(space.records):
        yield f"{len(order)} records can be reached from the roots, {len(space.records)} are in the namespace"
        return
    for record in reversed(order):
        if space.records.get(record.key) is not record or record.space is not space:
            yield f"{_name(record)} is not in its namespace under its key"
        if record.holds != held[record] + below[record]:
            yield f"{_name(record)}: {record.holds} holds counted, {held[record] + below[record]} found"
        if record.holds and record.parent is not None:
            below[record.parent] += 1
        if record.condemned and not record.holds and (record.parent is None or not record.parent.condemned):
            yield f"{_name(record)} is condemned and nobody holds it"
        may = not record.holds and record.first_child is None
        if may is not (record in records.policy):
            yield f"{_name(record)} {'may' if may else 'may not'} be evicted, the policy says otherwise"
    for chunk in space.chunks.values():
        if chunk.record is not None and space.records.get(chunk.key) is not chunk.record:
            yield f"chunk {chunk.key.hex()[:16]} has a record that is not in the books"


def _extents(books: Books, records: Records) -> Iterator[str]:
    where: dict[tuple[int, int], set[Record]] = {}
    for space in books.spaces.values():
        for record in space.records.values():
            where.setdefault((record.place.drive, record.place.extent), set()).add(record)
    if where != records.by_extent:
        yield "the extents' lists of records are not those of the records' places"
    for (drive, extent), inside in where.items():
        ends = sorted((record.place.offset, record.place.offset + record.place.record_bytes) for record in inside)
        if any(end > begin for (_, end), (begin, _) in pairwise(ends)):
            yield f"records of extent {extent} on drive {drive} overlap"
        if sum(record.place.record_bytes for record in inside) > records.extents.live_in(drive, extent):
            yield f"extent {extent} on drive {drive} counts fewer live bytes than its records have"
