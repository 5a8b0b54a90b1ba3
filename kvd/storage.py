"""What a daemon keeps bytes in, put together: the pool, the disks, the books over both, and what is remembered.

A part of the composition root: it chooses implementations, for what outlives the daemon.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any

from kvd.config import Loaded, Settings
from kvd.ledger import policies
from kvd.ledger.chunk import Chunk
from kvd.ledger.eviction import EvictionPolicy
from kvd.ledger.records import Record
from kvd.ledger.shares import SharedPolicy
from kvd.ledger.spilling import Habits
from kvd.memory.numa import find_nodes
from kvd.memory.pool import open_pool
from kvd.memory.presence import PresenceTable
from kvd.memory.slabs import SlabAllocator
from kvd.recovery import State, StateFiles
from kvd.spill.codec import Encoder, MissingLibrary
from kvd.spill.drive import Drive
from kvd.spill.extents import Extents
from kvd.store import ChunkStore, Disks, Limits
from kvd.tiering import DailyBudget, Tiering
from kvd.types import DriveFigures, Recovery
from kvd.values import Admit, Codec

log = logging.getLogger(__name__)

STATE_NAME = "kvd-state"
#: How often the times of use and the day's account are saved, if they have changed.
SAVE_EVERY_S = 10.0
#: Encoded chunks on their way to the disks at a time.
_SCRATCH_BYTES = 256 << 20
#: How long a stop waits for the disks, after everything has been written or given up.
_CLOSE_S = 5.0
#: How long somebody who drops or pins waits until that is on the disks.
_SAVE_S = 2.0
#: How long a start waits for them; what opens later is used from then on.
_OPEN_S = 2.0
#: The presence table has room for one key for so much of the pool and the disks: chunks are rarely smaller.
_BYTES_PER_KEY = 256 << 10


class Storage:
    """Pool, disks, store and what moves bytes between them. Lives on the event loop."""

    def __init__(self, loaded: Loaded, daemon_id: int, directory: str | None) -> None:
        """Opens the pool, and takes over what a former daemon left in it. ``directory``: None = anonymous memory.

        Raises BadSetting when the pool cannot be made.
        """
        began = time.monotonic()
        settings = loaded.settings
        self._settings = settings
        self._directory = directory
        try:
            self.pool = open_pool(
                settings.pool_bytes,
                daemon_id=daemon_id,
                directory=directory,
                huge_pages=settings.huge_pages,
                nodes=find_nodes(),
            )
            # A trace has every request in it: while one is recorded, clients ask.
            self.presence = PresenceTable(
                (settings.pool_bytes + settings.spill_bytes) // _BYTES_PER_KEY,
                daemon_id,
                ask_always=settings.record_trace is not None,
            )
        except OSError as error:
            raise loaded.reject("pool", f"cannot be made: {error.strerror}") from error
        self.limits = Limits(read_lease_s=settings.read_lease_s, quarantine_s=settings.quarantine_s)
        self._budget: DailyBudget | None = None
        self._drives: list[Drive] = []
        self._extents: Extents | None = None
        self._encoder = _encoder(loaded)
        disks = self._make_disks() if settings.spill_dirs else None
        former = self.pool.former
        slabs = SlabAllocator(self.pool.segment.size, self.pool.parts)
        #: What of the pool lies on which memory node; nothing when there is one.
        self.nodes = slabs.nodes
        self.store = ChunkStore(
            slabs,
            self.pool.segment,
            self.limits,
            policy=_pool_policy(settings),
            first_generation=secrets.randbits(31) << 32 if former is None else former.last_generation,
            journal=self.pool.journal,
            disks=disks,
            ttl_s=settings.ttl_s,
            presence=self.presence,
        )
        paths = [os.path.join(drive.path, STATE_NAME) for drive in self._drives]
        if self.pool.directory is not None:
            paths.append(os.path.join(self.pool.directory, STATE_NAME))
        self._state = StateFiles(paths)
        self._pins: list[Any] = []
        self.recovery = self._recover(began)
        self._tiering: Tiering | None = None
        self._saving = asyncio.Lock()
        self._saved: State | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._saver: asyncio.Task[None] | None = None

    # -- life

    async def start(self, promoted: Callable[[float], None]) -> None:
        """Begins to move bytes; what the disks hold is looked for beside the requests.

        ``promoted`` hears how long each read from a disk took, seconds.
        """
        if self.pool.journal is None and not self._drives:
            return
        self._tiering = Tiering(
            self.store,
            self.pool.segment.data,
            self._drives,
            self._extents,
            budget=self._budget,
            encoder=self._encoder,
            promoted=promoted,
        )
        await self._tiering.start(_OPEN_S)
        self.store.on_pins = self._heard_pins
        self.store.tiers.on_drop = self._save_soon
        self._saver = self._run(self._save_now_and_then())

    async def stop(self, timeout_s: float, *, forget: bool) -> None:
        """Writes what is to be written and ends; ``forget`` removes a pool that nobody has asked for by name."""
        self.presence.close()
        if self._saver is not None:
            self._saver.cancel()
        if self._tiering is not None:
            await self._tiering.settle(timeout_s)
            if not await self._tiering.stop(_CLOSE_S):
                log.warning("a spill directory does not answer: what it was asked last may not be written")
        await self._save()
        if forget and self._directory is not None and self.pool.directory is not None:
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(self.pool.directory, STATE_NAME))
            self.pool.remove()
            for path in (self._directory, os.path.dirname(self._directory)):
                with contextlib.suppress(OSError):  # somebody else has something there
                    os.rmdir(path)

    def drives(self) -> Sequence[DriveFigures]:
        """Every spill directory as it is now."""
        return [] if self._tiering is None else self._tiering.figures()

    def written_today_bytes(self) -> int:
        """Written to all drives since the day has begun."""
        return 0 if self._budget is None else self._budget.today_bytes

    @property
    def has_disks(self) -> bool:
        """Whether there is a disk tier."""
        return bool(self._drives)

    # -- putting together

    def _make_disks(self) -> Disks:
        settings = self._settings
        part_bytes = settings.spill_bytes // len(settings.spill_dirs)
        self._drives = [
            Drive(number, path, part_bytes, floor_bytes=settings.spill_floor_bytes)
            for number, path in enumerate(settings.spill_dirs)
        ]
        self._extents = Extents(len(self._drives), first_sequence=time.time_ns())
        self._budget = DailyBudget(settings.spill_write_rate_bytes, settings.spill_write_daily_bytes)
        habits = Habits(settings.spill_admit is Admit.REUSED, encode=settings.spill_codec is Codec.AUTO)
        return Disks(self._extents, _disk_policy(settings), self._budget, habits)

    def _recover(self, began: float) -> Recovery:
        state = self._state.load(_OPEN_S)
        self.store.tiers.dropped.update(state.dropped)
        self.store.load_pins(state.pins)
        self._pins = state.pins
        if self._budget is not None:
            self._budget.restore(state.day)
        former, holders = self.pool.former, self.pool.holders
        if former is None or holders is None:
            log.info("the pool starts cold: %s", self.pool.cold)
            return Recovery(warm=False, reason=self.pool.cold)
        damaged = self.store.tiers.restore(former.entries, former.namespaces, holders.gone)
        self.store.load_times(state.uses, state.wall)
        chunks = self.store.counters.recovered_chunks
        skipped = dict(former.skipped)
        if damaged:
            skipped["without their parents"] = damaged
        seconds = time.monotonic() - began
        told = ", ".join(f"{count} {why}" for why, count in skipped.items()) or "nothing"
        log.info("the pool starts warm: %d chunks taken over in %.2f s; skipped: %s", chunks, seconds, told)
        return Recovery(True, "the pool of the daemon before was taken over", chunks, skipped, seconds)

    # -- remembering

    def _heard_pins(self, saved: list[list[str]]) -> None:
        self._pins = saved
        self._save_soon()

    async def remembered(self) -> None:
        """Returns when what was pinned and dropped until now is on the disk: the next daemon knows of it."""
        await asyncio.shield(self._run(self._save()))

    def _save_soon(self) -> None:
        self._run(self._save())

    async def _save_now_and_then(self) -> None:
        while True:
            await asyncio.sleep(SAVE_EVERY_S)
            await self._save()

    async def _save(self) -> None:
        async with self._saving:
            wall = time.time()
            state = State(
                pins=self._pins,
                uses=self.store.save_times(wall) if self._settings.ttl_s else [],
                dropped=dict(self.store.tiers.dropped),
                day="" if self._budget is None else self._budget.save(),
            )
            if state != self._saved:
                done = await asyncio.to_thread(self._state.save, replace(state, wall=wall), _SAVE_S)
                self._saved = state if done else None

    def _run(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _encoder(loaded: Loaded) -> Encoder | None:
    if loaded.settings.spill_codec is Codec.NONE:
        return None
    try:
        return Encoder(_SCRATCH_BYTES)
    except MissingLibrary as error:
        raise loaded.reject("spill_codec", str(error)) from error


def _pool_policy(settings: Settings) -> EvictionPolicy[Chunk]:
    def make() -> EvictionPolicy[Chunk]:
        return policies.make(policies.DEFAULT, recompute_weight=settings.recompute_weight)

    if not settings.shares:
        return make()
    return SharedPolicy(settings.shares, make, lambda chunk: chunk.space.slot_bytes)


def _disk_policy(settings: Settings) -> EvictionPolicy[Record]:
    """The same policy and the same shares, for the same part of the disks."""

    def make() -> EvictionPolicy[Record]:
        return policies.make(policies.DEFAULT, recompute_weight=settings.recompute_weight)

    if not settings.shares:
        return make()
    scale = settings.spill_bytes / settings.pool_bytes
    return SharedPolicy(settings.shares, make, lambda record: record.place.record_bytes, scale)
