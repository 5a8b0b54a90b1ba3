"""Protobuf messages to the daemon's own types and back."""

from __future__ import annotations

from collections.abc import Iterable
from types import MappingProxyType
from typing import cast

from kvd.types import Location, ReserveResult, Stripe
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


def location(found: Location) -> pb.Location:
    """A slot's place."""
    return pb.Location(segment=found.segment, offset=found.offset, generation=found.generation)


def reserve_result(result: ReserveResult) -> pb.ReserveResult:
    """The outcome of one item of Reserve."""
    status = cast(pb.ReserveStatus, int(result.status))
    if result.location is None:
        return pb.ReserveResult(status=status)
    return pb.ReserveResult(status=status, location=location(result.location))
