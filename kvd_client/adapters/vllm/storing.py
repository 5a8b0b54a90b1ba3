"""The scheduler half's writing: which chunks of which requests are complete, asked for, sent to the workers, stored.

A chunk goes: complete -> asked (Reserve, on the controller's thread) -> granted -> sent (a store job in a step's
orders; the pages are free again when that step's hooks return) -> reported by every rank -> committed or aborted. What
was asked for and not sent is given up when its blocks are: a store never holds a step up.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvd.wire.chunks import ROOT, Location, ReserveStatus
from kvd_client.adapters.vllm.controller import MAX_CHUNKS, Answer, Controller
from kvd_client.adapters.vllm.log import complain
from kvd_client.adapters.vllm.matching import Grid
from kvd_client.adapters.vllm.meta import StoreJob, StoreReport
from kvd_client.leases import WriteLease

if TYPE_CHECKING:
    from vllm.v1.request import Request

#: A store job of which the workers say nothing for so long is given up, and its slots with the session.
JOB_TIMEOUT_S = 60.0
#: A slot that was granted is given back when its chunk could not be sent for so long: the workers have no data path, or
#: the request does not run.
GRANT_TIMEOUT_S = 10.0


@dataclass(eq=False)
class _Chunk:
    request_id: str
    index: int
    key: bytes
    parent: bytes
    dropped: bool = False  # given up before the answer to its Reserve came
    lease: WriteLease | None = None
    location: Location | None = None


@dataclass
class _Request:
    cursor: int = 0  # chunks below are stored, under way, or known to be held by somebody
    stopped: bool = False  # the daemon has no room, or keeps losing the parents: no more from this request
    rewound_at: int | None = None  # the last ticket before the cursor went back to the start
    asked: set[_Chunk] = field(default_factory=set)
    granted: dict[int, _Chunk] = field(default_factory=dict)
    granted_at: float = 0.0  # the last time that a chunk was granted or sent
    blocks: list[int] | None = None  # set when it has finished and its blocks are kept for us ...
    deadline: float = 0.0  # ... until then


@dataclass
class _Job:
    lease: WriteLease
    keys: list[bytes]
    ranks: int
    failed: set[int]
    deadline: float


class Storing:
    """Called on the engine's thread. ``step_chunks``: most chunks that one step takes out of their pages; at most twice
    as many are on their way at any time, and the others wait."""

    def __init__(
        self, controller: Controller, grid: Grid, ranks: int, step_chunks: int, store_timeout_s: float
    ) -> None:
        self._controller = controller
        self._grid = grid
        self._ranks = ranks
        self._step_chunks = step_chunks
        self._timeout_s = store_timeout_s
        self._requests: dict[str, _Request] = {}
        self._batch: list[_Chunk] = []
        self._asked: dict[int, list[_Chunk]] = {}
        self._ticket = 0
        self._jobs: dict[int, _Job] = {}
        self._job_id = 0
        self._under_way: set[bytes] = set()

    # -- what is known of requests

    def known(self, request_id: str, chunks: int) -> None:
        """The first ``chunks`` chunks of a request are stored already."""
        state = self._requests.setdefault(request_id, _Request())
        state.cursor = max(state.cursor, chunks)

    def rewind(self, request_id: str, chunk: int) -> None:
        """The request's chunks from ``chunk`` on have to be computed after all: what is not sent is void."""
        if (state := self._requests.get(request_id)) is not None:
            self._drop(state)
            state.cursor = min(state.cursor, chunk)

    def preempted(self, request_id: str) -> None:
        """The request has lost its blocks."""
        if (state := self._requests.get(request_id)) is not None:
            self._drop(state)

    def drop_all(self) -> None:
        """Pages have turned out to be wrong: nothing that was computed from them may be stored."""
        for state in self._requests.values():
            self._drop(state)

    def finished(self, request: Request, tokens: int, blocks: list[int]) -> bool:
        """The request is over with ``tokens`` tokens computed. True: its blocks are needed a little longer."""
        self.complete(request, tokens)
        self.flush()
        state = self._requests[request.request_id]
        if not state.asked and not state.granted:
            del self._requests[request.request_id]
            return False
        state.blocks, state.deadline = list(blocks), time.monotonic() + self._timeout_s
        return True

    # -- a step

    def take_answers(self) -> None:
        """What the daemon has said to earlier Reserves."""
        for answer in self._controller.answers():
            chunks = self._asked.pop(answer.ticket, [])
            orphans: set[str] = set()
            for i, chunk in enumerate(chunks):
                state = self._requests.get(chunk.request_id)
                if state is not None:
                    state.asked.discard(chunk)
                self._judge(answer, i, chunk, state, orphans)
            for request_id in orphans:
                self._orphaned(self._requests[request_id], answer.ticket)

    def complete(self, request: Request, tokens: int) -> None:
        """``tokens`` tokens of the request will have their KV once this step's forward pass is done."""
        grid, hashes = self._grid, request.block_hashes
        state = self._requests.setdefault(request.request_id, _Request())
        end = min(tokens // grid.chunk_tokens, grid.full_chunks(hashes))
        if state.stopped or end <= state.cursor or not self._controller.ready or grid.adapters.salt(request) is None:
            return
        while state.cursor < end and len(self._under_way) < MAX_CHUNKS:
            index, key = state.cursor, grid.key(request, state.cursor)
            state.cursor += 1
            if key not in self._under_way:
                chunk = _Chunk(request.request_id, index, key, grid.key(request, index - 1) if index else ROOT)
                self._under_way.add(key)
                state.asked.add(chunk)
                self._batch.append(chunk)

    def flush(self) -> None:
        """Asks for the chunks that ``complete`` has found, all in one call."""
        if self._batch:
            batch, self._batch = self._batch, []
            self._ticket += 1
            self._asked[self._ticket] = batch
            self._controller.reserve(self._ticket, [(chunk.key, chunk.parent) for chunk in batch])

    def take_jobs(
        self, blocks_of: Callable[[str], list[int] | None], *, attached: bool
    ) -> tuple[list[StoreJob], set[str]]:
        """Jobs for this step, and the finished requests whose blocks are not needed once its hooks have run.

        ``blocks_of``: the block table of a request that runs in this step. ``attached``: all ranks have a data path.
        """
        self._expire_jobs()
        ready: dict[int, list[tuple[_Chunk, list[int]]]] = {}
        sent = sum(len(job.keys) for job in self._jobs.values())
        left, now, done = min(self._step_chunks, 2 * self._step_chunks - sent), time.monotonic(), set()
        # Those that have finished first: their blocks are kept for nothing else.
        for request_id, state in sorted(self._requests.items(), key=lambda item: item[1].blocks is None):
            if state.granted and attached and left > 0:
                blocks = state.blocks if state.blocks is not None else blocks_of(request_id)
                left -= self._pick(state, blocks or [], left, ready)
            if state.blocks is not None and now > state.deadline:
                self._drop(state)
            elif state.granted and now > state.granted_at + GRANT_TIMEOUT_S:
                self._drop(state)
                state.stopped = True
            if state.blocks is not None and not state.asked and not state.granted:
                done.add(request_id)
        for request_id in done:
            del self._requests[request_id]
        return [self._job(picked) for picked in ready.values()], done

    @property
    def pending(self) -> bool:
        """Whether workers owe reports."""
        self._expire_jobs()
        return bool(self._jobs)

    def report(self, job_id: int, report: StoreReport) -> None:
        """Ranks are through with a store job."""
        job = self._jobs.get(job_id)
        if job is None:
            return
        job.ranks -= report.ranks
        job.failed |= report.failed
        if job.ranks > 0:
            return
        del self._jobs[job_id]
        self._under_way.difference_update(job.keys)
        # Failures first, so that nothing is committed under a parent that is about to vanish.
        if job.failed:
            self._controller.abort(job.lease, [job.keys[i] for i in sorted(job.failed)])
        if good := [key for i, key in enumerate(job.keys) if i not in job.failed]:
            self._controller.commit(job.lease, good)

    def close(self) -> None:
        """The end of the engine: gives up what is not sent."""
        self.drop_all()

    # -- inside

    def _expire_jobs(self) -> None:
        now = time.monotonic()
        for job_id in [job_id for job_id, job in self._jobs.items() if now > job.deadline]:
            # Not aborted: nobody knows whether a copy is still under way. The daemon takes the slots with the session.
            complain("lost-job", "kvd: the workers have not reported on a store; its slots are given up")
            self._under_way.difference_update(self._jobs.pop(job_id).keys)

    def _judge(self, answer: Answer, i: int, chunk: _Chunk, state: _Request | None, orphans: set[str]) -> None:
        result = answer.lease.results[i] if answer.lease is not None else None
        if answer.lease is not None and result is not None and result.status == ReserveStatus.GRANTED:
            chunk.lease, chunk.location = answer.lease, result.location
            if state is None or chunk.dropped:
                self._give_up(chunk)
            else:
                state.granted[chunk.index] = chunk
                state.granted_at = time.monotonic()
            return
        if not chunk.dropped:
            self._under_way.discard(chunk.key)
        if result is None or state is None:
            return
        if result.status == ReserveStatus.NO_ROOM:
            state.stopped = True
        elif result.status == ReserveStatus.NO_PARENT:
            orphans.add(chunk.request_id)

    def _orphaned(self, state: _Request, ticket: int) -> None:
        """The daemon does not hold what comes before: once, everything from the start is offered again."""
        if state.rewound_at is None:
            state.cursor, state.rewound_at = 0, self._ticket
        elif ticket > state.rewound_at:
            state.stopped = True

    def _pick(
        self, state: _Request, blocks: list[int], left: int, ready: dict[int, list[tuple[_Chunk, list[int]]]]
    ) -> int:
        picked = 0
        for index in sorted(state.granted)[:left]:
            first = index * self._grid.chunk_blocks
            its_blocks = blocks[first : first + self._grid.chunk_blocks]
            chunk = state.granted[index]
            if len(its_blocks) < self._grid.chunk_blocks or chunk.lease is None:
                break
            del state.granted[index]
            state.granted_at = time.monotonic()
            ready.setdefault(id(chunk.lease), []).append((chunk, its_blocks))
            picked += 1
        return picked

    def _job(self, picked: list[tuple[_Chunk, list[int]]]) -> StoreJob:
        lease = picked[0][0].lease
        assert lease is not None
        self._job_id += 1
        self._jobs[self._job_id] = _Job(
            lease, [chunk.key for chunk, _ in picked], self._ranks, set(), time.monotonic() + JOB_TIMEOUT_S
        )
        locations = [chunk.location for chunk, _ in picked if chunk.location is not None]
        return StoreJob(self._job_id, lease.lease_id, lease.epoch, locations, [blocks for _, blocks in picked])

    def _drop(self, state: _Request) -> None:
        """Gives up what is not sent; it will be asked for again should the request get there again."""
        dropped = [*state.asked, *state.granted.values()]
        for chunk in dropped:
            state.cursor = min(state.cursor, chunk.index)
            if chunk.lease is None:
                chunk.dropped = True
                self._under_way.discard(chunk.key)
            else:
                self._give_up(chunk)
        state.asked.clear()
        state.granted.clear()

    def _give_up(self, chunk: _Chunk) -> None:
        """Aborts a granted chunk that no worker has heard of."""
        if not chunk.dropped:
            self._under_way.discard(chunk.key)
        assert chunk.lease is not None
        self._controller.abort(chunk.lease, [chunk.key])
