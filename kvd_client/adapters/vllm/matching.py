"""The scheduler half's reading: which tokens a request can load instead of computing, and the jobs that load them."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvd_client.adapters.vllm.lora import Adapters
from kvd_client.adapters.vllm.meta import NO_EPOCH, NULL_BLOCK, LoadJob, LoadReport
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

    def __init__(self, controller: Controller, grid: Grid, ranks: int, *, load_async: bool) -> None:
        self._controller = controller
        self._grid = grid
        self._ranks = ranks
        #: Whether loads run beside the steps.
        self.asynchronous = load_async
        self._matches: dict[str, _Match] = {}
        self._loading: dict[str, _Loading] = {}
        self._jobs: list[LoadJob] = []
        self._no_more: set[str] = set()  # requests whose load has failed: they compute

    def match(self, request: Request, computed: int) -> tuple[int, bool, int]:
        """External tokens after ``computed`` (a multiple of a block), whether they come asynchronously, and how many
        chunks at the front of the request are known to be stored.

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
        if match is None or not self._fresh(match, computed):
            self.forget(request.request_id)
            lease = self._controller.lookup([grid.key(request, i) for i in range(chunks)], skip)
            held = skip + len(lease) if lease is not None and len(lease) else 0
            tokens = max(0, min(held * grid.chunk_tokens, limit) - computed)
            match = _Match(time.monotonic(), computed, skip, lease, tokens)
            if not tokens:
                match.release()
            self._matches[request.request_id] = match
        known = match.skip + len(match.lease) if match.lease is not None and len(match.lease) else 0
        return match.tokens, self.asynchronous and match.tokens > 0, known

    def _fresh(self, match: _Match, computed: int) -> bool:
        """Whether an answer still holds. A lease is looked up anew, and so replaced, after a third of its life."""
        age = time.monotonic() - match.at
        if match.computed != computed:
            return False
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

    def forget(self, request_id: str) -> None:
        """The lookup's answer is not wanted any more. A load under way goes on; its lease ends with it."""
        match = self._matches.pop(request_id, None)
        if match is not None:
            match.release()

    def end(self, request_id: str) -> None:
        """The request is gone."""
        self.forget(request_id)
        self._no_more.discard(request_id)
