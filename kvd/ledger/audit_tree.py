"""The audit of what is alike in every tier: shares, pins and times to live."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Set
from typing import TypeVar

from kvd.ledger.index import Space
from kvd.ledger.node import Node
from kvd.ledger.pins import Pinned
from kvd.ledger.shares import Account, SharedPolicy
from kvd.ledger.tree import Tree

N = TypeVar("N", bound=Node)


def audit_tree(
    name: str, tree: Tree[N], inside: Mapping[Space, Set[N]], used_bytes: Mapping[Space, int]
) -> Iterator[str]:
    """What does not agree in one tier. ``inside``: the nodes that its policy knows; ``used_bytes``: what is charged.

    O(nodes).
    """
    for nodes in inside.values():
        for node in nodes:
            if node.parent is not None and tree.expired(node.parent) and not tree.expired(node):
                yield f"{name}: {node.key.hex()[:16]} has not expired, its parent has"
    if tree.shares is not None:
        yield from _shares(name, tree.shares, inside, used_bytes)
    if tree.pins is not None:
        yield from _pins(name, tree.pins, inside)


def _shares(
    name: str, shares: SharedPolicy[N], inside: Mapping[Space, Set[N]], used_bytes: Mapping[Space, int]
) -> Iterator[str]:
    charged: Counter[Account[N]] = Counter()
    for space, size_bytes in used_bytes.items():
        for account in shares.accounts(space.namespace):
            charged[account] += size_bytes
    for account in shares.everybody:
        if account.used_bytes != charged[account]:
            yield f"{name}: {account.used_bytes} bytes charged to {account.share}, {charged[account]} found"
    counted: Counter[int] = Counter()
    for account in shares.everybody:
        counted.update(account.sizes)
    if counted != Counter(node.size_class for nodes in inside.values() for node in nodes):
        yield f"{name}: the shares count their nodes wrongly"


def _pins(name: str, pins: Pinned[N], inside: Mapping[Space, Set[N]]) -> Iterator[str]:
    reasons: Counter[N] = Counter()
    for pin, named in pins.named.items():
        reasons.update(named)
        if pin not in pins.wishes or not named:
            yield f"{name}: something is pinned that nobody wishes to be"
        for node in named:
            namespace = node.space.namespace
            if (namespace.tenant, namespace.id) != pin[:2] or pin.key not in (b"", node.key):
                yield f"{name}: {node.key.hex()[:16]} is pinned by a pin of something else"
            if node not in inside.get(node.space, ()):
                yield f"{name}: {node.key.hex()[:16]} is pinned and not there"
    kept = list(reasons)
    for node in kept:
        if node.parent is not None:
            if node.parent not in reasons:
                kept.append(node.parent)
            reasons[node.parent] += 1
    if reasons != pins.reasons:
        yield f"{name}: the reasons of pinned nodes are counted wrongly"
    if Counter(node.space for node in reasons) != pins.counts:
        yield f"{name}: pinned nodes are counted wrongly"
    if pins.bytes != sum(node.space.slot_bytes for node in reasons):
        yield f"{name}: {pins.bytes} bytes counted as pinned, another number is"
