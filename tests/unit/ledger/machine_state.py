"""A store and the naive model beside it: what a random life has so far, and what must hold after each of its steps."""

from __future__ import annotations

import itertools

from hypothesis.stateful import RuleBasedStateMachine, invariant

from kvd.store import IoTicket
from kvd.types import ROOT, Namespace
from tests.unit.ledger.harness import Pool
from tests.unit.ledger.model import READY, WRITING, Model, Space

KEYS = 14
TENANTS = ("red", "blue")
#: (model, granules of a chunk, layers, heads)
NAMESPACES = (("a", 1, 1, 1), ("b", 1, 2, 2), ("c", 2, 3, 1), ("d", 3, 1, 2), ("e", 5, 1, 1), ("f", 8, 2, 1))


class StoreState(RuleBasedStateMachine):
    """``begin`` it. Whoever adds rules does to the model what they do to the store."""

    def begin(self, granules: int, share: float) -> None:
        """An empty pool of ``granules``, of which a session may have the ``share`` half-written."""
        self.pool = Pool(granules, max_writing_share=share)
        self.store = self.pool.store
        limits = self.pool.limits
        self.model = Model(limits.read_lease_s, limits.quarantine_s, self.pool.clock.now)
        self.sessions: dict[int, str] = {}  # open
        self.ended: list[int] = []  # the stream is over, the writers are not proven gone
        self.opened: dict[int, list[tuple[Namespace, Space]]] = {}
        self.spaces: dict[bytes, Space] = {}
        self.write_leases: list[tuple[int, int, Namespace, Space]] = []
        self.leases = itertools.count(1)
        self.cancelled: dict[int, list[int]] = {}
        self.tickets: list[IoTicket] = []
        self.expired = 0

    # ------------------------------------------------------------ choosing

    def pick_session(self, which: int) -> int:
        return sorted(self.sessions)[which % len(self.sessions)]

    def pick_space(self, which: int) -> tuple[int, Namespace, Space]:
        pairs = [(s, *pair) for s in sorted(self.opened) for pair in self.opened[s]]
        return pairs[which % len(pairs)]

    def any_space(self) -> bool:
        return any(self.opened.values())

    # ------------------------------------------------------------ what must always hold

    @invariant()
    def what_is_pinned_is_what_is_wished(self) -> None:
        books, model = self.store._books, self.model
        assert books.pins is not None
        model.pinned = {(self.spaces[node.space.namespace.id], node.key) for node in books.pins.reasons}
        covered = model.covered(model.wishes)
        assert model.pinned <= covered
        assert books.pins.bytes * 2 <= self.pool.slabs.total_bytes
        # What was too much when it came stays out, even when there is less later.
        model.too_much = (
            model.too_much or model.covered_bytes(model.wishes) * 2 > self.pool.slabs.total_bytes
        ) and bool(model.wishes)
        assert model.too_much or model.pinned == covered

    @invariant()
    def books_agree_with_each_other_and_with_the_model(self) -> None:
        self.pool.audited()
        books = self.store._books
        in_index = {
            (space.namespace.id, chunk.key): (chunk.state, chunk.location)
            for space in books.spaces.values()
            for chunk in space.chunks.values()
        }
        assert in_index == {
            (space.id, name): (chunk.state, chunk.location) for (space, name), chunk in self.model.chunks.items()
        }
        occupied = self.model.occupied()
        assert sorted(books.by_offset) == sorted(chunk.location.offset for chunk in occupied)
        usable = [*self.model.chunks.values(), *self.model.doomed]
        assert self.pool.table.words == {chunk.location.offset: chunk.location.generation for chunk in usable}
        for chunk in self.model.chunks.values():
            if chunk.state is READY and chunk.parent != ROOT:
                assert self.model.chunks[chunk.space, chunk.parent].state is READY

    @invariant()
    def uses_are_counted_in_the_order_of_the_requests(self) -> None:
        """Whether they are in the books or wait."""
        books = self.store._books
        used = {chunk: (chunk.touched, chunk.uses) for chunk in books.by_offset.values()}
        for prefix, stamp in self.store._uses._queue:
            for number, chunk in enumerate(prefix, stamp + 1):
                if chunk in used:
                    used[chunk] = number, used[chunk][1] + 1
        by_stamp = []
        for chunk in self.model.chunks.values():
            if chunk.state is READY:
                stamp, uses = used[books.by_offset[chunk.location.offset]]
                assert uses == chunk.uses
                by_stamp.append((stamp, chunk.used_by))
        assert [request for _, request in sorted(by_stamp)] == sorted(request for _, request in by_stamp)
        assert max([stamp for stamp, _ in by_stamp], default=0) <= books.last_stamp

    @invariant()
    def figures_agree_with_the_model(self) -> None:
        stats = self.store.stats()
        model = self.model
        sizes = [(chunk.state is READY, chunk.space.slot_bytes) for chunk in model.chunks.values()]
        doomed = sum(chunk.space.slot_bytes for chunk in model.doomed)
        assert stats.pool.ready_bytes == sum(size for ready, size in sizes if ready)
        assert stats.pool.writing_bytes == sum(size for ready, size in sizes if not ready) + doomed
        assert stats.pool.quarantined_bytes == sum(limbo.chunk.space.slot_bytes for limbo in model.limbo)
        for tenant in stats.tenants:
            own = [chunk for chunk in model.occupied() if chunk.space.tenant == tenant.tenant]
            assert tenant.bytes == sum(chunk.space.slot_bytes for chunk in own)
            assert tenant.chunks == sum(chunk.state is READY for chunk in own)
            assert tenant.sessions == sum(name == tenant.tenant for name in self.sessions.values())
        assert set(stats.sessions) == {*self.sessions, *self.ended}
        for session, figures in stats.sessions.items():
            mine = [chunk for chunk in [*model.chunks.values(), *model.doomed] if chunk.session == session]
            assert figures.read_leases == sum(owner == session for owner, _ in model.reads)
            assert figures.write_leases == sum(chunk.state is WRITING for chunk in mine)
            assert figures.writing_bytes == model.writing_bytes(session)
        assert stats.counters["expired_leases"] == self.expired

    def teardown(self) -> None:
        """Everybody goes, everything is dropped: the pool must be as empty as it was at the start."""
        for session in [*self.sessions, *self.ended]:
            self.store.writers_gone(session)
        for ticket in self.tickets:
            self.store.end_io(ticket)
        self.pool.pass_time(1000.0)
        for space, name in self.model.wishes:
            self.store.unpin(space.tenant, space.id, name)
        for tenant in TENANTS:
            assert self.store.drop(tenant, None)[1] == 0
        self.pool.audited()
        assert self.pool.slabs.free_bytes == self.pool.slabs.total_bytes
        assert self.pool.table.words == {}
        assert not self.store._books.spaces
        assert not self.store.stats().tenants
