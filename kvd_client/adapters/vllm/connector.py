"""vLLM's view of kvd: the connector class, a thin shell around its two halves. Written for vLLM 0.32 and 0.33.

Every hook is guarded: whatever goes wrong in here, the engine goes on and computes what it could not load.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.config import CUDAGraphMode
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from kvd_client.adapters.vllm.log import guarded, logger
from kvd_client.adapters.vllm.meta import KvdMetadata, WorkerFacts
from kvd_client.adapters.vllm.options import parse_options
from kvd_client.adapters.vllm.scheduler import Scheduler
from kvd_client.adapters.vllm.stats import KvdPromMetrics, KvdStats
from kvd_client.adapters.vllm.worker import Worker

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request


def _nothing() -> None:
    """What a failed hook answers when vLLM expects no answer."""


def _waits_for_layers(context: ForwardContext) -> bool:
    """Whether the forward pass that runs in this context will call ``wait_for_layer_load``: it does not without
    attention, nor where attention is replayed as a part of one CUDA graph. The GPU model runner V2 replays such a graph
    without any context of its own, and then this one has no attention either."""
    return bool(context.attn_metadata) and context.cudagraph_runtime_mode != CUDAGraphMode.FULL


class KvdConnector(KVConnectorBase_V1, SupportsHMA):
    """Shares an engine's KV cache through the kvd daemon. Options: ``options.Options``."""

    _cache_hit_source = CacheHitSource.HOST

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        transfer = self._kv_transfer_config
        options, problems = parse_options(transfer.kv_connector_extra_config or {})
        self._scheduler: Scheduler | None = None
        self._worker: Worker | None = None
        if role == KVConnectorRole.SCHEDULER:
            for problem in problems:
                logger.error("kvd: kv_connector_extra_config: %s", problem)
            if transfer.kv_load_failure_policy != "recompute":
                # The scheduler reads this after it has made its connector. A cache that cannot deliver is a miss.
                transfer.kv_load_failure_policy = "recompute"
                logger.info("kvd: kv_load_failure_policy set to recompute: a failed load is computed, not an error")
            self._scheduler = self._make_scheduler(vllm_config, kv_cache_config, options)
        else:
            self._worker = Worker(vllm_config, kv_cache_config, options)

    @guarded(_nothing)
    def _make_scheduler(
        self, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, options: Any
    ) -> Scheduler | None:
        return Scheduler(vllm_config, kv_cache_config, options)

    @property
    def requires_kv_delivery(self) -> bool:
        """A cache: a store that does not happen is a later miss."""
        return False

    @property
    def _orders(self) -> KvdMetadata | None:
        orders = self._connector_metadata
        return orders if isinstance(orders, KvdMetadata) else None

    # -- scheduler side

    @guarded(_nothing)
    def on_new_request(self, request: Request) -> None:
        """A request has come in."""
        if self._scheduler is not None:
            self._scheduler.arrived(request)

    @guarded(lambda: (0, False))
    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Tokens that can be loaded, and whether beside the steps; None: not known yet."""
        return self._scheduler.match(request, num_computed_tokens) if self._scheduler is not None else (0, False)

    @guarded(_nothing)
    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """Blocks for the tokens to load are there."""
        if self._scheduler is not None:
            self._scheduler.allocated(request, blocks.get_block_ids(), num_external_tokens)

    @guarded(KvdMetadata)
    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KvdMetadata:
        """The step's orders to the workers."""
        return self._scheduler.orders(scheduler_output) if self._scheduler is not None else KvdMetadata()

    @guarded(_nothing)
    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """The workers' answers."""
        if self._scheduler is not None:
            self._scheduler.heard(connector_output)

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """The request is over (one KV group)."""
        return self.request_finished_all_groups(request, (block_ids,))

    @guarded(lambda: (False, None))
    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """The request is over: True when its blocks are to be kept until their store has started."""
        return (self._scheduler is not None and self._scheduler.finished(request, block_ids)), None

    @guarded(lambda: False)
    def has_pending_push_work(self) -> bool:
        """Whether workers still have to report on stores."""
        return self._scheduler is not None and self._scheduler.pending

    @guarded(_nothing)
    def set_xfer_handshake_metadata_pp_aware(self, metadata: dict[tuple[int, int], Any]) -> None:
        """What the ranks have found out about their pages; before the first request."""
        if self._scheduler is not None:
            self._scheduler.meet([fact for fact in metadata.values() if isinstance(fact, WorkerFacts)])

    @guarded(lambda: False)
    def reset_cache(self) -> bool | None:
        """Nothing cached so far may be used by this engine any more."""
        if self._scheduler is not None:
            self._scheduler.reset()
        return True

    # -- worker side

    @guarded(_nothing)
    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """The pages."""
        if self._worker is not None:
            self._worker.register(kv_caches)

    @guarded(_nothing)
    def unregister_kv_caches(self) -> None:
        """The engine goes to sleep (vLLM 0.33)."""
        if self._worker is not None:
            self._worker.unregister()

    @guarded(_nothing)
    def restore_kv_caches(self) -> None:
        """The engine has woken up (vLLM 0.33)."""
        if self._worker is not None:
            self._worker.restore()

    def get_handshake_metadata(self) -> WorkerFacts | None:
        """What this rank has found out about its pages."""
        return self._worker.facts if self._worker is not None else None

    def bind_connector_metadata(self, connector_metadata: Any) -> None:
        """A step begins."""
        super().bind_connector_metadata(connector_metadata)
        self._begin()

    @guarded(_nothing)
    def _begin(self) -> None:
        if self._worker is not None and self._orders is not None:
            self._worker.begin(self._orders)

    @guarded(_nothing)
    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """Starts loads; waits for those that the step itself needs unless its forward pass will."""
        if self._worker is not None and self._orders is not None:
            self._worker.load(self._orders, by_layer=_waits_for_layers(forward_context))

    @guarded(_nothing)
    def wait_for_layer_load(self, layer_name: str) -> None:
        """The forward pass comes to this layer."""
        if self._worker is not None:
            self._worker.await_layer(layer_name)

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing: whole chunks are stored, after the step that completed them."""

    @guarded(_nothing)
    def wait_for_save(self) -> None:
        """Takes chunks out of their pages."""
        if self._worker is not None and self._orders is not None:
            self._worker.store(self._orders)

    @guarded(lambda: (None, None))
    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Requests whose blocks are free again, requests whose load is over."""
        if self._worker is None or self._orders is None:
            return None, None
        return self._worker.finished(self._orders)

    @guarded(set)
    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks that were not loaded."""
        return self._worker.take_lost_blocks() if self._worker is not None else set()

    @guarded(_nothing)
    def build_connector_worker_meta(self) -> Any:
        """News for the scheduler."""
        return self._worker.take_news() if self._worker is not None else None

    # -- both

    @guarded(_nothing)
    def shutdown(self) -> None:
        """The end of the engine."""
        if self._scheduler is not None:
            self._scheduler.close()
        if self._worker is not None:
            self._worker.unregister()

    @guarded(_nothing)
    def get_kv_connector_stats(self) -> KvdStats | None:
        """Numbers of this half since the last time."""
        half = self._scheduler or self._worker
        return half.take_stats() if half is not None else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KvdStats | None:
        """Statistics from their wire form."""
        return KvdStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KvdPromMetrics:
        """The counters on the engine's Prometheus page."""
        return KvdPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)
