"""The daemon is killed at any moment, again and again, with people at work and an engine that does not notice.

``KVD_KILL_CYCLES`` says how often, 12 times unless it is set.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from kvd_client import Client
from tests.crash.crew import Crew, furnished
from tests.crash.house import NAMES, PATIENCE_S, House, empty, seeded
from tests.daemon import ROOT, clean_environment
from tests.wait import wait_until

CYCLES = int(os.environ.get("KVD_KILL_CYCLES", "12"))
SEED = os.environ.get("KVD_KILL_SEED", "1")

#: Cycles after which everything is dropped, and nothing may be left.
_DROP_EVERY = 40
#: What a start takes at most on a machine that has nothing else to do.
_START_S = 0.5
_WORK_S = 0.6
#: Deaths in a row while records are moved.
MOVES = int(os.environ.get("KVD_MOVE_DEATHS", "8"))
#: A pool with room for all that there is.
ROOMY_BYTES = 32 << 20


class Scribbler:
    """A ``tests.crash.scribbler`` process that has slots and writes into them."""

    def __init__(self, house: House, seed: object) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.crash.scribbler", house.daemon.unix_endpoint, str(seed)],
            stdout=subprocess.PIPE,
            text=True,
            env=clean_environment(),
            cwd=ROOT,
        )
        assert self._process.stdout is not None
        words = self._process.stdout.readline().split()
        assert words[:1] == ["writing"], words
        #: Of its slots, or fewer.
        self.bytes = int(words[1])

    def close(self) -> None:
        """Kills it."""
        self._process.kill()
        self._process.wait(30)
        assert self._process.stdout is not None
        self._process.stdout.close()


@contextmanager
def scribbling(house: House, seed: object) -> Iterator[Scribbler]:
    """A scribbler that is there as long as the block lasts."""
    scribbler = Scribbler(house, seed)
    try:
        yield scribbler
    finally:
        scribbler.close()


@pytest.mark.soak
@pytest.mark.timeout(120 + 20 * CYCLES)
def test_the_daemon_is_killed_at_any_moment_and_no_byte_is_wrong_or_lost() -> None:
    dice = seeded("kills", SEED)
    tally: Counter[str] = Counter()
    scribbler: Scribbler | None = None
    with furnished(SEED) as (house, crew):
        try:
            for cycle in range(CYCLES):
                if scribbler is None and dice.random() < 0.3:
                    scribbler = Scribbler(house, cycle)
                manner = dice.choices(*zip(*MANNERS.items(), strict=True))[0]
                tally[manner.__name__] += 1
                manner(house, crew, dice)
                if scribbler is not None and dice.random() < 0.3:
                    scribbler.close()
                    scribbler = None
                if house.daemon.exit_code is not None:
                    house.start()
                try:
                    house.check(crew.client, held=scribbler is not None)
                except BaseException as error:
                    error.add_note(f"in cycle {cycle} of seed {SEED}, after {manner.__name__}; so far {dict(tally)}")
                    raise
                if cycle % _DROP_EVERY == _DROP_EVERY - 1 and scribbler is None:
                    house.check_empty()
                    house.fill(crew.client)
        finally:
            if scribbler is not None:
                scribbler.close()
        print(f"\n{house.deaths} deaths: {dict(tally)}\n{dict(crew.counts)}")
        house.check(crew.client)
        house.check_empty()


def killed_at_work(house: House, crew: Crew, dice: random.Random) -> None:
    """At any moment."""
    with crew.at_work():
        time.sleep(dice.random() * _WORK_S)
        house.kill()


def killed_at_rest(house: House, crew: Crew, dice: random.Random) -> None:
    """Nobody does anything, but the daemon may have something left to do."""
    with crew.at_work():
        time.sleep(dice.random() * _WORK_S / 2)
    house.kill()


def killed_at_a_place(house: House, crew: Crew, dice: random.Random) -> None:
    """At a named place, or after a while if it does not come by."""
    house.kill()
    name, count = dice.choice(NAMES), dice.randint(1, 1 + int(60 * dice.random() ** 2))
    if house.start(name, count) and not crew.until_death(_WORK_S * 2):
        house.kill()
    house.deaths += 1


def killed_in_its_start(house: House, crew: Crew, dice: random.Random) -> None:
    """It dies, and the next one before it serves, once or several times."""
    with crew.at_work():
        time.sleep(dice.random() * _WORK_S / 3)
        house.kill()
        for _ in range(dice.randint(1, 3)):
            house.begin()
            time.sleep(dice.random() * _START_S)
            house.kill()


def stopped(house: House, crew: Crew, dice: random.Random) -> None:
    """SIGTERM, and it may be killed while it stops."""
    with crew.at_work():
        time.sleep(dice.random() * _WORK_S / 2)
        if dice.random() < 0.5:
            assert house.daemon.stop() == 0
        else:
            os.kill(house.daemon.pid, signal.SIGTERM)
            time.sleep(dice.random())
            house.kill()


def power_lost(house: House, crew: Crew, dice: random.Random) -> None:
    """The memory is gone, the disk is not; everything had been written."""
    with crew.at_work():
        time.sleep(dice.random() * _WORK_S / 2)
    house.settle(held=True)
    house.kill()
    empty(house, pool=True)


MANNERS = {
    killed_at_work: 6,
    killed_at_a_place: 5,
    killed_in_its_start: 3,
    killed_at_rest: 1,
    stopped: 2,
    power_lost: 0.5,
}


@pytest.mark.slow
def test_without_a_disk_the_pool_alone_keeps_every_promise() -> None:
    dice = seeded("no disk", SEED)
    with furnished("no disk", disk=False, pool_bytes=ROOMY_BYTES) as (house, crew):
        for manner in (killed_at_work, killed_in_its_start, stopped, killed_at_a_place, killed_at_rest, killed_at_work):
            manner(house, crew, dice)
            if house.daemon.exit_code is not None:
                house.start()
            recovery = house.daemon.stats().pool.recovery
            assert recovery.warm and recovery.chunks >= len(house.promises)
            house.check(crew.client)
            assert house.daemon.stats().counters["evicted_chunks"] == 0
        house.check_empty()


@pytest.mark.slow
def test_deaths_while_extents_are_emptied_never_leave_the_disk_without_room() -> None:
    """The last free extent is filled by moves: a daemon that dies then has left none."""
    dice = seeded("moves", SEED)
    names = [name for name in NAMES if name.startswith("spill.move.")]
    with furnished("moves") as (house, crew):
        house.kill()
        for _ in range(MOVES):
            name, count = dice.choice(names), dice.randint(1, 12)
            if house.start(name, count):
                assert crew.until_death(PATIENCE_S), f"nobody came by {name} {count} times"
        house.start()
        house.check(crew.client)
        house.check_empty()


@pytest.mark.slow
def test_slots_of_a_writer_that_does_not_notice_are_nobodys_until_it_is_gone() -> None:
    with furnished("late") as (house, crew):
        with scribbling(house, "late") as scribbler:
            for end in (house.kill, house.daemon.stop, house.kill):
                end()
                house.start()
                with crew.at_work():
                    time.sleep(0.7)  # far more is stored than the pool has room for
                house.check(crew.client, held=True)
                pool = house.daemon.stats().pool
                assert pool.writing_bytes + pool.quarantined_bytes >= scribbler.bytes
        house.settle()
        house.check(crew.client)
        house.check_empty()


@pytest.mark.slow
def test_slots_of_a_writer_that_died_with_the_daemon_are_free_after_the_quarantine() -> None:
    with furnished("both") as (house, crew):
        with scribbling(house, "both"):
            house.kill()
        house.start()
        house.check(crew.client)
        house.check_empty()


@pytest.mark.slow
def test_a_client_that_outlives_its_daemon_reads_on_without_storing_anything_again() -> None:
    with House() as house, house_client(house) as client:
        house.fill(client)
        for end in (house.kill, house.kill, house.daemon.stop):
            end()
            house.start()
            house.check(client)
            assert house.daemon.stats().counters["reserved_chunks"] == 0


@pytest.mark.slow
def test_what_was_dropped_stays_dropped_after_a_crash() -> None:
    with House() as house, house_client(house) as client:
        house.fill(client)
        house.settle()
        assert house.drop() == 0
        house.promises.forget()
        house.kill()
        house.start()
        house.settle()
        stats = house.daemon.stats()
        assert (stats.pool.ready_bytes, stats.disk.records, stats.disk.live_bytes) == (0, 0, 0)
        house.check(client)


@pytest.mark.slow
def test_after_a_power_loss_everything_that_was_written_is_found_while_it_serves() -> None:
    with House() as house, house_client(house) as client:
        house.fill(client)
        house.settle()
        house.kill()
        empty(house, pool=True)
        house.start()
        assert "there is no pool of a former daemon" in house.daemon.log
        wait_until(lambda: client.connected, PATIENCE_S, "the client to be connected again")
        house.fill(client)  # it serves meanwhile, and what is stored again does not get into the way of what is found
        house.check(client)
        house.check_empty()


@contextmanager
def house_client(house: House) -> Iterator[Client]:
    """Starts the daemon, and a client over shared memory."""
    house.start()
    with house.client() as client:
        yield client
