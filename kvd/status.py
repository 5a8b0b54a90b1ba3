"""What Stats answers, as JSON and as a page for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from google.protobuf.message import Message

from kvd.values import human_size
from kvd.wire.pb import kvd_pb2 as pb


def as_json(message: Message) -> dict[str, Any]:
    """Every field by its name in the protocol: numbers stay numbers, bytes become hexadecimal, what is absent null."""
    return {field.name: _plain(message, field) for field in message.DESCRIPTOR.fields}


def _plain(message: Message, field: Any) -> Any:
    if field.has_presence and not message.HasField(field.name):
        return None
    value = getattr(message, field.name)
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
    """A page for people. What is broken comes first."""
    lines = [
        f"kvd {stats.version}, {stats.state} for {_duration(stats.uptime_s)}",
        *(f"  {endpoint}" for endpoint in stats.endpoints),
        *_alarms(stats),
        "",
        _start(stats.pool.recovery),
        *_pool(stats.pool),
        *(_disk(stats) if stats.HasField("disk") else ()),
        *_requests(stats.counters),
    ]
    lines += _table(
        ("drive", "state", "used", "of", "records", "read", "written", "waiting"),
        [
            (d.directory, _drive_state(d), human_size(d.live_bytes + d.dead_bytes), human_size(d.capacity_bytes))
            + (d.records, human_size(d.read_bytes), human_size(d.written_bytes), d.queue)
            for d in stats.disk.drives
        ],
    )
    lines += _table(
        ("tenant", "chunks", "bytes", "on disk", "pinned", "share", "sessions"),
        [
            (t.tenant, t.chunks, human_size(t.bytes), human_size(t.disk_bytes), t.pinned_chunks, _share(t), t.sessions)
            for t in stats.tenants
        ],
    )
    lines += _table(
        ("namespace", "tenant", "model", "chunk", "chunks", "bytes", "on disk", "pinned", "share"),
        [
            (n.namespace_id.hex()[:12], n.tenant, n.model, human_size(n.chunk_bytes), n.chunks, human_size(n.bytes))
            + (human_size(n.disk_bytes), n.pinned_chunks, _share(n))
            for n in stats.namespaces
        ],
    )
    near = ("node",) if stats.pool.nodes else ()
    lines += _table(
        ("session", "peer", "tenant", "path", "age", "reading", "writing", "processes", *near),
        [
            (s.client or "-", s.peer, s.tenant, s.path, _duration(s.age_s), s.read_leases, s.write_leases, s.members)
            + tuple(s.numa_node if s.HasField("numa_node") else "-" for _ in near)
            for s in stats.sessions
        ],
    )
    return "\n".join(lines)


def pins_as_text(answer: pb.ListPinsResponse) -> str:
    """The pins, for people."""
    rows = [(p.namespace_id.hex(), p.key.hex() or "(all)", p.chunks, human_size(p.bytes)) for p in answer.pins]
    return "\n".join(_table(("namespace", "key", "chunks", "bytes"), rows)[1:]) or "nothing is pinned"


def _alarms(stats: pb.StatsResponse) -> list[str]:
    """What somebody should look at."""
    alarms = [
        f"DEGRADED {drive.directory}: {drive.reason}; it is not written to, and what lies there is not found"
        for drive in stats.disk.drives
        if drive.state == "degraded"
    ]
    if stats.counters["corrupt_chunks"]:
        alarms.append(f"CORRUPT  {stats.counters['corrupt_chunks']} chunks were not what was stored; none was served")
    return ["", *alarms] if alarms else []


def _start(recovery: pb.RecoveryStats) -> str:
    skipped = ", ".join(f"{count} {reason}" for reason, count in sorted(recovery.skipped.items()))
    if recovery.warm:
        text = f"warm: {recovery.chunks} chunks taken over in {recovery.seconds:.2f} s; {recovery.reason}"
    else:
        text = f"cold: {recovery.reason}"
    return f"start    {text}" + (f"; slots not taken over: {skipped}" if skipped else "")


def _pool(pool: pb.PoolStats) -> list[str]:
    lines = [
        f"pool     {human_size(pool.bytes)}, {pool.backing}, {human_size(pool.populated_bytes)} taken from the system",
        f"         {human_size(pool.ready_bytes)} stored, {human_size(pool.writing_bytes)} being written, "
        f"{human_size(pool.quarantined_bytes)} in quarantine, {human_size(pool.idle_slot_bytes)} in idle slots, "
        f"{human_size(pool.free_bytes)} free",
    ]
    if pool.nodes:
        nodes = (f"node {n.node}: {human_size(n.used_bytes)} of {human_size(n.bytes)} in use" for n in pool.nodes)
        lines.append(f"         {', '.join(nodes)}")
    if pool.unverified_chunks:
        lines.append(f"         {pool.unverified_chunks} chunks taken over are still to be checked")
    return lines


def _disk(stats: pb.StatsResponse) -> list[str]:
    disk, count = stats.disk, stats.counters
    written = sum(drive.written_bytes for drive in disk.drives)
    today = human_size(disk.written_today_bytes)
    if disk.daily_bytes:
        today += f" of {human_size(disk.daily_bytes)}"
    times = f", {written / count['spilled_bytes']:.2f} times what was spilled" if count["spilled_bytes"] else ""
    reasons = (
        ("budget", "over the budget"),
        ("backlog", "too many waiting"),
        ("admission", "used once"),
        ("large", "too large"),
        ("degraded", "drive degraded"),
        ("share", "kept for others"),
    )
    skipped = [f"{count[f'unspilled_{key}']} {text}" for key, text in reasons if count[f"unspilled_{key}"]]
    return [
        f"disk     {human_size(disk.live_bytes)} of {human_size(disk.total_bytes)} in {disk.records} records; "
        f"{disk.queue_chunks} chunks ({human_size(disk.queue_bytes)}) wait to be written, {disk.promoting_chunks} are "
        "being read",
        f"         {count['spilled_chunks']} chunks ({human_size(count['spilled_bytes'])}) spilled, "
        f"{count['promoted_chunks']} promoted, {count['promote_failures'] + count['unpromoted_no_room']} could not be; "
        f"{count['dropped_records']} records dropped for room",
        f"         {human_size(written)} written to the drives{times}; {today} today",
        *([f"         not spilled: {', '.join(skipped)}"] if skipped else []),
    ]


def _requests(count: Mapping[str, int]) -> list[str]:
    found = count["hit_chunks"] + count["disk_hit_chunks"]
    share = f" ({100 * found / count['asked_chunks']:.1f} %)" if count["asked_chunks"] else ""
    tiers = f"; {count['hit_chunks']} in the pool, {count['disk_hit_chunks']} on disk" if found else ""
    return [
        f"lookups  {count['lookups']}: {found} of {count['asked_chunks']} chunks found{share}{tiers}",
        f"stores   {count['stored_chunks']} chunks stored, {count['present_chunks']} were there, "
        f"{count['busy_chunks']} were being written, {count['no_room_chunks']} found no room, "
        f"{count['failed_chunks'] + count['aborted_chunks']} given up",
        f"evicted  {count['evicted_chunks']} chunks, {count['expired_chunks']} expired; "
        f"{count['checksum_failures']} checksum failures",
    ]


def _drive_state(drive: pb.DriveStats) -> str:
    if drive.state != "scanning":
        return str(drive.state)
    return f"scanning, {drive.scanned_extents} of {drive.found_extents} extents"


def _share(held: pb.TenantStats | pb.NamespaceStats) -> str:
    sizes = (("soft", held.share.soft_bytes), ("hard", held.share.hard_bytes))
    return " ".join(f"{name} {human_size(size)}" for name, size in sizes if size) or "-"


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
