"""All the chunks there are for a soak, known to everyone without being told: keys, prefixes, and bytes from keys."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass

from kvd_client import ROOT, Identity

#: Sizes that share no divisor of note: even, odd, and as large as the slabs of a small pool.
CHUNK_SIZES = (64 << 10, 200_003, 1 << 20)

#: Chunks of a prefix. The first few are shared by several prefixes, as system prompts are.
PREFIX_CHUNKS = 8
SHARED_CHUNKS = 2
SHARERS = 4


@dataclass(frozen=True)
class Corpus:
    """Prefixes of one chunk size, ``total_bytes`` of different chunks or a little more."""

    chunk_bytes: int
    total_bytes: int

    @property
    def identity(self) -> Identity:
        """Of the namespace."""
        return Identity(model=f"soak {self.chunk_bytes}", weights_revision="1")

    @property
    def prefixes(self) -> int:
        """How many there are."""
        chunks_of_four = SHARED_CHUNKS + SHARERS * (PREFIX_CHUNKS - SHARED_CHUNKS)
        return -(-self.total_bytes // (chunks_of_four * self.chunk_bytes)) * SHARERS

    def keys(self, prefix: int) -> list[bytes]:
        """The keys of a prefix, first to last."""
        return [self._key(prefix, chunk) for chunk in range(PREFIX_CHUNKS)]

    def data(self, key: bytes) -> bytes:
        """The bytes of a chunk: no 8 of them are those of another chunk, or of another place in this one."""
        return random.Random(key + self.chunk_bytes.to_bytes(8, "little")).randbytes(self.chunk_bytes)

    def _key(self, prefix: int, chunk: int) -> bytes:
        owner = prefix // SHARERS * SHARERS if chunk < SHARED_CHUNKS else prefix
        return hashlib.sha256(f"{self.chunk_bytes} {owner} {chunk}".encode()).digest()


def chained(keys: list[bytes]) -> list[tuple[bytes, bytes]]:
    """Each key with its parent."""
    return list(zip(keys, [ROOT, *keys[:-1]], strict=True))


def corpora(total_bytes: int) -> list[Corpus]:
    """One for each chunk size, of ``total_bytes`` together."""
    return [Corpus(chunk_bytes, total_bytes // len(CHUNK_SIZES)) for chunk_bytes in CHUNK_SIZES]
