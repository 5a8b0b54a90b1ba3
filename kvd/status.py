"""What Stats answers, as JSON and as a page for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from google.protobuf.message import Message

from kvd.config import human_size
from kvd.wire.pb import kvd_pb2 as pb


def as_json(message: Message) -> dict[str, Any]:
    """Every field by its name in the protocol: numbers stay numbers, bytes become hexadecimal."""
    return {field.name: _plain(field, getattr(message, field.name)) for field in message.DESCRIPTOR.fields}


def _plain(field: Any, value: Any) -> Any:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return {key: value[key] for key in sorted(value)}
    if field.is_repeated:
        return [_one(item) for item in value]
    return _one(value)


def _one(value: Any) -> Any:
    if isinstance(value, Message):
        return as_json(value)
    return value.hex() if isinstance(value, bytes) else value


def as_text(stats: pb.StatsResponse) -> str:
    """A page for people."""
    pool, count = stats.pool, stats.counters
    used = pool.bytes - pool.free_bytes
    lines = [
        f"kvd {stats.version}, {stats.state} for {_duration(stats.uptime_s)}",
        *(f"  {endpoint}" for endpoint in stats.endpoints),
        "",
        f"pool     {human_size(pool.bytes)}, {pool.backing}, {human_size(pool.populated_bytes)} taken from the system",
        f"         {human_size(pool.ready_bytes)} stored, {human_size(pool.writing_bytes)} being written, "
        f"{human_size(pool.quarantined_bytes)} in quarantine, {human_size(pool.idle_slot_bytes)} in idle slots, "
        f"{human_size(pool.bytes - used)} free",
        f"lookups  {count['lookups']}: {count['hit_chunks']} of {count['asked_chunks']} chunks found"
        + (f" ({100 * count['hit_chunks'] / count['asked_chunks']:.1f} %)" if count["asked_chunks"] else ""),
        f"stores   {count['stored_chunks']} chunks stored, {count['present_chunks']} were there, "
        f"{count['busy_chunks']} were being written, {count['no_room_chunks']} found no room, "
        f"{count['failed_chunks'] + count['aborted_chunks']} given up",
        f"evicted  {count['evicted_chunks']} chunks; {count['checksum_failures']} checksum failures",
    ]
    lines += _table(
        ("tenant", "chunks", "bytes", "sessions"),
        [(t.tenant, t.chunks, human_size(t.bytes), t.sessions) for t in stats.tenants],
    )
    lines += _table(
        ("namespace", "tenant", "model", "chunk", "chunks", "bytes"),
        [
            (n.namespace_id.hex()[:12], n.tenant, n.model, human_size(n.chunk_bytes), n.chunks, human_size(n.bytes))
            for n in stats.namespaces
        ],
    )
    lines += _table(
        ("session", "peer", "tenant", "path", "age", "reading", "writing", "processes"),
        [
            (s.client or "-", s.peer, s.tenant, s.path, _duration(s.age_s), s.read_leases, s.write_leases, s.members)
            for s in stats.sessions
        ],
    )
    return "\n".join(lines)


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """The rows under their head, columns aligned; nothing when there are no rows."""
    cells = [[str(cell) for cell in row] for row in rows]
    if not cells:
        return []
    widths = [max(len(row[column]) for row in [list(head), *cells]) for column in range(len(head))]
    return [
        "",
        *(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in [list(head), *cells]
        ),
    ]


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = int(seconds // 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1440} days"
