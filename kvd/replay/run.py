"""Drives the daemon's own store and policies over a trace."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from kvd.ledger import policies
from kvd.ledger.eviction import EvictionPolicy
from kvd.ledger.spilling import Habits
from kvd.replay.tiers import CHUNK_BYTES, EqualRecords, EqualSlots, NoGenerations, carry_out
from kvd.replay.trace import Trace
from kvd.store import ChunkStore, Disks, Limits
from kvd.types import ROOT, ReserveStatus
from kvd.wire.identity import Identity

_UNBOUNDED = 1 << 60
_LIMITS = Limits(
    max_leases_per_session=_UNBOUNDED,
    max_leased_chunks_per_session=_UNBOUNDED,
    max_chunks_per_request=_UNBOUNDED,
    max_writing_share=1.0,
)
_SESSION = 1
_REPORT_EVERY = 64


@dataclass(frozen=True, slots=True)
class Setup:
    """One replay. Capacities in chunks; ``disk`` None: there are no disks. ``store_tails``: also blocks not full."""

    policy: str
    host: int
    disk: int | None = None
    recompute_weight: float = 0.0
    reused_only: bool = False
    store_tails: bool = False


class Replayed(NamedTuple):
    """What came of it. A block is a hit when all before it in its request are; ``saved`` is the work to compute the
    hits, a block behind n tokens counting 1 + n/32K. ``host_hits``: found in memory. ``spilled``: records written."""

    hits: int
    saved: float
    host_hits: int
    spilled: int


def keys_of(trace: Trace) -> list[bytes]:
    """The keys of the blocks, by number."""
    return [(number + 1).to_bytes(8, "little") * 4 for number in range(trace.unique)]


def replay(trace: Trace, keys: list[bytes], setup: Setup, progress: Callable[[float], None]) -> Replayed:
    """Every request looks its blocks up, stores what is missing and lets go."""
    now = [0.0]
    extents = None if setup.disk is None else EqualRecords(setup.disk)
    store = ChunkStore(
        EqualSlots(setup.host),
        NoGenerations(),
        _LIMITS,
        clock=lambda: now[0],
        policy=_policy(setup),
        disks=None if extents is None else Disks(extents, _policy(setup), None, Habits(setup.reused_only)),
    )
    orders = store.tiers.orders
    store.open_session(_SESSION, "replay")
    identity = Identity("replay", "", block_tokens=trace.block_tokens)
    space = store.open_namespace(_SESSION, identity, CHUNK_BYTES).id
    lease = hits = host_hits = 0
    saved = 0.0
    for number, (at, blocks, tail) in enumerate(trace.requests()):
        now[0] = at
        wanted = [keys[block] for block in blocks]
        if tail and not setup.store_tails:
            wanted.pop()
        lease += 1
        found, coming, _ = store.lookup(_SESSION, space, lease, wanted)
        leases = [lease]
        host_hits += len(found)
        while coming:
            carry_out(orders)
            lease += 1
            before = len(found)
            found, coming, _ = store.lookup(_SESSION, space, lease, wanted, again=True)
            leases.append(lease)
            if len(found) == before:
                break
        have = len(found)
        hits += have
        saved += work(have, trace.block_tokens)
        if have < len(wanted):
            lease += 1
            missing = wanted[have:]
            items = list(zip(missing, [wanted[have - 1] if have else ROOT, *missing], strict=False))
            results = store.reserve(_SESSION, space, lease, items)
            answers = zip(missing, results, strict=True)
            granted = [(key, ()) for key, result in answers if result.status is ReserveStatus.GRANTED]
            if granted:
                store.commit(_SESSION, space, lease, granted)
        store.release(_SESSION, leases)
        if extents is not None:
            carry_out(orders)
        if number % _REPORT_EVERY == 0:
            progress(number / len(trace))
    return Replayed(hits, saved, host_hits, store.counters.spilled_chunks)


def work(blocks: int, block_tokens: int) -> float:
    """To compute the first so many blocks of a request: one behind n tokens counts 1 + n/32K."""
    return blocks + blocks * (blocks - 1) / 2 * block_tokens / 32768


def work_of(trace: Trace) -> float:
    """To compute all blocks of all requests."""
    return sum(work(len(blocks), trace.block_tokens) for _, blocks, _ in trace.requests())


def _policy(setup: Setup) -> EvictionPolicy[Any]:
    return policies.make(setup.policy, recompute_weight=setup.recompute_weight)
