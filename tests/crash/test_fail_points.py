"""The daemon dies at every named place, with people at work; the next one keeps every promise and leaks nothing."""

from __future__ import annotations

import re

import pytest

from tests.crash.conftest import Estate
from tests.crash.house import NAMES, House, empty

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

#: How long people work at most until the daemon comes by.
REACH_S = 20.0


def test_names_are_written_out_and_follow_the_convention() -> None:
    assert len(NAMES) > 40
    assert [name for name in NAMES if not re.fullmatch(r"[a-z]+(\.[a-z]+)+", name)] == []


def test_an_armed_place_ends_a_daemon_and_an_unarmed_one_does_not() -> None:
    with House() as house:
        assert not house.start("pool.create.before")
        assert house.dead
        assert house.start()


@pytest.mark.parametrize("name", NAMES)
def test_a_death_between_two_steps_loses_and_leaks_nothing(estate: Estate, name: str) -> None:
    house, crew = estate.parts()
    prepare(house, name)
    if house.start(name):
        assert crew.until_death(REACH_S), f"nobody came by {name} in {REACH_S} s: {dict(crew.counts)}"
    house.deaths += 1
    house.daemon.options["spill_floor"] = "0"
    house.start()
    house.check(crew.client)
    house.kill()
    estate.sound = True


def test_after_all_deaths_nothing_is_left_that_cannot_be_dropped(estate: Estate) -> None:
    house, crew = estate.parts()
    house.start()
    house.check(crew.client)
    house.check_empty()
    # And what was dropped stays dropped.
    assert house.daemon.stop() == 0
    house.start()
    house.check_empty()
    house.check(crew.client)
    house.kill()


def prepare(house: House, name: str) -> None:
    """Brings about what ``name`` needs besides people at work. The daemon is down; all that is promised is on disk."""
    if name.startswith(("pool.create", "pool.grow")):
        empty(house, pool=True)
    elif name.startswith(("spill.superblock", "spill.namespace")):
        empty(house, pool=False)
        house.promises.forget()
    elif name.startswith("spill.extent.remove"):
        # Free extents that have files, on a file system with less room than is to be kept free.
        for path in house.daemon.spill_directory.rglob("*.extent"):
            with path.open("r+b") as file:
                file.write(bytes(4096))
        house.promises.forget()
        house.daemon.options["spill_floor"] = "1TiB"
