"""Shares: what a tenant or a namespace may have of a tier, and what others may take from it.

A *soft* share is kept for its owner: others get no more than what is beyond it. A *hard* share is never exceeded, even
if the rest of the tier is idle. What nobody needs may be borrowed; so what is taken when room is needed comes

1. from inside a share that has reached its hard bound, if the newcomer belongs to such a one;
2. else from those beyond their soft shares, whoever has the coldest;
3. else from the newcomer's own.

Each share has an eviction policy of its own for what is charged to it and to no narrower share; what is charged to none
is under one more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Generic, TypeVar

from kvd.ledger.eviction import EvictionPolicy
from kvd.ledger.node import Node
from kvd.types import Namespace, Share

if TYPE_CHECKING:
    from kvd.ledger.index import Space

N = TypeVar("N", bound=Node)

#: More bytes than any tier has.
_ALL = float("inf")


class Account(Generic[N]):
    """One share in one tier, or (without a share) what is under none. ``scale``: see ``SharedPolicy``."""

    __slots__ = ("hard_bytes", "policy", "share", "sizes", "soft_bytes", "used_bytes")

    def __init__(self, policy: EvictionPolicy[N], share: Share | None = None, scale: float = 1.0) -> None:
        self.policy = policy
        self.share = share
        self.soft_bytes, self.hard_bytes = 0.0, _ALL
        if share is not None and share.soft_bytes is not None:
            self.soft_bytes = share.soft_bytes * scale
        if share is not None and share.hard_bytes is not None:
            self.hard_bytes = share.hard_bytes * scale
        #: Of all that is charged to it, whatever its state.
        self.used_bytes = 0
        #: How many nodes its policy knows, by size class.
        self.sizes: Counter[int] = Counter()


class Taking(Generic[N]):
    """What would be taken for a newcomer, piece by piece, and whether that is right. ``last_resort``: it would take the
    newcomer's own share below what is kept for it."""

    def __init__(self, own: tuple[Account[N], ...], inside: Iterable[Account[N]] = ()) -> None:
        """``own``: accounts of the newcomer. What goes has to go from those ``inside``, which get as much back."""
        self._own = own
        self._inside = tuple(inside)
        self._taken: dict[Account[N], int] = {}
        self.last_resort = False

    def add(self, accounts: tuple[Account[N], ...], size_bytes: int) -> bool:
        """One more piece, charged to ``accounts``; False when it must not be taken."""
        for account in self._inside:
            if account not in accounts:
                return False
        for account in accounts:
            taken = self._taken[account] = self._taken.get(account, 0) + size_bytes
            if account.used_bytes - taken < account.soft_bytes and account not in self._inside:
                if account not in self._own:
                    return False
                self.last_resort = True
        return True


class SharedPolicy(Generic[N]):
    """A policy of the ``EvictionPolicy`` protocol for a tier that is shared. The tier tells it by ``charge`` what
    everybody has.

    With k shares a victim costs O(k + log n), all else what the policies below cost.
    """

    def __init__(
        self,
        shares: Iterable[Share],
        make_policy: Callable[[], EvictionPolicy[N]],
        size: Callable[[N], int],
        scale: float = 1.0,
    ) -> None:
        """``size``: bytes that a node is charged with. ``scale``: size of the tier, as a multiple of the pool's."""
        self._size = size
        self._others = Account(make_policy())
        self.tenants: dict[str, Account[N]] = {}
        self.namespaces: dict[bytes, Account[N]] = {}
        for share in shares:
            account = Account(make_policy(), share, scale)
            if share.namespace_id is not None:
                self.namespaces[share.namespace_id] = account
            elif share.tenant is not None:
                self.tenants[share.tenant] = account
        #: Those who have no share are one of them.
        self.everybody = [self._others, *self.tenants.values(), *self.namespaces.values()]

    # ------------------------------------------------------------ the policy

    def enter(self, node: N) -> None:
        """``node`` is in the tier from now on."""
        account = self._account(node.space.namespace)
        account.sizes[node.size_class] += 1
        account.policy.enter(node)

    def leave(self, node: N) -> None:
        """``node`` has left the tier."""
        account = self._account(node.space.namespace)
        account.sizes[node.size_class] -= 1
        if not account.sizes[node.size_class]:
            del account.sizes[node.size_class]
        account.policy.leave(node)

    def add(self, node: N) -> None:
        """``node`` may be evicted from now on."""
        self._account(node.space.namespace).policy.add(node)

    def discard(self, node: N) -> None:
        """``node`` may not be evicted any more."""
        self._account(node.space.namespace).policy.discard(node)

    def touch(self, nodes: Sequence[N]) -> None:
        """A request has used ``nodes``."""
        if nodes:
            self._account(nodes[0].space.namespace).policy.touch(nodes)

    def coldest(self, size_class: int) -> N | None:
        """The next victim for a newcomer who has no share."""
        return self._best((), (), size_class)

    def admits(self, space: Space, key: bytes, parent: N | None, victim: N) -> bool:
        """Whether ``key`` may take the place of ``victim``; what another share has is taken without a comparison."""
        account = self._account(space.namespace)
        return account is not self._account(victim.space.namespace) or account.policy.admits(space, key, parent, victim)

    def missed(self, space: Space, key: bytes) -> None:
        """There was no place for ``key``."""
        self._account(space.namespace).policy.missed(space, key)

    def __contains__(self, node: object) -> bool:
        return isinstance(node, Node) and any(node in account.policy for account in self.everybody)

    def __len__(self) -> int:
        return sum(len(account.policy) for account in self.everybody)

    # ------------------------------------------------------------ the shares

    def accounts(self, namespace: Namespace) -> tuple[Account[N], ...]:
        """What ``namespace`` is charged to: its own share and that of its tenant, as far as there are any."""
        found = self.namespaces.get(namespace.id), self.tenants.get(namespace.tenant)
        return tuple(account for account in found if account is not None)

    def charge(self, namespace: Namespace, change_bytes: int) -> None:
        """``namespace`` has so much more in the tier, or (below 0) less."""
        for account in self.accounts(namespace):
            account.used_bytes += change_bytes

    def fits(self, namespace: Namespace, size_bytes: int) -> bool:
        """Whether no hard share forbids that ``namespace`` gets so much more."""
        return all(account.used_bytes + size_bytes <= account.hard_bytes for account in self.accounts(namespace))

    def victim(self, newcomer: Namespace, size_bytes: int, size_class: int | None) -> N | None:
        """What goes next so that ``newcomer`` may get ``size_bytes``: of this size class, or of any."""
        own = self.accounts(newcomer)
        full = [account for account in own if account.used_bytes + size_bytes > account.hard_bytes]
        return self._best(own, full, size_class)

    def taking(self, newcomer: Namespace) -> Taking[N]:
        """To find out whether several things together may be taken for ``newcomer``."""
        return Taking(self.accounts(newcomer))

    def beyond(self) -> N | None:
        """The coldest node of a share that is beyond its hard bound: it was made smaller since the node came."""
        for account in self.everybody:
            if account.used_bytes > account.hard_bytes:
                node = self._best((account,), (account,), None)
                if node is not None:
                    return node
        return None

    def _best(self, own: tuple[Account[N], ...], inside: Iterable[Account[N]], size_class: int | None) -> N | None:
        best: N | None = None
        rank = (True, _ALL)
        for account in self.everybody:
            node = self._coldest(account, size_class)
            if node is not None:
                taking = Taking(own, inside)
                right = taking.add(self.accounts(node.space.namespace), self._size(node))
                if right and (taking.last_resort, node.touched) < rank:
                    best, rank = node, (taking.last_resort, node.touched)
        return best

    def _account(self, namespace: Namespace) -> Account[N]:
        account = self.namespaces.get(namespace.id)
        if account is None:
            account = self.tenants.get(namespace.tenant)
        return self._others if account is None else account

    @staticmethod
    def _coldest(account: Account[N], size_class: int | None) -> N | None:
        if size_class is not None:
            return account.policy.coldest(size_class) if size_class in account.sizes else None
        found = [node for size in account.sizes if (node := account.policy.coldest(size)) is not None]
        return min(found, key=lambda node: node.touched, default=None)
