"""What makes bytes interchangeable: the identity of a namespace, its canonical form and its id.

The canonical form is the JSON text (UTF-8, sorted keys, no spaces) of the tenant and of every field of the
identity. Its SHA-256 is the namespace id. The daemon computes the id itself, with the tenant that *it* has
established, so two tenants can never meet in one namespace whatever they send.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

#: Version of the chunk layout ``[layer][block][head][page]`` (DESIGN, section 3). Part of every identity.
FORMAT_VERSION = 1

KEY_BYTES = 32
NAMESPACE_ID_BYTES = 32

#: Longest text accepted in one field of an identity, characters.
MAX_FIELD_CHARS = 1024
#: Most entries accepted in ``Identity.extra``.
MAX_EXTRA = 64


@dataclass(frozen=True)
class Identity:
    """Everything that must be equal for the bytes of two engines to be interchangeable.

    ``num_layers`` x ``num_kv_heads`` is also the grid on which stripes are counted. A program that stores
    plain bytes uses one layer and one head.
    """

    model: str
    weights_revision: str
    kv_dtype: str = ""
    attention_backend: str = ""
    platform: str = ""
    num_layers: int = 1
    num_kv_heads: int = 1
    head_sizes: str = ""
    block_tokens: int = 1
    chunk_blocks: int = 1
    page_layout: str = ""
    hash_algorithm: str = ""
    format_version: int = FORMAT_VERSION
    extra: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    def canonical(self, tenant: str) -> bytes:
        """The canonical form of this identity for ``tenant``."""
        fields = {f: getattr(self, f) for f in self.__dataclass_fields__ if f != "extra"}
        message = {"tenant": tenant, "identity": fields, "extra": dict(self.extra)}
        return json.dumps(message, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()

    def namespace_id(self, tenant: str) -> bytes:
        """SHA-256 of the canonical form, 32 bytes."""
        return hashlib.sha256(self.canonical(tenant)).digest()
