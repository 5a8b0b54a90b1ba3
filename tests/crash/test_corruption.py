"""Files are damaged while the daemon is down, and those of the disk while it runs: no byte that it serves is wrong.

What is damaged is missing, and the daemon says so where it can know. It starts whatever it finds. ``KVD_DAMAGE_ROUNDS``
says how often everything is damaged anew, twice unless it is set; ``KVD_DAMAGE_SEED`` makes it another damage.
"""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest
import xxhash

from kvd.memory import slot_format
from tests.crash.conftest import Estate
from tests.crash.crew import Crew
from tests.crash.damage import IN_PLACE, WAYS, damage
from tests.crash.guises import GUISES, Guise
from tests.crash.house import House, empty, seeded

ROUNDS = int(os.environ.get("KVD_DAMAGE_ROUNDS", "2"))
SEED = os.environ.get("KVD_DAMAGE_SEED", "1")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(60 + 20 * ROUNDS)]

POOL_FILES = ("kvd-pool", "kvd-slots", "kvd-generations", "kvd-holders", "kvd-namespaces/")
SPILL_FILES = (".extent", ".index", "superblock", "namespaces/", "kvd-state")
#: What may be lost, or wrong, without the loss of a chunk.
SPARE_FILES = (*POOL_FILES, ".index")


def pool_files(house: House, name: str = "/") -> list[Path]:
    """The files of the pool whose path says ``name``."""
    assert house.daemon.pool_directory is not None
    return _files(house.daemon.pool_directory, name)


def spill_files(house: House, name: str = "/") -> list[Path]:
    """The files of the disk whose path says ``name``."""
    return _files(house.daemon.spill_directory / "kvd-spill", name)


def _files(directory: Path, name: str) -> list[Path]:
    found = (path for path in directory.rglob("*") if path.is_file() and not path.name.endswith("lock"))
    return sorted(path for path in found if name in str(path))


def end(house: House, dice: random.Random) -> None:
    """The daemon ends, in one way or the other."""
    if dice.random() < 0.5:
        house.kill()
    else:
        assert house.daemon.stop() == 0


def look_over(house: House, crew: Crew, done: object = "", *, lossless: bool = False) -> int:
    """A start after damage, and what comes of it: the daemon serves, and nothing that it serves is wrong.

    How many of the chunks that were promised were served, all if ``lossless``. What is missing is stored again.
    """
    try:
        if house.daemon.exit_code is not None:
            house.start()
        served = house.check_damaged(crew.client, lossless=lossless)
        house.fill(crew.client)
        house.settle()
        house.check_books()
    except BaseException as error:
        error.add_note(f"after {done}\n{house.daemon.log[-3000:]}")
        raise
    return served


def leave(estate: Estate, house: House) -> None:
    """All is well again."""
    assert house.daemon.stop() == 0
    estate.sound = True


@pytest.mark.parametrize("name", POOL_FILES)
def test_a_damaged_pool_gives_misses_and_no_wrong_byte(estate: Estate, name: str) -> None:
    house, crew = estate.parts()
    dice = seeded("pool", name, SEED)
    for number in range(ROUNDS):
        if number % 2:
            end(house, dice)
            empty(house, pool=False)  # without the disk, where all is found that is lost in the pool
        look_over(house, crew, damage(pool_files(house, name), dice, WAYS if number % 4 > 1 else IN_PLACE, share=0.7))
    leave(estate, house)


@pytest.mark.parametrize("name", SPILL_FILES)
def test_a_damaged_disk_gives_misses_and_no_wrong_byte(estate: Estate, name: str) -> None:
    house, crew = estate.parts()
    dice = seeded("disk", name, SEED)
    for number in range(ROUNDS):
        if number:
            assert house.daemon.stop() == 0  # which leaves a file of every kind
        done = damage(spill_files(house, name), dice, WAYS if number % 2 else IN_PLACE)
        if dice.random() < 0.7 or name in SPARE_FILES:
            empty(house, pool=True)
        look_over(house, crew, done, lossless=name in SPARE_FILES)
    leave(estate, house)


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_damage_all_over_gives_misses_and_no_wrong_byte(estate: Estate, share: float) -> None:
    house, crew = estate.parts()
    dice = seeded("all over", share, SEED)
    for number in range(ROUNDS):
        if number:
            end(house, dice)
        done = damage(pool_files(house), dice, share=share)
        if dice.random() < 0.7:
            done += damage(spill_files(house), dice, share=share)
        look_over(house, crew, done)
    leave(estate, house)


@pytest.mark.parametrize("codec", ["none", "auto"])
def test_a_disk_that_is_damaged_while_the_daemon_runs_gives_misses_and_no_wrong_byte(codec: str) -> None:
    dice = seeded("running", codec, SEED)
    with House(spill_codec=codec) as house:
        house.start()
        with house.client() as client:
            house.fill(client)
            house.settle()
            for _ in range(ROUNDS):
                damage(spill_files(house, ".extent"), dice, IN_PLACE, share=0.9)
                house.check_damaged(client)
                house.fill(client)
                house.settle()
            assert house.daemon.stats().counters["corrupt_chunks"] > 0 and "is corrupt" in house.daemon.log
            damage(spill_files(house, ".extent"), dice, share=0.5)  # they are cut short, grow or vanish
            damage(spill_files(house, ".index"), dice, share=0.5)
            house.check_damaged(client)
            house.kill()
            house.start()
            house.check_damaged(client)
            house.check_empty()


def test_damaged_bytes_in_the_pool_are_counted_and_served_to_nobody(estate: Estate) -> None:
    house, crew = estate.parts()
    empty(house, pool=False)
    (pool,) = pool_files(house, "kvd-pool")
    with pool.open("r+b") as file:  # every chunk that it has is another
        file.write(random.Random(1).randbytes(pool.stat().st_size))
    assert look_over(house, crew) == 0
    counters = house.daemon.stats().counters
    assert counters["condemned_chunks"] == counters["recovered_chunks"] > 0
    assert counters["corrupt_chunks"] > 0
    leave(estate, house)


def test_a_damaged_checksum_is_not_taken_for_none(estate: Estate) -> None:
    """A chunk that was not sealed yet is taken as it is; no damage may make one look like that."""
    house, crew = estate.parts()
    empty(house, pool=False)
    (pool,), (slots,) = pool_files(house, "kvd-pool"), pool_files(house, "kvd-slots")
    with pool.open("r+b") as file:
        file.write(random.Random(1).randbytes(pool.stat().st_size))
    change_entries(slots, slot_format.SEAL * slot_format.WORD_BYTES)
    assert look_over(house, crew) == 0
    leave(estate, house)


def test_damaged_entries_of_the_slot_table_are_counted(estate: Estate) -> None:
    house, crew = estate.parts()
    (slots,) = pool_files(house, "kvd-slots")
    changed = change_entries(slots, slot_format.BODY_BYTE + 60)
    house.start()
    recovery = house.daemon.stats().pool.recovery
    assert recovery.skipped["damaged"] == changed > 0
    look_over(house, crew, lossless=True)  # from the disk
    leave(estate, house)


def change_entries(slots: Path, byte: int) -> int:
    """Turns over one bit in that byte of every entry of the slot table that is in use; how many these are."""
    content = slots.read_bytes()
    size, count = slot_format.ENTRY_BYTES, 0
    with slots.open("r+b") as file:
        for at in range(slot_format.HEADER_BYTES, len(content) - size + 1, size):
            if any(content[at : at + slot_format.WORD_BYTES]):
                file.seek(at + byte)
                file.write(bytes([content[at + byte] ^ 4]))
                count += 1
    return count


def test_another_format_is_a_cold_start_that_says_why(estate: Estate) -> None:
    house, crew = estate.parts()
    (slots,) = pool_files(house, "kvd-slots")
    header = bytearray(slots.read_bytes()[: slot_format.HEADER.size])
    header[8:12] = (slot_format.FORMAT + 1).to_bytes(4, "little")
    header[-8:] = xxhash.xxh3_64_intdigest(bytes(header[:-8])).to_bytes(8, "little")  # it is sound, in its way
    with slots.open("r+b") as file:
        file.write(header)
    look_over(house, crew, lossless=True)  # from the disk
    assert f"the pool starts cold: the slot table has format {slot_format.FORMAT + 1}" in house.daemon.log
    leave(estate, house)


@pytest.mark.parametrize("guise", GUISES)
@pytest.mark.parametrize("name", [POOL_FILES[:4], POOL_FILES[4:] + SPILL_FILES], ids=["pool", "others"])
def test_a_file_that_is_not_what_it_was_is_no_reason_not_to_start(
    estate: Estate, name: tuple[str, ...], guise: Guise
) -> None:
    house, crew = estate.parts()
    chosen = name[GUISES.index(guise) % len(name)]
    files = pool_files(house, chosen) or spill_files(house, chosen)
    guise(seeded(guise.__name__, SEED).choice(files))
    house.start()
    house.check_damaged(crew.client, lossless=chosen in SPARE_FILES)  # from the disk
    if house.degraded:
        assert "left alone" in house.daemon.log
        return  # it has said why, and goes on without its disk: the house is not as it should be
    house.fill(crew.client)
    house.settle()
    assert not house.degraded and house.daemon.log.count("left alone") == 0
    leave(estate, house)


def test_something_else_in_the_place_of_the_namespaces_is_no_reason_not_to_start(estate: Estate) -> None:
    house, crew = estate.parts()
    assert house.daemon.pool_directory is not None
    namespaces = house.daemon.pool_directory / "kvd-namespaces"
    others = house.daemon.pool_directory / "others"
    others.mkdir()
    (others / "letter").write_text("keep me")
    for make in (lambda: namespaces.symlink_to(others), lambda: namespaces.write_text("not what you think")):
        shutil.rmtree(namespaces)
        make()
        look_over(house, crew, lossless=True)  # from the disk
        house.kill()
    assert (others / "letter").read_text() == "keep me"
    shutil.rmtree(others)
    estate.sound = True


def test_foreign_files_in_the_directories_stay(estate: Estate) -> None:
    house, crew = estate.parts()
    assert house.daemon.pool_directory is not None
    places = [house.daemon.pool_directory, house.daemon.spill_directory, house.daemon.spill_directory / "kvd-spill"]
    foreign = [place / name for place in places for name in ("notes.txt", "00000001.extent.bak", "kvd-slots.old")]
    for path in foreign:
        path.write_text("keep me")
    look_over(house, crew, lossless=True)
    house.kill()
    slots = pool_files(house, "kvd-slots")[0]
    slots.write_bytes(b"")  # a cold start, which removes what is its own
    house.start()
    house.check_empty()
    assert [path.read_text() for path in foreign] == ["keep me"] * len(foreign)
