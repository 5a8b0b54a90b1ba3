"""The worker's transfer threads: one moves loads, one sees stores through. No RPC and no wait on the engine's thread.

The engine's thread hands over jobs and collects outcomes; both are short dictionary work under one lock.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TYPE_CHECKING

from kvd.wire.errors import KvdError
from kvd_client.adapters.vllm.buffers import Buffers
from kvd_client.adapters.vllm.loading import Loader, Progress, pieces_of
from kvd_client.adapters.vllm.log import complain, logger
from kvd_client.adapters.vllm.meta import LoadJob, LoadReport, StoreJob, StoreReport, WorkerNews
from kvd_client.adapters.vllm.stats import Tally
from kvd_client.copier import MAX_INFLIGHT_BYTES, Copier, Form, Mark, Pending
from kvd_client.path import Attachment, DataPath, open_path

if TYPE_CHECKING:
    from kvd_client.adapters.vllm.options import Options

#: Most bytes that stores over TCP may hold in memory of their own.
STORE_BUFFER_BYTES = MAX_INFLIGHT_BYTES
#: Bytes of a store are under way for so long at most.
SEND_TIMEOUT_S = 10.0
#: A data path that could not be opened is tried again after this time.
RETRY_S = 1.0
#: How long the end of the engine waits for each thread.
JOIN_S = 5.0


@dataclass
class _Outcome:
    """What has happened since the last collection."""

    news: WorkerNews
    arrived: set[str]  # requests whose asynchronous load is over, well or not
    lost_blocks: set[int]


class Transfers:
    """Moves chunks between the engine's pages and the pool, for one rank."""

    def __init__(self, copier: Copier, options: Options, tally: Tally) -> None:
        self._copier = copier
        self._options = options
        self._tally = tally
        self._lock = threading.Lock()
        self._ended = threading.Condition(self._lock)
        self._tasks = 0
        self._outcome = _Outcome(WorkerNews(), set(), set())
        self._path: tuple[int, DataPath] | None = None
        self._path_lock = threading.Lock()  # held while a store starts and while the path is exchanged: both short
        self._wanted: Attachment | None = None
        self._tried_at = 0.0
        self._store_buffers = Buffers(copier.store_bytes, STORE_BUFFER_BYTES)
        self._loader = Loader(copier)
        self._loads: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._stores: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, args=(queue,), name=name, daemon=True)
            for name, queue in (("kvd-load", self._loads), ("kvd-store", self._stores))
        ]
        for thread in self._threads:
            thread.start()

    # -- the engine's thread

    def attach(self, attachment: Attachment | None) -> None:
        """Called every step: sees to a data path of the current session."""
        if attachment is None:
            return
        now = time.monotonic()
        if self._path_of(attachment.epoch) is not None:
            return
        asked = self._wanted is not None and self._wanted.epoch == attachment.epoch
        if asked and now - self._tried_at < RETRY_S:
            return
        self._wanted, self._tried_at = attachment, now
        self._put(self._loads, lambda: self._open(attachment))

    def start_store(self, job: StoreJob) -> None:
        """Takes the chunks out of the engine's pages: when this returns, the engine may overwrite them."""
        if self._copier.store_bytes == 0:
            self._stored(job, set())
            return
        started = False
        try:
            with self._path_lock:
                path = self._path_of(job.epoch)
                if path is not None:
                    started = self._start_in_place(path, job) if path.kind == "shm" else self._start_packed(path, job)
        except Exception:
            complain("store", "kvd: chunks could not be taken for storing", exc_info=True)
        if not started:
            self._stored(job, set(range(len(job.locations))))

    def start_loads(self, jobs: list[LoadJob], *, by_layer: bool = False) -> Progress:
        """Hands loads to their thread: one after the other, or all together ``by_layer``. All have one deadline."""
        progress = Progress()
        deadline = time.monotonic() + self._options.load_timeout_s
        mark = self._copier.mark()
        load = self._load_layers if by_layer else self._load_chunks
        self._put(self._loads, lambda: load(jobs, mark, deadline, progress))
        return progress

    def lose(self, job: LoadJob) -> None:
        """Reports a load that could not even be handed over."""
        self._loaded(job, 0)

    def wait(self, timeout_s: float) -> None:
        """Waits until a transfer ends, if any is under way."""
        with self._lock:
            if self._tasks and not self._outcome.news:
                self._ended.wait(timeout_s)

    def collect(self) -> tuple[WorkerNews, set[str], set[int]]:
        """News for the scheduler, requests whose asynchronous load is over, blocks that were not filled."""
        with self._lock:
            outcome, self._outcome = self._outcome, _Outcome(WorkerNews(), set(), set())
        return outcome.news, outcome.arrived, outcome.lost_blocks

    def close(self) -> None:
        """Ends the threads once what they have in hand is done, each within JOIN_S, then the path."""
        for queue in (self._loads, self._stores):
            queue.put(None)
        for thread in self._threads:
            thread.join(JOIN_S)
        if any(thread.is_alive() for thread in self._threads):
            logger.warning("kvd: a transfer is still under way at the end; its memory stays mapped")
            return
        if self._path is not None:
            self._close(self._path[1])
        self._copier.close()

    # -- stores

    def _start_in_place(self, path: DataPath, job: StoreJob) -> bool:
        began = time.monotonic()
        views = [path.view(location, self._copier.chunk_bytes) for location in job.locations]
        targets = [view for view in views if view is not None]
        if len(targets) < len(views):
            return False
        pending = self._copier.start_store(job.blocks, targets, Form.SLOT)
        if pending is None:
            return False
        self._put(self._stores, lambda: self._finish_in_place(job, targets, pending, began))
        return True

    def _finish_in_place(self, job: StoreJob, targets: list[memoryview], pending: Pending, began: float) -> None:
        # Should ``wait`` raise, nothing is reported: the slots stay leased, for who knows what still writes to them.
        done = pending.wait(time.monotonic() + SEND_TIMEOUT_S)
        targets.clear()
        self._tally.stored(len(job.locations) if done else 0, self._copier.store_bytes, time.monotonic() - began)
        self._stored(job, set() if done else set(range(len(job.locations))))

    def _start_packed(self, path: DataPath, job: StoreJob) -> bool:
        began = time.monotonic()
        buffers = self._store_buffers.take(len(job.locations))
        if buffers is None:
            return False
        pending = None
        try:
            pending = self._copier.start_store(job.blocks, buffers, Form.PACKED)
        finally:
            if pending is None:
                self._store_buffers.give(buffers)
        if pending is None:
            return False
        self._put(self._stores, lambda: self._finish_packed(path, job, buffers, pending, began))
        return True

    def _finish_packed(
        self, path: DataPath, job: StoreJob, buffers: list[memoryview], pending: Pending, began: float
    ) -> None:
        deadline = time.monotonic() + SEND_TIMEOUT_S
        failed = set(range(len(buffers)))
        gathered = pending.wait(deadline)
        try:
            if gathered:
                pieces, owners = [], []
                for chunk, (location, buffer) in enumerate(zip(job.locations, buffers, strict=True)):
                    cut = pieces_of(location, buffer, self._copier.store_spans)
                    pieces += cut
                    owners += [chunk] * len(cut)
                sent = path.write(job.lease_id, pieces, deadline)
                failed = {chunk for chunk, good in zip(owners, sent, strict=True) if not good}
        finally:
            self._store_buffers.give(buffers)
            self._tally.stored(len(buffers) - len(failed), self._copier.store_bytes, time.monotonic() - began)
            self._stored(job, failed)

    def _stored(self, job: StoreJob, failed: set[int]) -> None:
        if failed:
            self._tally.add(store_failures=len(failed))
        with self._lock:
            self._outcome.news.aggregate(WorkerNews(stored={job.job_id: StoreReport(1, failed)}))

    # -- loads

    def _load_chunks(self, jobs: list[LoadJob], mark: Mark | None, deadline: float, progress: Progress) -> None:
        try:
            for job in jobs:
                began, good = time.monotonic(), 0
                try:
                    path = self._await_path(job.epoch) if began < deadline else None
                    if path is not None:
                        good = self._loader.by_chunk(path, job, mark, deadline)
                except Exception:
                    complain("load", "kvd: a load failed and is computed instead", exc_info=True)
                self._over(job, good, time.monotonic() - began)
        finally:
            progress.end()

    def _load_layers(self, jobs: list[LoadJob], mark: Mark | None, deadline: float, progress: Progress) -> None:
        began, good = time.monotonic(), [0] * len(jobs)
        try:
            paths = {job.epoch: self._await_path(job.epoch) if began < deadline else None for job in jobs}
            found = [(i, path, job) for i, job in enumerate(jobs) if (path := paths[job.epoch]) is not None]
            counts = self._loader.by_layer([(path, job) for _, path, job in found], mark, deadline, progress.reach)
            for (i, _, _), count in zip(found, counts, strict=True):
                good[i] = count
        except Exception:
            complain("load", "kvd: loads failed and are computed instead", exc_info=True)
        finally:
            share_s = (time.monotonic() - began) / len(jobs)
            for job, count in zip(jobs, good, strict=True):
                self._over(job, count, share_s)
            progress.end()

    def _over(self, job: LoadJob, good: int, took_s: float) -> None:
        self._tally.loaded(good, self._copier.load_bytes, took_s)
        self._loaded(job, None if good == len(job.blocks) else good)

    def _loaded(self, job: LoadJob, failed_from: int | None) -> None:
        if failed_from is not None:
            self._tally.add(load_failures=len(job.blocks) - failed_from)
        with self._lock:
            if failed_from is not None:
                self._outcome.lost_blocks |= job.blocks_from(failed_from)
            if not job.synchronous:
                self._outcome.arrived.add(job.request_id)
            self._outcome.news.aggregate(WorkerNews(loaded={job.request_id: LoadReport(1, failed_from)}))

    # -- the path

    def _path_of(self, epoch: int) -> DataPath | None:
        path = self._path
        return path[1] if path is not None and path[0] == epoch and path[1].alive else None

    def _await_path(self, epoch: int) -> DataPath | None:
        """The path of ``epoch``, opened now if the attempt that ``attach`` asked for failed. Load thread."""
        if (path := self._path_of(epoch)) is None and self._wanted is not None and self._wanted.epoch == epoch:
            self._open(self._wanted)
            path = self._path_of(epoch)
        return path

    def _open(self, attachment: Attachment) -> None:
        if self._path_of(attachment.epoch) is not None:
            return
        try:
            path = open_path(attachment, timeout_s=RETRY_S)
        except KvdError as error:
            complain("attach", "kvd: no data path to the daemon: %s", error)
            return
        for memory in path.memory():
            self._copier.register(memory)
        with self._path_lock:
            old, self._path = self._path, (attachment.epoch, path)
            if old is not None:
                # Behind the stores that use the old path: nothing may run into memory that is not there any more.
                self._put(self._stores, lambda: self._close(old[1]))
        logger.info("kvd: data path open (%s)", path.kind)
        with self._lock:
            self._outcome.news.aggregate(WorkerNews(attached={attachment.epoch: 1}))

    def _close(self, path: DataPath) -> None:
        for memory in path.memory():
            self._copier.unregister(memory)
        path.close()

    def _put(self, queue: SimpleQueue[Callable[[], None] | None], task: Callable[[], None]) -> None:
        with self._lock:
            self._tasks += 1
        queue.put(task)

    def _work(self, queue: SimpleQueue[Callable[[], None] | None]) -> None:
        while (task := queue.get()) is not None:
            try:
                task()
            except Exception:
                complain("transfer", "kvd: a transfer failed", exc_info=True)
            finally:
                with self._lock:
                    self._tasks -= 1
                    self._ended.notify_all()
