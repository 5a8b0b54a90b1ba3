"""Protobuf messages to the daemon's own types and back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import MappingProxyType
from typing import cast

from kvd.ledger.pins import PinFigures
from kvd.ledger.terms import DiskFigures, NamespaceFigures, PoolFigures, TenantFigures
from kvd.memory.slabs import NodeFigures
from kvd.types import DriveFigures, Location, LookupResult, Recovery, ReserveResult, Stripe
from kvd.wire.errors import InvalidRequest
from kvd.wire.identity import MAX_EXTRA, MAX_FIELD_CHARS, Identity
from kvd.wire.pb import kvd_pb2 as pb

MAX_CLIENT_NAME = 128
MAX_CLIENT_VERSION = 64


def client_label(hello: pb.Hello) -> str:
    """Name and version of a client, fit for logs and tables."""
    label = f"{hello.client_name[:MAX_CLIENT_NAME]} {hello.client_version[:MAX_CLIENT_VERSION]}".strip()
    return "".join(character if character.isprintable() else "?" for character in label)


def identity(message: pb.Identity) -> Identity:
    """The identity of a namespace. Raises InvalidRequest when a text or their number is out of bounds."""
    texts = [getattr(message, name) for name in _TEXTS]
    extra = dict(message.extra)
    if len(extra) > MAX_EXTRA:
        raise InvalidRequest(f"an identity may have {MAX_EXTRA} extra entries")
    if any(len(text) > MAX_FIELD_CHARS for text in (*texts, *extra, *extra.values())):
        raise InvalidRequest(f"a field of an identity may have {MAX_FIELD_CHARS} characters")
    return Identity(
        **dict(zip(_TEXTS, texts, strict=True)),
        **{name: getattr(message, name) for name in _NUMBERS},
        extra=MappingProxyType(extra),
    )


_TEXTS = (
    "model",
    "weights_revision",
    "kv_dtype",
    "attention_backend",
    "platform",
    "head_sizes",
    "page_layout",
    "hash_algorithm",
)
_NUMBERS = ("format_version", "num_layers", "num_kv_heads", "block_tokens", "chunk_blocks")


def reserve_items(items: Iterable[pb.ReserveItem]) -> list[tuple[bytes, bytes]]:
    """(key, parent) of every item."""
    return [(item.key, item.parent) for item in items]


def commit_items(items: Iterable[pb.CommitItem]) -> list[tuple[bytes, list[Stripe]]]:
    """(key, stripes) of every item."""
    return [
        (item.key, [Stripe(s.layer_begin, s.layer_end, s.head_begin, s.head_end) for s in item.stripes])
        for item in items
    ]


def lookup_response(found: LookupResult) -> pb.LookupResponse:
    """The answer to Lookup."""
    segments, offsets, generations = _columns(found.locations)
    return pb.LookupResponse(
        offsets=offsets,
        generations=generations,
        segments=segments,
        promoting=found.promoting,
        writing=found.writing,
    )


def reserve_response(results: Sequence[ReserveResult]) -> pb.ReserveResponse:
    """The answer to Reserve."""
    segments, offsets, generations = _columns([at.location for at in results if at.location is not None])
    statuses = cast(list[pb.ReserveStatus], [result.status for result in results])
    return pb.ReserveResponse(statuses=statuses, offsets=offsets, generations=generations, segments=segments)


def _columns(locations: Sequence[Location]) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
    """(segments, or nothing when all are 0; offsets; generations)."""
    if not locations:
        return (), (), ()
    segments, offsets, generations = zip(*locations, strict=True)
    return segments if any(segments) else (), offsets, generations


# ---------------------------------------------------------------- figures


def pool_stats(
    pool: PoolFigures, backing: str, populated_bytes: int, recovery: Recovery, nodes: Sequence[NodeFigures] = ()
) -> pb.PoolStats:
    """The pool, what the start found in it, and what of it lies on which of several memory nodes."""
    return pb.PoolStats(
        bytes=pool.bytes,
        free_bytes=pool.free_bytes,
        ready_bytes=pool.ready_bytes,
        writing_bytes=pool.writing_bytes,
        quarantined_bytes=pool.quarantined_bytes,
        idle_slot_bytes=pool.idle_slot_bytes,
        backing=backing,
        populated_bytes=populated_bytes,
        unverified_chunks=pool.unverified_chunks,
        recovery=pb.RecoveryStats(
            warm=recovery.warm,
            reason=recovery.reason,
            chunks=recovery.chunks,
            skipped=recovery.skipped,
            seconds=recovery.seconds,
        ),
        nodes=[pb.NodeStats(node=found.node, bytes=found.bytes, used_bytes=found.used_bytes) for found in nodes],
    )


def tenant_stats(tenant: TenantFigures) -> pb.TenantStats:
    """A tenant."""
    return pb.TenantStats(
        tenant=tenant.tenant,
        chunks=tenant.chunks,
        bytes=tenant.bytes,
        sessions=tenant.sessions,
        disk_chunks=tenant.disk_chunks,
        disk_bytes=tenant.disk_bytes,
        pinned_chunks=tenant.pinned_chunks,
        share=_share(tenant),
    )


def namespace_stats(namespace: NamespaceFigures) -> pb.NamespaceStats:
    """A namespace."""
    return pb.NamespaceStats(
        namespace_id=namespace.namespace_id,
        tenant=namespace.tenant,
        model=namespace.model,
        chunk_bytes=namespace.chunk_bytes,
        chunks=namespace.chunks,
        bytes=namespace.bytes,
        disk_chunks=namespace.disk_chunks,
        disk_bytes=namespace.disk_bytes,
        pinned_chunks=namespace.pinned_chunks,
        share=_share(namespace),
    )


def _share(held: TenantFigures | NamespaceFigures) -> pb.ShareStats | None:
    if held.soft_bytes is None and held.hard_bytes is None:
        return None
    return pb.ShareStats(soft_bytes=held.soft_bytes or 0, hard_bytes=held.hard_bytes or 0)


def pin_stats(found: PinFigures) -> pb.PinStats:
    """A pin, and what it covers."""
    namespace_id, key = found.pin.namespace_id, found.pin.key
    return pb.PinStats(namespace_id=namespace_id, key=key, chunks=found.chunks, bytes=found.bytes)


def disk_stats(
    disk: DiskFigures, drives: Sequence[DriveFigures], daily_bytes: int, written_today_bytes: int
) -> pb.DiskStats:
    """The disk tier and its drives."""
    return pb.DiskStats(
        records=disk.records,
        live_bytes=disk.live_bytes,
        total_bytes=disk.total_bytes,
        queue_chunks=disk.queue_chunks,
        queue_bytes=disk.queue_bytes,
        promoting_chunks=disk.promoting_chunks,
        daily_bytes=daily_bytes,
        written_today_bytes=written_today_bytes,
        drives=[_drive(drive) for drive in drives],
    )


def _drive(drive: DriveFigures) -> pb.DriveStats:
    scanning = drive.scanned_extents < drive.found_extents
    return pb.DriveStats(
        directory=drive.directory,
        state="degraded" if drive.reason else "scanning" if scanning else "up",
        reason=drive.reason,
        capacity_bytes=drive.capacity_bytes,
        live_bytes=drive.live_bytes,
        dead_bytes=drive.dead_bytes,
        free_bytes=drive.free_bytes,
        records=drive.records,
        extents=drive.extents,
        read_bytes=drive.read_bytes,
        written_bytes=drive.written_bytes,
        queue=drive.queue,
        scanned_extents=drive.scanned_extents,
        found_extents=drive.found_extents,
    )
