"""The scheduler half of the connector: one Lookup, one Reserve, one Commit for all ranks; the workers only copy."""

from __future__ import annotations

import secrets
import threading
import time
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING, Any

from kvd_client.adapters.vllm.controller import Controller
from kvd_client.adapters.vllm.identity import build_identity, check_cacheable, weights_revision
from kvd_client.adapters.vllm.log import complain, logger
from kvd_client.adapters.vllm.lora import Adapters
from kvd_client.adapters.vllm.matching import Grid, Matching
from kvd_client.adapters.vllm.meta import Geometry, KvdMetadata, WorkerFacts, WorkerNews
from kvd_client.adapters.vllm.options import Options
from kvd_client.adapters.vllm.stats import KvdStats, Tally
from kvd_client.adapters.vllm.storing import Storing
from kvd_client.adapters.vllm.waiting import Waits
from kvd_client.adapters.vllm.weights import Unidentified
from kvd_client.client import Client
from kvd_client.messages import NamespaceHandle

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request


#: The engine's start waits so long for the weights to be identified, and for the daemon to answer, so that already the
#: first request can find something. What takes longer goes on in the background.
IDENTIFY_WAIT_S = 5.0
CONNECT_WAIT_S = 2.0
#: A step that computes nothing because requests wait for chunks takes so long at least: vLLM steps on at once.
IDLE_STEP_S = 0.001


class Scheduler:
    """One engine. Every method is called on its thread. Two may wait: ``match``, for the lookup's deadline, and
    ``orders``, for IDLE_STEP_S when there is nothing to do."""

    def __init__(self, config: VllmConfig, kv_cache_config: KVCacheConfig, options: Options) -> None:
        self._config = config
        self._options = options
        self._tally = Tally()
        self._controller: Controller | None = None
        self._matching: Matching | None = None
        self._storing: Storing | None = None
        self._geometry: Geometry | None = None
        self._revision: Future[str] | None = None
        self._sharing: dict[str, str] | None = None  # what a reset added to the identity; None: not shared (yet)
        self._ranks = config.parallel_config.world_size
        self._attached: dict[int, int] = {}
        self._requests: dict[str, Request] = {}
        self._adapters = Adapters()
        self._orphans: set[str] = set()  # requests from before a reset: their pages belong to another namespace
        transfer = config.kv_transfer_config
        assert transfer is not None
        self._name = f"vllm {transfer.engine_id}"[:128]
        self._loads, self._stores = transfer.is_kv_consumer, transfer.is_kv_producer
        try:
            check_cacheable(config, kv_cache_config)
            # The weights are read while the engine starts.
            self._revision = _background(lambda: weights_revision(config))
        except (Unidentified, ValueError) as error:
            self._refuse(str(error))

    # -- start and end

    def meet(self, facts: list[WorkerFacts]) -> None:
        """What all ranks have found out about their pages."""
        if self._revision is None:
            return
        problem = next((fact.problem for fact in facts if fact.geometry is None), None)
        geometries = {fact.geometry for fact in facts}
        if problem is None and (len(geometries) != 1 or len(facts) != self._ranks):
            problem = "the ranks do not agree on the pages of their KV caches"
        geometry = facts[0].geometry if facts else None
        if problem is not None or geometry is None:
            self._refuse(problem or "no rank has shown its KV caches")
            return
        nodes = {fact.numa_node for fact in facts}
        try:
            client = Client(self._options.endpoint, name=self._name, numa_node=nodes.pop() if len(nodes) == 1 else None)
        except ValueError as error:
            self._refuse(str(error))
            return
        self._controller = Controller(client, self._options.lookup_timeout_s, self._tally)
        grid = Grid(geometry.block_tokens, geometry.chunk_blocks, self._adapters)
        load_async = self._options.load_async
        if not load_async and self._config.scheduler_config.async_scheduling:
            logger.warning(
                "kvd: load_async=false needs --no-async-scheduling: the engine cannot take back a step that it has "
                "already scheduled on top of a failed load. Loading asynchronously."
            )
            load_async = True
        self._geometry = geometry
        waits = Waits(self._options.promote_timeout_s, self._tally)
        self._matching = Matching(self._controller, grid, self._ranks, waits, load_async=load_async)
        step_chunks = max(1, sum(fact.step_bytes for fact in facts) // geometry.chunk_bytes)
        self._storing = Storing(self._controller, grid, self._ranks, step_chunks, self._options.store_timeout_s)
        wait([self._revision], IDENTIFY_WAIT_S)
        self._controller.await_daemon(CONNECT_WAIT_S)

    def close(self) -> None:
        """The end of the engine."""
        self._adapters.close()
        if self._storing is not None:
            self._storing.close()
        if self._controller is not None:
            self._controller.close()
            self._controller = None

    def reset(self) -> None:
        """The engine's owner wants nothing of what was cached so far, perhaps because the weights have changed: from
        here on this process shares with nobody but itself."""
        if self._controller is None or self._storing is None or self._matching is None:
            return
        self._storing.drop_all()
        self._orphans |= set(self._requests)
        self._controller.use(None)
        self._sharing = {"reset": secrets.token_hex(16)}
        if self._revision is not None and self._revision.done():
            self._share(self._sharing)
        logger.warning("kvd: the cache was reset; from now on this engine shares with no other one")

    # -- a request's way

    def arrived(self, request: Request) -> None:
        """A request has come in."""
        self._requests[request.request_id] = request

    def match(self, request: Request, computed: int) -> tuple[int | None, bool]:
        """Tokens that can be loaded after the first ``computed``, and whether beside the steps. None: they are on their
        way, ask again at the next step."""
        matching, storing = self._matching, self._storing
        if matching is None or storing is None or not self._loads or not self._ready():
            return 0, False
        if request.request_id in self._orphans:
            return 0, False
        tokens, beside, known = matching.match(request, computed)
        storing.known(request.request_id, known)
        return tokens, beside

    def allocated(self, request: Request, blocks: tuple[list[int], ...], external: int) -> None:
        """The scheduler has made room for the tokens to load (0: none)."""
        if self._matching is not None:
            self._matching.allocated(request.request_id, blocks[0] if blocks else [], external)

    def finished(self, request: Request, blocks: tuple[list[int], ...]) -> bool:
        """The request is over. True: its blocks must be kept until the workers report it as sent."""
        request_id = request.request_id
        self._requests.pop(request_id, None)
        orphan = request_id in self._orphans
        self._orphans.discard(request_id)
        if self._matching is None or self._storing is None:
            return False
        loading = self._matching.is_loading(request_id)
        self._matching.end(request_id)
        # What was counted as computed because it was to be loaded, or is still in flight, is not.
        computed = 0 if loading or orphan else request.num_computed_tokens - request.num_in_flight_tokens
        keep = self._storing.finished(request, computed if self._stores else 0, blocks[0] if blocks else [])
        self._adapters.end(request_id)
        return keep

    # -- a step

    def orders(self, output: SchedulerOutput) -> KvdMetadata:
        """This step's orders. Loads come first and always: a load that is not ordered would be waited for for ever."""
        orders = KvdMetadata()
        if self._matching is None or self._controller is None:
            return orders
        orders.loads = self._matching.take_jobs()
        orders.idle = not output.total_num_scheduled_tokens
        if orders.idle and self._matching.waiting and not orders.loads:
            time.sleep(IDLE_STEP_S)
        orders.attachment = self._controller.attachment() if self._revision is not None else None
        try:
            self._order_stores(output, orders)
        except Exception:
            complain("order-stores", "kvd: this step's stores are skipped", exc_info=True)
        return orders

    def _order_stores(self, output: SchedulerOutput, orders: KvdMetadata) -> None:
        storing = self._storing
        if storing is None or not self._stores:
            return
        for request_id in output.preempted_req_ids or ():
            storing.preempted(request_id)
        storing.take_answers()
        epoch = self._controller.epoch if self._controller is not None else 0
        orders.stores, orders.finished_sending = storing.take_jobs(
            _tables(output), attached=self._attached.get(epoch, 0) >= self._ranks
        )
        if self._ready():
            for request_id, scheduled in output.num_scheduled_tokens.items():
                request = self._requests.get(request_id)
                if request is not None and request_id not in self._orphans:
                    storing.complete(request, request.num_computed_tokens + scheduled)
            storing.flush()

    def heard(self, output: KVConnectorOutput) -> None:
        """The workers' answers to a step."""
        matching, storing = self._matching, self._storing
        if matching is None or storing is None:
            return
        news = output.kv_connector_worker_meta
        if output.invalid_block_ids and not matching.asynchronous:
            storing.drop_all()  # this very step has computed on top of pages that were not loaded
        if not isinstance(news, WorkerNews):
            return
        for epoch, ranks in news.attached.items():
            self._attached = {epoch: self._attached.get(epoch, 0) + ranks}
        for request_id, load in news.loaded.items():
            if (missing := matching.report(request_id, load)) is not None:
                storing.rewind(request_id, missing)
        for job_id, store in news.stored.items():
            storing.report(job_id, store)

    @property
    def pending(self) -> bool:
        """Whether steps are needed even when no request wants one."""
        return self._storing is not None and self._storing.pending

    def take_stats(self) -> KvdStats | None:
        """Numbers since the last time."""
        return self._tally.take()

    # -- identity

    def _ready(self) -> bool:
        """Whether there is a namespace; looks, now and then cheaply, whether the weights have been read."""
        if self._controller is None or self._revision is None:
            return False
        if self._sharing is None and self._revision.done():
            self._share({})
        return self._controller.namespace is not None

    def _share(self, extra: dict[str, str]) -> None:
        self._sharing = extra
        controller, revision, geometry = self._controller, self._revision, self._geometry
        if controller is None or revision is None or geometry is None:
            return
        try:
            identity = build_identity(self._config, geometry, revision.result(timeout=0), extra)
        except Unidentified as error:
            self._refuse(str(error))
            return
        except Exception as error:
            self._refuse(f"it could not be identified: {error!r}")
            return
        controller.use(NamespaceHandle(identity, geometry.chunk_bytes))
        logger.info(
            "kvd: sharing KV of %s (weights %s): chunks of %d tokens, %.1f MiB",
            identity.model,
            identity.weights_revision[:20],
            geometry.block_tokens * geometry.chunk_blocks,
            geometry.chunk_bytes / (1 << 20),
        )

    def _refuse(self, reason: str) -> None:
        """Nothing is shared from now on."""
        logger.warning("kvd: this engine's KV is not shared: %s", reason)
        self._revision = None
        if self._controller is not None:
            self._controller.use(None)


def _tables(output: SchedulerOutput) -> Callable[[str], list[int] | None]:
    """The block tables of the requests that run in this step."""

    def table(request_id: str) -> list[int] | None:
        state: Any = output.kv_connector_block_state
        groups = state.get_block_ids(request_id) if state is not None else None
        return groups[0] if groups else None

    return table


def _background(work: Callable[[], str]) -> Future[str]:
    """``work`` on a thread of its own that does not keep the process alive."""
    future: Future[str] = Future()

    def run() -> None:
        began = time.monotonic()
        try:
            result = work()
        except Exception as error:
            future.set_exception(error)
        else:
            logger.info("kvd: weights identified in %.1f s", time.monotonic() - began)
            future.set_result(result)

    threading.Thread(target=run, name="kvd-identify", daemon=True).start()
    return future
