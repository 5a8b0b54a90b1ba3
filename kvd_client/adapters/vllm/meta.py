"""What the two halves of the connector tell each other: the scheduler's orders, the workers' answers.

Everything here crosses process borders inside one engine (pickled by vLLM), never the border to the daemon.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

if TYPE_CHECKING:
    from kvd.wire.chunks import Location
    from kvd_client.path import Attachment

#: vLLM's null block: in every pool, never owned by a request, its content never used. Pages that must not be written
#: (because another request shares the engine's block) are written here instead.
NULL_BLOCK = 0

#: Epoch of an order that has no session: whoever gets it reports a failure.
NO_EPOCH = -1


@dataclass(frozen=True)
class LoadJob:
    """Fill pages of one request from leased slots, in prefix order."""

    request_id: str
    lease_id: int
    epoch: int
    locations: list[Location]
    #: Engine block ids per chunk; NULL_BLOCK where the chunk's page is not wanted.
    blocks: list[list[int]]
    #: The forward pass of this very step needs the pages.
    synchronous: bool

    def blocks_from(self, chunk: int) -> set[int]:
        """The engine's blocks that stay unfilled when the load breaks off at ``chunk``."""
        return {block for chunk_blocks in self.blocks[chunk:] for block in chunk_blocks} - {NULL_BLOCK}


@dataclass(frozen=True)
class StoreJob:
    """Copy finished chunks into reserved slots."""

    job_id: int
    lease_id: int
    epoch: int
    locations: list[Location]
    blocks: list[list[int]]


@dataclass
class KvdMetadata(KVConnectorMetadata):
    """One step's orders, the same for every rank."""

    attachment: Attachment | None = None
    loads: list[LoadJob] = field(default_factory=list)
    stores: list[StoreJob] = field(default_factory=list)
    #: Finished requests whose blocks are free again once this step's stores have started.
    finished_sending: set[str] = field(default_factory=set)
    #: The step has nothing to compute: the engine only waits for transfers.
    idle: bool = False


@dataclass
class StoreReport:
    """How a store job went: the ranks that are through with it, and the chunks (by place in the job) that failed."""

    ranks: int
    failed: set[int]


@dataclass
class LoadReport:
    """How a load job went: the ranks that are through with it, and the first chunk that failed on any (None: none)."""

    ranks: int
    failed_from: int | None


@dataclass
class WorkerNews(KVConnectorWorkerMetadata):
    """What the workers report with a step's output."""

    stored: dict[int, StoreReport] = field(default_factory=dict)
    loaded: dict[str, LoadReport] = field(default_factory=dict)
    #: Epoch of a session -> ranks that have opened a data path of it.
    attached: dict[int, int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        """Whether there is anything to tell."""
        return bool(self.stored or self.loaded or self.attached)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> WorkerNews:
        """The news of two ranks, or of two steps, as one."""
        assert isinstance(other, WorkerNews)
        for job_id, stored in other.stored.items():
            mine = self.stored.setdefault(job_id, StoreReport(0, set()))
            mine.ranks += stored.ranks
            mine.failed |= stored.failed
        for request_id, loaded in other.loaded.items():
            known = self.loaded.setdefault(request_id, LoadReport(0, None))
            known.ranks += loaded.ranks
            failures = [f for f in (known.failed_from, loaded.failed_from) if f is not None]
            known.failed_from = min(failures, default=None)
        for epoch, ranks in other.attached.items():
            self.attached[epoch] = self.attached.get(epoch, 0) + ranks
        return self


@dataclass(frozen=True)
class Geometry:
    """The chunk as every rank must see it. What a rank finds out about its pages that the scheduler cannot know."""

    attention_backend: str
    platform: str
    element: str
    num_layers: int
    num_kv_heads: int
    head_sizes: str
    page_layout: str
    page_bytes: int
    block_tokens: int
    chunk_blocks: int

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a whole chunk, all layers and heads."""
        return self.num_layers * self.chunk_blocks * self.num_kv_heads * self.page_bytes


@dataclass(frozen=True)
class WorkerFacts(KVConnectorHandshakeMetadata):
    """A rank's report at start: the geometry, or why its pages cannot be shared."""

    geometry: Geometry | None
    problem: str = ""
    #: Bytes that this rank can take out of its pages in one step without holding it up.
    step_bytes: int = 0
    #: The memory node that this rank's GPU, or on a CPU the rank itself, is near.
    numa_node: int | None = None
