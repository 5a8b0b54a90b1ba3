"""The worker half of the connector: knows this rank's pages, starts copies in the engine's hooks, collects outcomes."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvd_client.adapters.vllm.identity import check_cacheable, choose_chunk_blocks
from kvd_client.adapters.vllm.loading import Progress
from kvd_client.adapters.vllm.log import complain, logger
from kvd_client.adapters.vllm.meta import Geometry, KvdMetadata, LoadJob, WorkerFacts, WorkerNews
from kvd_client.adapters.vllm.options import Options
from kvd_client.adapters.vllm.stats import KvdStats, Tally
from kvd_client.adapters.vllm.transfer import Transfers
from kvd_client.adapters.vllm.weights import Unidentified
from kvd_client.copier import MAX_INFLIGHT_BYTES, make_copier
from kvd_client.layout import ChunkLayout, LayoutError, Shard
from kvd_client.numa import node_of_device

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

#: A step without anything to compute waits so long for a transfer to end. Engines step again at once, and a thread that
#: spins takes the time (and the GIL) from those that copy.
IDLE_WAIT_S = 0.002
#: Bytes that a rank takes out of its pages in one step. On a device the pages are gathered into a ring (half of it: the
#: step before may still be leaving) at the speed of its memory; on a CPU the hook copies all of it.
DEVICE_STEP_BYTES = MAX_INFLIGHT_BYTES // 2
CPU_STEP_BYTES = 32 << 20
#: A synchronous load is waited for this much longer than its own deadline, after which its thread is given up.
GRACE_S = 5.0


@dataclass
class _Needed:
    """The loads that this step's forward pass needs."""

    jobs: list[LoadJob]
    progress: Progress
    deadline: float
    by_layer: bool
    asked: set[int] = field(default_factory=set)  # layers that the engine has waited for before it used them
    late: bool = False


class Worker:
    """One rank. Every method is called on the engine's thread."""

    def __init__(self, config: VllmConfig, kv_cache_config: KVCacheConfig, options: Options) -> None:
        self._config = config
        self._kv_cache_config = kv_cache_config
        self._options = options
        self._tally = Tally()
        self._facts = WorkerFacts(None, "the engine has not shown its KV caches")
        self._transfers: Transfers | None = None
        self._kv_caches: dict[str, torch.Tensor] = {}
        self._stores_due = False
        self._layers: dict[str, int] = {}  # this rank's layers, by name, counted from its first
        self._needed: _Needed | None = None
        self._asks_for_layers = True
        self._news = WorkerNews()
        self._lost_blocks: set[int] = set()

    # -- start and end

    def register(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Learns the pages. What it finds out goes to the scheduler as ``facts``."""
        self.unregister()
        self._kv_caches = kv_caches
        try:
            check_cacheable(self._config, self._kv_cache_config)
            geometry, views, shard = describe(self._config, self._kv_cache_config, self._options, kv_caches)
            layout = ChunkLayout(
                (geometry.page_bytes,) * geometry.num_layers, geometry.num_kv_heads, geometry.chunk_blocks
            )
            copier = make_copier(views, layout, shard)
        except (Unidentified, LayoutError) as error:
            self._facts = WorkerFacts(None, str(error))
            return
        except Exception as error:
            complain("register", "kvd: the KV caches could not be understood", exc_info=True)
            self._facts = WorkerFacts(None, f"the KV caches could not be understood: {error!r}")
            return
        self._transfers = Transfers(copier, self._options, self._tally)
        self._layers = {name: layer for layer, name in enumerate(views)}
        device = next(iter(views.values())).device
        step_bytes = CPU_STEP_BYTES if device.type == "cpu" else DEVICE_STEP_BYTES
        self._facts = WorkerFacts(geometry, step_bytes=step_bytes, numa_node=node_of_device(device))

    @property
    def facts(self) -> WorkerFacts:
        """For the scheduler, once the caches are registered."""
        return self._facts

    def unregister(self) -> None:
        """Lets go of the pages, because the engine goes to sleep or ends. Waits for what is under way."""
        if self._transfers is not None:
            self._transfers.close()
            self._transfers = self._needed = None

    def restore(self) -> None:
        """The pages are back where they were."""
        self.register(self._kv_caches)

    # -- the hooks of a step, in this order

    def begin(self, orders: KvdMetadata) -> None:
        """A step begins."""
        self._stores_due = True
        if self._transfers is not None:
            self._transfers.attach(orders.attachment)

    def load(self, orders: KvdMetadata, *, by_layer: bool) -> None:
        """Starts the step's loads. Those that its forward pass needs are waited for here, or in ``await_layer`` when
        the forward pass is going to ask for each layer before it uses it (``by_layer``)."""
        if self._transfers is None:
            if orders.loads:
                complain("no-pages", "kvd: a load was ordered, but there are no pages to load into")
            self._lose(orders.loads)
            return
        for job in orders.loads:
            if not job.synchronous:
                self._start(self._transfers, [job], by_layer=False)
        needed = [job for job in orders.loads if job.synchronous]
        if needed:
            by_layer = by_layer and self._asks_for_layers
            deadline = time.monotonic() + self._options.load_timeout_s + GRACE_S
            if (progress := self._start(self._transfers, needed, by_layer=by_layer)) is not None:
                self._needed = _Needed(needed, progress, deadline, by_layer)
            if not by_layer:
                self._settle()

    def await_layer(self, name: str) -> None:
        """The forward pass is about to use this layer's pages. Returns when they are there, or when it is known that
        this step's result cannot be used for the requests whose pages they are; in time either way."""
        needed = self._needed
        if needed is None:
            return
        # A layer that has no pages of its own uses another's: then all of them are waited for.
        layer = self._layers.get(name)
        until = len(self._layers) if layer is None else layer + 1
        needed.late |= not needed.progress.wait(needed.deadline, until)
        if layer is not None:
            needed.asked.add(layer)

    def store(self, orders: KvdMetadata) -> None:
        """Takes the step's chunks out of their pages. Once per step, from whichever hook comes first."""
        if not self._stores_due:
            return
        self._stores_due = False
        for job in orders.stores:
            if self._transfers is not None:
                self._transfers.start_store(job)

    def finished(self, orders: KvdMetadata) -> tuple[set[str], set[str]]:
        """Requests whose blocks are free again, and requests whose asynchronous load is over."""
        self._settle()
        self.store(orders)
        arrived: set[str] = set()
        if self._transfers is not None:
            if orders.idle:
                self._transfers.wait(IDLE_WAIT_S)
            news, arrived, lost = self._transfers.collect()
            self._news.aggregate(news)
            self._lost_blocks |= lost
        else:
            arrived = {job.request_id for job in orders.loads if not job.synchronous}
        return orders.finished_sending, arrived

    def take_lost_blocks(self) -> set[int]:
        """Blocks that should have been loaded and were not."""
        lost, self._lost_blocks = self._lost_blocks, set()
        return lost

    def take_news(self) -> WorkerNews | None:
        """What the scheduler half is to hear."""
        news, self._news = self._news, WorkerNews()
        return news if news else None

    def take_stats(self) -> KvdStats | None:
        """Numbers since the last time."""
        return self._tally.take()

    # -- inside

    def _start(self, transfers: Transfers, jobs: list[LoadJob], *, by_layer: bool) -> Progress | None:
        try:
            return transfers.start_loads(jobs, by_layer=by_layer)
        except Exception:
            complain("start-load", "kvd: a load could not be started", exc_info=True)
            for job in jobs:
                transfers.lose(job)
            return None

    def _settle(self) -> None:
        """Waits until the loads that the step needed are over. Before its outcome is collected: a load that fails after
        the forward pass has used a part of it must be reported with this very step, whose result is then dropped."""
        needed, self._needed = self._needed, None
        if needed is None:
            return
        if not needed.progress.wait(needed.deadline) or needed.late:
            logger.error("kvd: a load did not end by its deadline; computing its tokens")
            self._lose(needed.jobs)
        elif needed.by_layer and len(needed.asked) < len(self._layers):
            self._asks_for_layers = False
            logger.warning("kvd: the engine did not wait for every layer; from now on loads end before its step begins")
            self._lose(needed.jobs)

    def _lose(self, jobs: list[LoadJob]) -> None:
        for job in jobs:
            self._lost_blocks |= job.blocks_from(0)


def describe(
    config: VllmConfig, kv_cache_config: KVCacheConfig, options: Options, kv_caches: dict[str, torch.Tensor]
) -> tuple[Geometry, dict[str, torch.Tensor], Shard]:
    """The geometry of the whole model's chunks, this rank's layers in order (manager blocks first), and its place.

    Raises Unidentified when something about the pages is not what this connector understands.
    """
    from vllm.distributed import get_tensor_model_parallel_rank
    from vllm.v1.kv_cache_interface import group_kernel_blocks

    group = kv_cache_config.kv_cache_groups[0]
    model, parallel, spec = config.model_config, config.parallel_config, group.kv_cache_spec
    names, first, total = _layers(config, group.layer_names)
    missing = [name for name in names if name not in kv_caches]
    if missing:
        raise Unidentified(f"no KV cache for layer {missing[0]}")
    views = {name: group_kernel_blocks(kv_caches[name], kv_cache_config.num_blocks) for name in names}
    shapes = {(view.shape[1:], view.dtype) for view in views.values()}
    if len(shapes) != 1 or next(iter(views.values())).dim() not in (4, 5):
        raise Unidentified(f"layers with different pages are not cached: {sorted(map(str, shapes))}")
    view = next(iter(views.values()))
    heads, tokens, content = view.shape[-3:]
    splits = view.shape[1] if view.dim() == 5 else 1
    all_heads = 1 if model.use_mla else model.get_total_num_kv_heads()
    if heads != max(1, all_heads // parallel.tensor_parallel_size) or tokens * splits != spec.block_size:
        raise Unidentified(
            f"pages of shape {tuple(view.shape)} do not hold {all_heads} heads by {spec.block_size} tokens"
        )
    page_bytes = splits * tokens * content * view.element_size()
    chunk_blocks = choose_chunk_blocks(spec.block_size, total * all_heads * page_bytes, options.chunk_tokens)
    geometry = Geometry(
        attention_backend=_backend(config, names),
        platform=_platform(config, spec),
        element=str(view.dtype).removeprefix("torch."),
        num_layers=total,
        num_kv_heads=all_heads,
        head_sizes=f"{spec.head_size}+{spec.head_size_v}",
        page_layout=f"{splits}x{tokens}x{content} {spec.kv_quant_mode.name} window={spec.sliding_window}",
        page_bytes=page_bytes,
        block_tokens=spec.block_size,
        chunk_blocks=chunk_blocks,
    )
    return (
        geometry,
        views,
        Shard(first, first + len(names), get_tensor_model_parallel_rank(), parallel.tensor_parallel_size),
    )


def _layers(config: VllmConfig, layer_names: list[str]) -> tuple[list[str], int, int]:
    """This rank's layers in order, the number of the first, and the number of layers of the whole model."""
    from vllm.model_executor.models.utils import extract_layer_index

    if config.parallel_config.pipeline_parallel_size == 1:
        return list(layer_names), 0, len(layer_names)
    numbers = {extract_layer_index(name): name for name in layer_names}
    order = sorted(numbers)
    if len(order) != len(layer_names) or order[-1] - order[0] + 1 != len(order):
        raise Unidentified("with pipeline parallelism, only models with one KV cache in each layer are cached")
    return [numbers[i] for i in order], order[0], config.model_config.get_total_num_hidden_layers()


def _backend(config: VllmConfig, names: list[str]) -> str:
    from vllm.distributed.kv_transfer.kv_connector.utils import get_current_attn_backends

    return "+".join(sorted(backend.get_name() for backend in get_current_attn_backends(config, names)))


def _platform(config: VllmConfig, spec: Any) -> str:
    """The kind of device; on CPUs with the instruction set, for which the attention kernels arrange pages."""
    from vllm.platforms import current_platform

    kind = str(current_platform.device_type)
    if kind != "cpu":
        return kind
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    isa = _get_attn_isa(config.model_config.dtype, spec.block_size, spec.head_size, config.cache_config.cache_dtype)
    return f"{kind} {sys.byteorder} {isa}"
