"""The eviction policies by name."""

from __future__ import annotations

from typing import Any

from kvd.ledger.eviction import EvictionPolicy, LeafLru
from kvd.ledger.gittins import Gittins
from kvd.ledger.s3fifo import S3Fifo

DEFAULT = "gittins"
LRU = "lru"
NAMES = (DEFAULT, LRU, "s3fifo")


def make(name: str, *, recompute_weight: float = 0.0) -> EvictionPolicy[Any]:
    """A new policy for one tier, or one share of it. Only the default heeds ``recompute_weight``.

    ``ValueError`` when there is no policy of this name.
    """
    if name == DEFAULT:
        return Gittins(recompute_weight)
    if name == LRU:
        return LeafLru()
    if name == "s3fifo":
        return S3Fifo()
    raise ValueError(f"no policy is called {name!r}: there are {', '.join(NAMES)}")
