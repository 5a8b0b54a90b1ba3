"""The store told naively: dicts and lists, everything found by searching. What the real one is compared with."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvd.types import ROOT, ChunkState, CommitStatus, Location, ReserveResult, ReserveStatus
from kvd.wire.frames import ItemStatus, Op

READY, WAITING, WRITING = ChunkState.READY, ChunkState.WAITING, ChunkState.WRITING


@dataclass(eq=False)
class Space:
    """One namespace."""

    id: bytes
    tenant: str
    slot_bytes: int
    cells: int  # of its grid


@dataclass(eq=False)
class Chunk:
    """One chunk that has a slot."""

    space: Space
    key: bytes
    parent: bytes
    location: Location
    session: int
    lease: int | None
    state: ChunkState = WRITING
    covered: set[int] = field(default_factory=set)
    poisoned: bool = False
    doomed: bool = False
    uses: int = 0
    used_by: int = 0  # number of the request that used it last


@dataclass(eq=False)
class Limbo:
    """A slot that nobody uses and nobody may get: until a time, or (None) until the data plane is done with it."""

    chunk: Chunk
    until: float | None
    quarantine_after: bool


@dataclass(eq=False)
class Model:
    """The whole state. Methods answer what the store must answer."""

    read_lease_s: float
    quarantine_s: float
    now: float
    chunks: dict[tuple[Space, bytes], Chunk] = field(default_factory=dict)
    doomed: list[Chunk] = field(default_factory=list)
    limbo: list[Limbo] = field(default_factory=list)
    reads: dict[tuple[int, int], tuple[float, list[Chunk]]] = field(default_factory=dict)
    transfers: dict[int, tuple[Op, list[Chunk | None]]] = field(default_factory=dict)
    #: Pins, as (namespace, key), and what they keep.
    wishes: set[tuple[Space, bytes]] = field(default_factory=set)
    pinned: set[tuple[Space, bytes]] = field(default_factory=set)
    too_much: bool = False
    generations: set[int] = field(default_factory=set)
    requests: int = 0  # that have used anything

    # ---------------------------------------------------------------- questions

    def children(self, chunk: Chunk) -> list[Chunk]:
        return [c for (space, _), c in self.chunks.items() if space is chunk.space and c.parent == chunk.key]

    def subtree(self, chunk: Chunk) -> list[Chunk]:
        return [chunk] + [below for child in self.children(chunk) for below in self.subtree(child)]

    def busy(self, chunk: Chunk) -> bool:
        """Whether the chunk itself gives a reason to stay."""
        return (
            chunk.state is not READY
            or (chunk.space, chunk.key) in self.pinned
            or any(chunk in leased for _, leased in self.reads.values())
            or any(op is Op.READ and chunk in chunks for op, chunks in self.transfers.values())
        )

    def held(self, chunk: Chunk) -> bool:
        return any(self.busy(below) for below in self.subtree(chunk))

    def covered(self, wishes: set[tuple[Space, bytes]]) -> set[tuple[Space, bytes]]:
        """What is READY and wished to stay, with all above it."""
        found = set()
        for chunk in self.chunks.values():
            if chunk.state is READY and {(chunk.space, chunk.key), (chunk.space, b"")} & wishes:
                at: Chunk | None = chunk
                while at is not None:
                    found.add((at.space, at.key))
                    at = self.chunks.get((at.space, at.parent))
        return found

    def covered_bytes(self, wishes: set[tuple[Space, bytes]]) -> int:
        return sum(space.slot_bytes for space, _ in self.covered(wishes))

    def writes(self, chunk: Chunk) -> int:
        return sum(chunks.count(chunk) for op, chunks in self.transfers.values() if op is Op.WRITE)

    def occupied(self) -> list[Chunk]:
        """Every chunk that has a slot."""
        return [*self.chunks.values(), *self.doomed, *(limbo.chunk for limbo in self.limbo)]

    def writing_bytes(self, session: int) -> int:
        own = [c for c in [*self.chunks.values(), *self.doomed] if c.session == session and c.state is not READY]
        return sum(c.space.slot_bytes for c in own)

    def under(self, session: int, lease: int) -> list[Chunk]:
        """What a write lease holds."""
        return [c for c in [*self.chunks.values(), *self.doomed] if (c.session, c.lease) == (session, lease)]

    # ---------------------------------------------------------------- time

    def advance(self, now: float) -> int:
        """How many read leases expire."""
        self.now = now
        over = [name for name, (until, _) in self.reads.items() if until <= now]
        for name in over:
            del self.reads[name]
        self.limbo = [limbo for limbo in self.limbo if limbo.until is None or limbo.until > now]
        return len(over)

    # ---------------------------------------------------------------- reading

    def use(self, chunk: Chunk) -> None:
        chunk.uses += 1
        chunk.used_by = self.requests

    def lookup(self, space: Space, keys: list[bytes], skip: int) -> tuple[list[Chunk], int]:
        self.requests += 1
        found: list[Chunk] = []
        writing = 0
        previous = ROOT
        for name in keys:
            chunk = self.chunks.get((space, name))
            if chunk is None or chunk.parent != previous or (chunk.state is READY and writing):
                break
            if chunk.state is READY:
                found.append(chunk)
                self.use(chunk)
            else:
                writing += 1
            previous = name
        return found[skip:], writing

    # ---------------------------------------------------------------- writing

    def reserve_status(self, space: Space, name: bytes, parent: bytes) -> ReserveStatus | None:
        """The answer, as far as it does not depend on room: None = GRANTED or NO_ROOM. PRESENT is a use."""
        chunk = self.chunks.get((space, name))
        if parent != ROOT and (space, parent) not in self.chunks:
            return ReserveStatus.NO_PARENT
        if chunk is None:
            return None
        if chunk.parent != parent:
            return ReserveStatus.NO_PARENT
        if chunk.state is not READY:
            return ReserveStatus.BUSY
        self.use(chunk)
        return ReserveStatus.PRESENT

    def grant(self, space: Space, session: int, lease: int, name: bytes, parent: bytes, result: ReserveResult) -> None:
        assert result.location is not None
        begin, size = result.location.offset, space.slot_bytes
        for other in self.occupied():
            at = other.location.offset
            assert begin + size <= at or at + other.space.slot_bytes <= begin, "a slot was given twice"
        assert result.location.generation not in self.generations
        self.generations.add(result.location.generation)
        self.chunks[space, name] = Chunk(space, name, parent, result.location, session, lease)

    def commit(self, space: Space, session: int, lease: int, items: list[tuple[bytes, set[int]]]) -> list[CommitStatus]:
        self.requests += 1
        held = {chunk.key: chunk for chunk in self.under(session, lease)}
        touched: list[Chunk | None] = []
        answers: list[CommitStatus] = []
        for name, cells in items:
            chunk = held.get(name)
            touched.append(chunk)
            if chunk is None or chunk.lease is None:
                answers.append(CommitStatus.FAILED)
                continue
            chunk.covered |= cells
            if len(chunk.covered) < space.cells:
                answers.append(CommitStatus.PARTIAL)
            elif chunk.doomed or chunk.poisoned or self.writes(chunk):
                self.give_up(chunk)
                answers.append(CommitStatus.FAILED)
            else:
                chunk.lease = None
                chunk.state = WAITING
                self.promote(chunk)
                answers.append(CommitStatus.WAITING_PARENT)
        for index, chunk in enumerate(touched):
            if chunk is not None and answers[index] is CommitStatus.WAITING_PARENT:
                if chunk not in self.chunks.values():
                    answers[index] = CommitStatus.FAILED
                elif chunk.state is READY:
                    answers[index] = CommitStatus.STORED
        return answers

    def promote(self, chunk: Chunk) -> None:
        parent = self.chunks.get((chunk.space, chunk.parent))
        if chunk.state is WAITING and (chunk.parent == ROOT or (parent is not None and parent.state is READY)):
            chunk.state = READY
            self.use(chunk)
            for child in self.children(chunk):
                self.promote(child)

    def give_up(self, chunk: Chunk, quarantine: bool = False) -> None:
        """The chunk's writer has ended without storing it."""
        if chunk.doomed:
            self.doomed.remove(chunk)
        else:
            below = self.subtree(chunk)[1:]
            for one in [chunk, *below]:
                del self.chunks[one.space, one.key]
            for one in below:
                if one.state is WRITING:
                    one.doomed = True
                    self.doomed.append(one)
        chunk.lease = None
        if self.writes(chunk):
            self.limbo.append(Limbo(chunk, None, quarantine))
        elif quarantine:
            self.limbo.append(Limbo(chunk, self.now + self.quarantine_s, quarantine))

    def end_session(self, session: int) -> None:
        for name in [name for name in self.reads if name[0] == session]:
            del self.reads[name]

    def bury(self, session: int) -> None:
        while mine := [
            c for c in [*self.chunks.values(), *self.doomed] if c.session == session and c.lease is not None
        ]:
            self.give_up(mine[0], quarantine=True)
        for chunk in self.chunks.values():
            if chunk.session == session:
                chunk.session = 0  # what waits for its parent is nobody's any more

    # ---------------------------------------------------------------- the data plane

    def begin(self, session: int, op: Op, lease: int, chunk: Chunk | None, fits: bool) -> ItemStatus:
        """The answer for one item that names ``chunk`` with its right generation."""
        if op is Op.READ:
            allowed = chunk is not None and chunk in self.reads.get((session, lease), (0.0, []))[1]
        else:
            allowed = chunk is not None and not chunk.doomed and (chunk.session, chunk.lease) == (session, lease)
            allowed = allowed and chunk in self.chunks.values()
        if not allowed:
            return ItemStatus.GONE
        return ItemStatus.OK if fits else ItemStatus.BAD_SPAN

    def end(self, ticket: int, failed: set[int]) -> None:
        op, chunks = self.transfers.pop(ticket)
        for index, chunk in enumerate(chunks):
            if chunk is not None and op is Op.WRITE and index in failed:
                chunk.poisoned = True
        for limbo in list(self.limbo):
            if limbo.until is None and not self.writes(limbo.chunk):
                if limbo.quarantine_after:
                    limbo.until = self.now + self.quarantine_s
                else:
                    self.limbo.remove(limbo)
