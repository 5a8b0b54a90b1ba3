"""The scheduler half's reading: which tokens a request can load instead of computing, and the jobs that load them."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvd_client.adapters.vllm.lora import Adapters
from kvd_client.adapters.vllm.meta import NO_EPOCH, NULL_BLOCK, LoadJob, LoadReport
from kvd_client.adapters.vllm.waiting import Waits
from kvd_client.leases import ReadLease

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from kvd_client.adapters.vllm.controller import Controller

#: A request that found nothing and still waits is looked up again after this time.
MISS_AGE_S = 0.25


@dataclass(frozen=True)
class Grid:
    """How the engine's blocks make chunks, and what names them."""

    block_tokens: int
    chunk_blocks: int
    adapters: Adapters = field(default_factory=Adapters)

    @property
    def chunk_tokens(self) -> int:
        """Tokens of a chunk."""
        return self.block_tokens * self.chunk_blocks

    def key(self, request: Request, chunk: int) -> bytes:
        """Key of a chunk: the chained hash of its last block, with the weights of the request's adapter."""
        return self.adapters.key(request, request.block_hashes[(chunk + 1) * self.chunk_blocks - 1])

    def keys(self, request: Request, chunks: int) -> list[bytes]:
        """Keys of the first ``chunks`` chunks. Without an adapter they are its hashes: nothing is computed."""
        if self.adapters.salt(request):
            return [self.key(request, chunk) for chunk in range(chunks)]
        blocks = self.chunk_blocks
        return list(map(bytes, request.block_hashes[blocks - 1 : chunks * blocks : blocks]))

    def full_chunks(self, hashes: list[bytes]) -> int:
        """Chunks whose key is known."""
        return len(hashes) // self.chunk_blocks


@dataclass
class _Match:
    """What the last lookup of a request said."""

    at: float
    computed: int  # tokens the engine had by itself
    skip: int  # chunks at the front that were not leased
    lease: ReadLease | None
    tokens: int  # external tokens offered to the scheduler
    waits: bool  # more are on their way: nothing is offered yet

    @property
    def known(self) -> int:
        """Chunks at the front that are in the daemon's memory."""
        return self.skip + len(self.lease) if self.lease is not None and len(self.lease) else 0

    def release(self) -> None:
        if self.lease is not None:
            self.lease.release()


@dataclass
class _Loading:
    lease: ReadLease | None
    first_chunk: int
    ranks: int


class Matching:
    """Lookups, their leases, and load jobs. Called on the engine's thread."""

    def __init__(self, controller: Controller, grid: Grid, ranks: int, waits: Waits, *, load_async: bool) -> None:
        self._controller = controller
        self._grid = grid
        self._ranks = ranks
        self._waits = waits
        #: Whether loads run beside the steps.
        self.asynchronous = load_async
        self._matches: dict[str, _Match] = {}
        self._loading: dict[str, _Loading] = {}
        self._jobs: list[LoadJob] = []
        self._no_more: set[str] = set()  # requests whose load has failed: they compute

    def match(self, request: Request, computed: int) -> tuple[int | None, bool, int]:
        """External tokens after ``computed`` (a multiple of a block), whether they come asynchronously, and how many
        chunks at the front of the request are known to be in the daemon's memory. None tokens: ask again at the next
        step, because more of them are on their way there.

        At least one token is left to compute, as with vLLM's own prefix cache, so the last block is not loaded when
        its end is the end of the request.
        """
        grid, hashes = self._grid, request.block_hashes
        limit = (request.num_tokens - 1) // grid.block_tokens * grid.block_tokens
        chunks = min(grid.full_chunks(hashes), -(-limit // grid.chunk_tokens))
        skip = computed // grid.chunk_tokens
        if request.request_id in self._no_more or request.skip_reading_prefix_cache or skip >= chunks:
            return 0, False, 0
        if grid.adapters.salt(request) is None:
            return 0, False, 0
        match = self._matches.get(request.request_id)
        if match is None or not self._fresh(request.request_id, match, computed):
            match = self._look_up(request, computed, chunks, limit, match)
        if match.waits:
            return None, False, 0
        return match.tokens, self.asynchronous and match.tokens > 0, match.known

    def _look_up(self, request: Request, computed: int, chunks: int, limit: int, former: _Match | None) -> _Match:
        grid, skip, now = self._grid, computed // self._grid.chunk_tokens, time.monotonic()
        keys = grid.keys(request, chunks)
        lease = self._controller.lookup(keys, skip, again=former is not None)
        match = _Match(now, computed, skip, lease, 0, False)
        promoting = lease.promoting if lease is not None else 0
        match.tokens = max(0, min(match.known * grid.chunk_tokens, limit) - computed)
        match.waits = self._waits.heard(request.request_id, now, match.known, promoting)
        if not match.tokens:
            match.release()
        # Not before the new lease is there: in between, what was waited for could be evicted.
        if former is not None:
            former.release()
        self._matches[request.request_id] = match
        return match

    def _fresh(self, request_id: str, match: _Match, computed: int) -> bool:
        """Whether an answer still holds. A lease is looked up anew, and so replaced, after a third of its life."""
        age = time.monotonic() - match.at
        if match.computed != computed:
            return False
        if match.lease is not None and match.waits:
            return match.lease.epoch == self._controller.epoch and not self._waits.due(request_id)
        if match.lease is None or not match.tokens:
            return age < MISS_AGE_S
        return match.lease.epoch == self._controller.epoch and age < self._controller.read_lease_s / 3

    def allocated(self, request_id: str, block_ids: list[int], external: int) -> None:
        """The scheduler has blocks for ``external`` tokens: order the load. 0: it does not want any."""
        match = self._matches.pop(request_id, None)
        if not external:
            if match is not None:
                match.release()
            return
        if match is None or match.lease is None or external > match.tokens:
            # It counts on tokens that were not offered: only an answer, and that a failure, keeps it going.
            self._order_failure(request_id, block_ids)
            return
        grid, lease = self._grid, match.lease
        begin = match.computed // grid.block_tokens
        end = (match.computed + external) // grid.block_tokens
        blocks = []
        for chunk in range(match.skip, -(-end // grid.chunk_blocks)):
            first = chunk * grid.chunk_blocks
            blocks.append(
                [block_ids[i] if begin <= i < end else NULL_BLOCK for i in range(first, first + grid.chunk_blocks)]
            )
        self._loading[request_id] = _Loading(lease, match.skip, self._ranks)
        self._jobs.append(
            LoadJob(
                request_id, lease.lease_id, lease.epoch, lease.locations[: len(blocks)], blocks, not self.asynchronous
            )
        )

    def _order_failure(self, request_id: str, block_ids: list[int]) -> None:
        self._loading[request_id] = _Loading(None, 0, self._ranks)
        nowhere = LoadJob(request_id, 0, NO_EPOCH, [], [block_ids], not self.asynchronous)
        self._jobs.append(nowhere)

    def take_jobs(self) -> list[LoadJob]:
        """The loads ordered since the last step."""
        jobs, self._jobs = self._jobs, []
        return jobs

    def report(self, request_id: str, report: LoadReport) -> int | None:
        """Ranks are through with a load. Returns the first chunk of the request that is not there, when one failed."""
        loading = self._loading.get(request_id)
        if loading is None:
            return None
        loading.ranks -= report.ranks
        if loading.ranks <= 0:
            del self._loading[request_id]
            if loading.lease is not None:
                loading.lease.release()
        if report.failed_from is None:
            return None
        self._no_more.add(request_id)
        return loading.first_chunk + report.failed_from

    def is_loading(self, request_id: str) -> bool:
        """Whether a load of the request is ordered or under way."""
        return request_id in self._loading

    @property
    def waiting(self) -> bool:
        """Whether requests wait for chunks on their way."""
        return bool(self._waits)

    def end(self, request_id: str) -> None:
        """The request is gone. A load under way goes on; its lease ends with it."""
        match = self._matches.pop(request_id, None)
        if match is not None:
            match.release()
        self._waits.end(request_id)
        self._no_more.discard(request_id)
