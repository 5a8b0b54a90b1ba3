"""Pins: wishes that a prefix, or all of a namespace, stays.

A pin outlives what it is about: it is kept by name, takes effect on what is there, and on whatever is stored later. In
the books it is a hold, so nothing else has to know of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from kvd.ledger.index import Space
from kvd.ledger.node import Node
from kvd.ledger.terms import Counters
from kvd.ledger.tree import Tree
from kvd.types import Pin
from kvd.wire.errors import InvalidRequest, LimitReached
from kvd.wire.identity import KEY_BYTES, NAMESPACE_ID_BYTES

if TYPE_CHECKING:
    from kvd.ledger.books import Books

N = TypeVar("N", bound=Node)

MAX_PINS = 4096
MAX_PINS_PER_TENANT = 1024
#: Part of a tier that may be pinned.
MAX_SHARE = 0.5


class PinFigures(NamedTuple):
    """A pin, how many chunks it covers now in whatever tier, and the bytes of those in the pool."""

    pin: Pin
    chunks: int
    bytes: int


class Pinned(Generic[N]):
    """What pins keep in one tier: the nodes that they name, and all above them, which the holds of these keep."""

    def __init__(
        self,
        tree: Tree[N],
        index: Callable[[Space], Mapping[bytes, N]],
        may_be: Callable[[N], bool],
        tier_bytes: Callable[[], int],
        counters: Counters,
    ) -> None:
        """``index``: the nodes of a namespace by key. ``may_be``: whether a node can be pinned: it is there, and not
        about to go. ``tier_bytes``: the size of the tier."""
        self._tree = tree
        self._index = index
        self._may_be = may_be
        self._tier_bytes = tier_bytes
        self._counters = counters
        self.wishes: Mapping[Pin, None] = {}
        #: By pin, the nodes that it names.
        self.named: dict[Pin, set[N]] = {}
        #: By node that stays, the reasons: pins that name it, and children that stay.
        self.reasons: dict[N, int] = {}
        #: Of the slots that these nodes take in the pool, or took, wherever they lie.
        self.bytes = 0
        #: How many nodes stay, by namespace.
        self.counts: Counter[Space] = Counter()

    def __contains__(self, node: N) -> bool:
        """Whether a pin keeps ``node``."""
        return node in self.reasons

    def entered(self, node: N) -> None:
        """``node`` is in the tier from now on."""
        if self.wishes:
            for pin in _naming(node):
                if pin in self.wishes:
                    self._try(pin, node)

    def leaves(self, node: N) -> None:
        """``node`` has to go, whether it is pinned or not; what is below it has gone, or goes next."""
        if node in self.reasons:
            for pin in _naming(node):
                if node in self.named.get(pin, ()):
                    self._release(pin, node)

    def targets(self, pin: Pin, space: Space | None) -> list[N]:
        """The nodes that ``pin`` names now."""
        if space is None or space.namespace.tenant != pin.tenant:
            return []
        index = self._index(space)
        named = [index[pin.key]] if pin.key in index else [] if pin.key else list(index.values())
        return [node for node in named if self._may_be(node)]

    def fits(self, nodes: Iterable[N]) -> bool:
        """Whether all of ``nodes`` may be pinned beside what is."""
        new: set[N] = set()
        for node in nodes:
            new.update(self._unpinned_path(node, new))
        return self._fits(new)

    def pin(self, pin: Pin, nodes: Iterable[N]) -> None:
        """``pin`` names ``nodes``; as many of them are pinned as may be."""
        for node in nodes:
            self._try(pin, node)

    def unpin(self, pin: Pin) -> None:
        """``pin`` is not wished any more."""
        for node in list(self.named.get(pin, ())):
            self._release(pin, node)

    def covers(self, pin: Pin) -> set[N]:
        """What stays because of ``pin``."""
        covered: set[N] = set()
        for node in self.named.get(pin, ()):
            at: N | None = node
            while at is not None and at not in covered:
                covered.add(at)
                at = at.parent
        return covered

    def _try(self, pin: Pin, node: N) -> None:
        named = self.named.setdefault(pin, set())
        if node in named:
            return
        if not self._fits(self._unpinned_path(node, ())):
            self._counters.unpinned_chunks += 1
            if not named:
                del self.named[pin]
            return
        named.add(node)
        self._tree.hold(node)
        at: N | None = node
        while at is not None:
            self.reasons[at] = reasons = self.reasons.get(at, 0) + 1
            if reasons > 1:
                return
            self.bytes += at.space.slot_bytes
            self.counts[at.space] += 1
            at = at.parent

    def _release(self, pin: Pin, node: N) -> None:
        named = self.named[pin]
        named.discard(node)
        if not named:
            del self.named[pin]
        at: N | None = node
        while at is not None:
            self.reasons[at] -= 1
            if self.reasons[at]:
                break
            del self.reasons[at]
            self.bytes -= at.space.slot_bytes
            self.counts[at.space] -= 1
            if not self.counts[at.space]:
                del self.counts[at.space]
            at = at.parent
        self._tree.unhold(node)

    def _unpinned_path(self, node: N, known: Container[N]) -> list[N]:
        """``node`` and those above it that nothing pins yet and that are not ``known``."""
        path = []
        at: N | None = node
        while at is not None and at not in self.reasons and at not in known:
            path.append(at)
            at = at.parent
        return path

    def _fits(self, nodes: Iterable[N]) -> bool:
        return self.bytes + sum(node.space.slot_bytes for node in nodes) <= self._tier_bytes() * MAX_SHARE


def _naming(node: Node) -> tuple[Pin, Pin]:
    """The two pins that would name ``node``."""
    namespace = node.space.namespace
    return Pin(namespace.tenant, namespace.id, node.key), Pin(namespace.tenant, namespace.id, b"")


class Pins:
    """The wishes of all tenants. ``spaces``: the namespaces that there are now, by id."""

    def __init__(self, spaces: Mapping[bytes, Space]) -> None:
        self._spaces = spaces
        self._wishes: dict[Pin, None] = {}
        self._tiers: list[Pinned[Any]] = []

    def keep_in(self, tier: Pinned[Any]) -> None:
        """Pins take effect in ``tier`` as well. It is empty yet."""
        tier.wishes = self._wishes
        self._tiers.append(tier)

    def pin(self, pin: Pin) -> int:
        """Wish for ``pin``; how many chunks it covers now.

        ``InvalidRequest`` when it names nothing that could be; ``LimitReached`` when there are too many pins, or it
        covers more than may be pinned now. Nothing has changed then.
        """
        if len(pin.namespace_id) != NAMESPACE_ID_BYTES or len(pin.key) not in (0, KEY_BYTES):
            raise InvalidRequest(f"a pin names a namespace of {NAMESPACE_ID_BYTES} bytes and a key of {KEY_BYTES} or 0")
        if pin not in self._wishes:
            self._check_number(pin.tenant)
        found = [(tier, tier.targets(pin, self._spaces.get(pin.namespace_id))) for tier in self._tiers]
        if not all(tier.fits(nodes) for tier, nodes in found):
            raise LimitReached(f"at most {MAX_SHARE:.0%} of the pool and of the disks may be pinned")
        self._wishes[pin] = None
        for tier, nodes in found:
            tier.pin(pin, nodes)
        return self.covers(pin).chunks

    def unpin(self, pin: Pin) -> int:
        """End the wish for ``pin``; how many chunks it covered, 0 when there was no such wish."""
        covered = self.covers(pin).chunks
        if pin in self._wishes:
            del self._wishes[pin]
            for tier in self._tiers:
                tier.unpin(pin)
        return covered

    def of(self, tenant: str) -> list[PinFigures]:
        """The pins of a tenant."""
        return [self.covers(pin) for pin in self._wishes if pin.tenant == tenant]

    def covers(self, pin: Pin) -> PinFigures:
        """What stays because of ``pin``. O(what that is)."""
        inside = [tier.covers(pin) for tier in self._tiers]
        keys = {node.key for nodes in inside for node in nodes}
        pooled = sum(node.space.slot_bytes for node in inside[0]) if inside else 0
        return PinFigures(pin, len(keys), pooled)

    def save(self) -> list[list[str]]:
        """All pins as plain data."""
        return [[pin.tenant, pin.namespace_id.hex(), pin.key.hex()] for pin in self._wishes]

    def load(self, saved: object) -> None:
        """Wish again for what ``save`` gave; it is believed as far as it makes sense. What is there already is pinned
        as far as may be."""
        for pin in _read(saved):
            try:
                self._check_number(pin.tenant)
            except LimitReached:
                continue
            if pin not in self._wishes:
                self._wishes[pin] = None
                for tier in self._tiers:
                    tier.pin(pin, tier.targets(pin, self._spaces.get(pin.namespace_id)))

    def _check_number(self, tenant: str) -> None:
        if len(self._wishes) >= MAX_PINS:
            raise LimitReached(f"there are {MAX_PINS} pins already: unpin something")
        if sum(pin.tenant == tenant for pin in self._wishes) >= MAX_PINS_PER_TENANT:
            raise LimitReached(f"the tenant has {MAX_PINS_PER_TENANT} pins already: unpin something")


def _read(saved: object) -> Iterator[Pin]:
    """The pins in what a file says."""
    for one in saved if isinstance(saved, list) else ():
        if not isinstance(one, list) or len(one) != 3 or not all(isinstance(text, str) for text in one):
            continue
        tenant, namespace, key = one
        try:
            pin = Pin(tenant, bytes.fromhex(namespace), bytes.fromhex(key))
        except ValueError:
            continue
        if len(pin.namespace_id) == NAMESPACE_ID_BYTES and len(pin.key) in (0, KEY_BYTES):
            yield pin


def pins_of(books: Books) -> Pins:
    """Pins for the pool, and for the disks if there are any. All of it is empty yet."""
    pins = Pins(books.spaces)
    pool_bytes, records = books.slots.total_bytes, books.records
    books.pins = Pinned(
        books,
        lambda space: space.chunks,
        lambda chunk: chunk.draft is None,
        lambda: pool_bytes,
        books.counters,
    )
    pins.keep_in(books.pins)
    if records is not None:
        extents = records.extents
        records.pins = Pinned(
            records,
            lambda space: space.records,
            lambda record: not record.condemned,
            lambda: extents.total_bytes,
            books.counters,
        )
        pins.keep_in(records.pins)
    return pins
