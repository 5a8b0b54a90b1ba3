"""One random life of the store, compared step by step with the naive model."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

from kvd.types import ROOT, CommitStatus, ReserveStatus, Stripe
from kvd.wire.errors import InvalidRequest, LimitReached, NamespaceUnknown, SessionUnknown
from kvd.wire.frames import Item, ItemStatus, Op
from kvd.wire.spans import Span, whole
from tests.unit.ledger.harness import GRANULE, key
from tests.unit.ledger.machine_state import KEYS, NAMESPACES, TENANTS, StoreState
from tests.unit.ledger.model import READY, Chunk, Space

number = st.integers(0, KEYS - 1)
choice = st.integers(0, 1 << 16)
rarely = st.sampled_from([False, False, False, False, True])


def parent_of(index: int) -> bytes:
    """A fixed tree: two roots, a chain below each, and branches."""
    return ROOT if index < 2 else key(index - 2 if index % 3 else index // 2)


def path_to(index: int) -> list[bytes]:
    path = [key(index)]
    while (parent := parent_of(int.from_bytes(path[0], "big"))) != ROOT:
        path.insert(0, parent)
    return path


class StoreMachine(StoreState):
    """Sessions of two tenants write, read, die and come back over a pool much too small for them."""

    @initialize(granules=st.sampled_from([16, 24, 40]), share=st.sampled_from([0.5, 0.8, 1.0]))
    def start(self, granules: int, share: float) -> None:
        self.begin(granules, share)
        self.come("red", [NAMESPACES[0], NAMESPACES[3]])
        self.come("red", [NAMESPACES[0], NAMESPACES[1]])
        self.come("blue", [NAMESPACES[0], NAMESPACES[2], NAMESPACES[4]])

    # ------------------------------------------------------------ sessions

    @rule(tenant=st.sampled_from(TENANTS), which=st.lists(st.sampled_from(NAMESPACES), min_size=1, max_size=3))
    def come(self, tenant: str, which: list[tuple[str, int, int, int]]) -> None:
        if len(self.sessions) >= 4:
            return
        session = self.pool.session(tenant)
        self.sessions[session] = tenant
        self.opened[session] = []
        self.cancelled[session] = []
        for model, granules, layers, heads in which:
            if granules * GRANULE > self.store.max_chunk_bytes:
                with pytest.raises(InvalidRequest):
                    self.pool.namespace(session, model, granules, layers, heads)
                continue
            namespace = self.pool.namespace(session, model, granules, layers, heads)
            space = self.spaces.setdefault(
                namespace.id, Space(namespace.id, tenant, granules * GRANULE, layers * heads)
            )
            assert space.tenant == tenant
            if all(space is not known for _, known in self.opened[session]):
                self.opened[session].append((namespace, space))

    @precondition(lambda self: len(self.sessions) > 2)
    @rule(which=choice)
    def end_session(self, which: int) -> None:
        session = self.pick_session(which)
        self.store.close_session(session)
        self.model.end_session(session)
        del self.sessions[session]
        del self.opened[session]
        self.ended.append(session)
        with pytest.raises(SessionUnknown):
            self.store.renew(session, [])

    @precondition(lambda self: self.ended)
    @rule(which=choice)
    def prove_writers_gone(self, which: int) -> None:
        session = self.ended.pop(which % len(self.ended))
        self.store.writers_gone(session)
        self.model.bury(session)
        self.write_leases = [lease for lease in self.write_leases if lease[0] != session]

    # ------------------------------------------------------------ reading

    @precondition(StoreState.any_space)
    @rule(which=choice, index=number, skip=st.sampled_from([0, 0, 1, 3]), spoil=rarely)
    def lookup(self, which: int, index: int, skip: int, spoil: bool) -> None:
        session, namespace, space = self.pick_space(which)
        path = path_to(index)
        if spoil:
            path = path[1:] or [key(99)]
        skip = min(skip, len(path))
        lease = next(self.leases)
        leased, writing = self.model.lookup(space, path, skip)
        result = self.store.lookup(session, namespace.id, lease, path, skip)
        assert result.locations == [chunk.location for chunk in leased]
        assert (result.promoting, result.writing) == (0, writing)
        if leased:
            self.model.reads[session, lease] = (self.model.now + self.model.read_lease_s, leased)

    @precondition(lambda self: self.sessions)
    @rule(which=choice, other=choice)
    def release(self, which: int, other: int) -> None:
        session = self.pick_session(which)
        mine = [lease for s, lease in self.model.reads if s == session]
        unknown = next(self.leases)
        chosen = [mine[other % len(mine)]] if mine else []
        assert self.store.release(session, [*chosen, unknown]) == len(chosen)
        for lease in chosen:
            del self.model.reads[session, lease]
        self.cancelled[session].append(unknown)

    @precondition(lambda self: self.sessions)
    @rule(which=choice)
    def renew(self, which: int) -> None:
        session = self.pick_session(which)
        known = sorted({lease for _, lease in self.model.reads} | {lease for _, lease, _, _ in self.write_leases})
        alive = self.store.renew(session, known)
        for lease, answer in zip(known, alive, strict=True):
            read = self.model.reads.get((session, lease))
            assert answer == (read is not None or bool(self.model.under(session, lease)))
            if read is not None:
                self.model.reads[session, lease] = (self.model.now + self.model.read_lease_s, read[1])

    @precondition(StoreState.any_space)
    @rule(which=choice, other=choice)
    def use_a_lease_that_was_given_up(self, which: int, other: int) -> None:
        session, namespace, _ = self.pick_space(which)
        if not self.cancelled[session]:
            return
        lease = self.cancelled[session][other % len(self.cancelled[session])]
        with pytest.raises(InvalidRequest):
            self.store.lookup(session, namespace.id, lease, path_to(0))
        with pytest.raises(InvalidRequest):
            self.store.reserve(session, namespace.id, lease, [(key(0), ROOT)])

    # ------------------------------------------------------------ writing

    @precondition(StoreState.any_space)
    @rule(which=choice, ends=st.lists(number, min_size=1, max_size=3), cut=st.sampled_from([0, 0, 0, 1]), wrong=rarely)
    def reserve(self, which: int, ends: list[int], cut: int, wrong: bool) -> None:
        session, namespace, space = self.pick_space(which)
        path = [name for end in ends for name in path_to(end)[cut:]] or [key(ends[0])]
        items = [(name, parent_of(int.from_bytes(name, "big"))) for name in path]
        if wrong:
            items[-1] = (items[-1][0], key(ends[0] + 50))
        lease = next(self.leases)
        before = {one for one in self.model.chunks.values() if not self.model.held(one)}
        sacred = {self.model.chunks.get((space, name)) for name, _ in items}
        results = self.store.reserve(session, namespace.id, lease, items)
        self.model.requests += 1
        evicted = self.forget_evicted(before, sacred)
        refused = False
        for (name, parent), result in zip(items, results, strict=True):
            expected = self.model.reserve_status(space, name, parent)
            if expected is not None:
                assert result == (expected, None)
                continue
            if result.status is ReserveStatus.GRANTED:
                self.model.grant(space, session, lease, name, parent, result)
                continue
            assert result == (ReserveStatus.NO_ROOM, None)
            refused = True
        held = self.model.under(session, lease)
        if held:
            self.write_leases.append((session, lease, namespace, space))
        if refused:
            self.check_there_was_no_room(session, space, items)
        if not any(result.status is ReserveStatus.GRANTED for result in results):
            assert not evicted or refused, "something was evicted for nothing"

    @precondition(StoreState.any_space)
    @rule(which=choice, ends=st.lists(number, min_size=1, max_size=2))
    def store_prefix(self, which: int, ends: list[int]) -> None:
        """What engines do all the time: reserve a prefix, write it, commit it."""
        known = len(self.write_leases)
        self.reserve(which, ends, 0, False)
        if len(self.write_leases) > known:
            self.commit(known, 0, False, 0)

    def forget_evicted(self, evictable: set[Chunk], sacred: set[Chunk | None]) -> list[Chunk]:
        """Take out of the model what the store has evicted, after checking that it was allowed to."""
        alive = {chunk for space in self.store._books.spaces.values() for chunk in space.chunks.values()}
        locations = {chunk.location for chunk in alive}
        gone = [chunk for chunk in self.model.chunks.values() if chunk.location not in locations]
        for chunk in gone:
            assert chunk in evictable, "something was evicted that was leased, being written or on the way to it"
            assert chunk not in sacred, "something that the request was about was evicted for its sake"
            assert all(child in gone for child in self.model.children(chunk)), "a chunk outlived its parent"
        for chunk in gone:
            del self.model.chunks[chunk.space, chunk.key]
        return gone

    def check_there_was_no_room(self, session: int, space: Space, items: list[tuple[bytes, bytes]]) -> None:
        """NO_ROOM must be true: at the session's bound, or nothing to evict but what the request is about."""
        limit = self.pool.limits.max_writing_share * self.pool.slabs.total_bytes
        if self.model.writing_bytes(session) + space.slot_bytes > limit:
            return
        about = {name for item in items for name in item}
        kept = {one for one in self.model.chunks.values() if one.space is space and one.key in about}
        free = [
            one
            for one in self.model.chunks.values()
            if not any(self.model.busy(below) or below in kept for below in self.model.subtree(one))
        ]
        assert not [one for one in free if one.space.slot_bytes == space.slot_bytes], "a victim was overlooked"
        offsets = {one.location.offset for one in free}
        assert self.pool.slabs.allocate(space.slot_bytes) is None
        for window in self.pool.slabs.windows(space.slot_bytes):
            inside = {at for slab in window.slabs for at in self.pool.slabs.used_slots(slab)}
            assert not inside <= offsets, "slabs that could be emptied were overlooked"

    @precondition(lambda self: self.write_leases)
    @rule(which=choice, part=st.integers(0, 7), backwards=st.booleans(), stripes=st.sampled_from([0, 0, 1, 2]))
    def commit(self, which: int, part: int, backwards: bool, stripes: int) -> None:
        session, lease, namespace, space = self.write_leases[which % len(self.write_leases)]
        if session not in self.sessions:
            return
        names = [chunk.key for chunk in self.model.under(session, lease)]
        names = [name for index, name in enumerate(names) if part == 0 or index % part == 0]
        if backwards:
            names.reverse()
        layers, heads = namespace.identity.num_layers, namespace.identity.num_kv_heads
        everything = {(layer, head) for layer in range(layers) for head in range(heads)}
        chosen = {
            0: [],
            1: [Stripe(0, 1, 0, heads)],
            2: [Stripe(0, layers, 0, heads)] if layers == 1 else [Stripe(1, layers, 0, heads)],
        }[stripes]
        cells = {
            layer * heads + head
            for layer, head in everything
            if not chosen
            or any(s.layer_begin <= layer < s.layer_end and s.head_begin <= head < s.head_end for s in chosen)
        }
        stranger = key(77)
        expected = self.model.commit(space, session, lease, [(n, cells) for n in [*names, stranger]])
        statuses = self.store.commit(session, namespace.id, lease, [(n, chosen) for n in [*names, stranger]])
        assert statuses == expected
        for name, status in zip(names, statuses, strict=False):
            chunk = self.model.chunks.get((space, name))
            assert (status is CommitStatus.STORED) <= (chunk is not None and chunk.state is READY)

    @precondition(lambda self: self.write_leases)
    @rule(which=choice, part=st.integers(0, 3))
    def abort(self, which: int, part: int) -> None:
        session, lease, namespace, _ = self.write_leases[which % len(self.write_leases)]
        if session not in self.sessions:
            return
        held = self.model.under(session, lease)
        chosen = held[::part] if part else []
        known = bool(held)
        assert self.store.abort(session, namespace.id, lease, [chunk.key for chunk in chosen]) == len(chosen or held)
        for chunk in chosen or held:
            self.model.give_up(chunk)
        if not known:
            self.cancelled[session].append(lease)

    # ------------------------------------------------------------ the data plane

    @precondition(lambda self: self.sessions)
    @rule(which=choice, op=st.sampled_from(list(Op)), other=choice, count=st.integers(1, 3), fits=st.booleans())
    def begin_io(self, which: int, op: Op, other: int, count: int, fits: bool) -> None:
        if len(self.tickets) >= 6:
            return
        session = self.pick_session(which)
        mine = [lease for s, lease in self.model.reads if s == session]
        if op is Op.WRITE:
            mine = [lease for s, lease, _, _ in self.write_leases if s == session and self.model.under(s, lease)]
        lease = mine[other % len(mine)] if mine else 12345
        under = (
            self.model.reads.get((session, lease), (0.0, []))[1] if op is Op.READ else self.model.under(session, lease)
        )
        candidates: list[Chunk | None] = [*under, *self.model.occupied()[: other % 3], None]
        chosen = [candidates[(other + step) % len(candidates)] for step in range(count)]
        items, expected = [], []
        for index, chunk in enumerate(chosen):
            good = fits or index != 0
            if chunk is None:
                items.append(Item(0, 0, 1 << 60, whole(GRANULE)))
            else:
                size = chunk.space.slot_bytes
                items.append(Item(*chunk.location, whole(size) if good else Span(size - 1, 2, 2, 1)))
            expected.append(self.model.begin(session, op, lease, chunk, good))
        ticket, statuses = self.store.begin_io(session, op, lease, items)
        assert statuses == expected
        moved = [chunk if status is ItemStatus.OK else None for chunk, status in zip(chosen, statuses, strict=True)]
        self.model.transfers[ticket.id] = (op, moved)
        self.tickets.append(ticket)

    @precondition(lambda self: self.tickets)
    @rule(which=choice, failed=st.sets(st.integers(0, 2), max_size=1))
    def end_io(self, which: int, failed: set[int]) -> None:
        ticket = self.tickets.pop(which % len(self.tickets))
        self.store.end_io(ticket, failed)
        self.model.end(ticket.id, failed)
        self.store.end_io(ticket, failed)

    # ------------------------------------------------------------ time, operators

    @rule(most=st.sampled_from([1, 2, 5, 100]))
    def catch_up(self, most: int) -> None:
        waiting = sum(len(prefix) for prefix, _ in self.store._uses._queue)
        assert self.store.catch_up(most) is (waiting <= most)

    @rule(seconds=st.sampled_from([0.5, 4.0, 5.0, 20.0, 31.0]))
    def pass_time(self, seconds: float) -> None:
        self.pool.pass_time(seconds)
        self.expired += self.model.advance(self.pool.clock.now)

    @rule(tenant=st.sampled_from(TENANTS), which=choice, everything=st.booleans())
    def drop(self, tenant: str, which: int, everything: bool) -> None:
        space = sorted(self.spaces.values(), key=lambda s: s.id)[which % len(self.spaces)] if self.spaces else None
        wanted = None if everything or space is None else space.id
        mine = [c for c in self.model.chunks.values() if c.space.tenant == tenant and wanted in (None, c.space.id)]
        dropped = [chunk for chunk in mine if not self.model.held(chunk)]
        try:
            answer = self.store.drop(tenant, wanted)
        except NamespaceUnknown:
            assert not mine
            return
        assert answer == (len(dropped), len(mine) - len(dropped))
        for chunk in dropped:
            del self.model.chunks[chunk.space, chunk.key]

    @precondition(lambda self: self.spaces)
    @rule(which=choice, index=number, whole=rarely)
    def pin(self, which: int, index: int, whole: bool) -> None:
        space = sorted(self.spaces.values(), key=lambda s: s.id)[which % len(self.spaces)]
        name = b"" if whole else key(index)
        wishes = {*self.model.wishes, (space, name)}
        try:
            covered = self.store.pin(space.tenant, space.id, name)
        except LimitReached:
            assert self.model.covered_bytes(wishes) * 2 > self.pool.slabs.total_bytes, "there was room to pin"
        else:
            self.model.wishes = wishes
            assert covered <= len(self.model.covered({(space, name)}))

    @precondition(lambda self: self.model.wishes)
    @rule(which=choice)
    def unpin(self, which: int) -> None:
        space, name = sorted(self.model.wishes, key=lambda wish: (wish[0].id, wish[1]))[which % len(self.model.wishes)]
        self.store.unpin(space.tenant, space.id, name)
        self.model.wishes.discard((space, name))
