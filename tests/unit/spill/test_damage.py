"""Whatever happens to the bytes on a disk: no wrong chunk, no crash, and what is not hit is still there."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvd.spill.drive import DriveState
from kvd.spill.record import HEADER_BYTES, Header, pack_record, parse_record
from kvd.types import ROOT, Namespace, Outcome, Place
from tests.unit.spill.harness import KIB, MIB, PAGE, Rig, key, namespace

SPACES = (namespace("a", 20_000), namespace("b", 9 * KIB), namespace("c", 150 * KIB))


@dataclass(frozen=True)
class Stored:
    """One chunk, and where it was written."""

    space: Namespace
    parent: bytes
    chunk: bytes
    place: Place


@pytest.fixture(scope="module", params=["indexes", "headers"])
def pristine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[bytes, Stored]]:
    """A directory with records of several sizes in several extents, which a start finds in the one way or the other."""
    parent = tmp_path_factory.mktemp("pristine")
    chosen = random.Random(1)
    stored = {}
    with Rig([parent]) as rig:
        for number in range(90):
            space = SPACES[number % 3]
            chunk = chosen.randbytes(space.chunk_bytes)
            above = key(number - 3) if number > 2 else ROOT
            place = rig.stored(space, key(number), chunk, parent=above)
            stored[key(number)] = Stored(space, above, chunk, place)
    assert len({record.place.extent for record in stored.values()}) > 2
    if request.param == "headers":
        without_indexes(parent)
    return parent, stored


def survivors(parent: Path, stored: dict[bytes, Stored]) -> tuple[set[bytes], dict[str, int], int]:
    """Scans and reads everything: keys with their right bytes; what the scan skipped; how many were found corrupt."""
    right, corrupt = set(), 0
    with Rig([parent]) as rig:
        found, skipped = rig.scan()
        for record in found:
            original = stored[record.key]
            assert record.namespace_id == original.space.id and record.parent == original.parent
            rig.clear(0, original.space.chunk_bytes)
            result = rig.read(original.space, record.key, record.place, parent=record.parent)
            if result.outcome is Outcome.OK:
                assert rig.chunk(0, len(original.chunk)) == original.chunk, "wrong bytes"
                right.add(record.key)
            else:
                assert result.outcome is Outcome.CORRUPT
                corrupt += 1
        assert rig.drive.state is DriveState.WORKING
    return right, skipped, corrupt


def extents(parent: Path) -> list[Path]:
    """The extent files."""
    return sorted((parent / "kvd-spill").glob("*.extent"))


def without_indexes(parent: Path) -> None:
    """From now on headers are all that a start has."""
    for path in (parent / "kvd-spill").glob("*.index"):
        path.unlink()


def flip(path: Path, chosen: random.Random, at: int) -> None:
    """Flips one bit."""
    with path.open("r+b") as file:
        file.seek(at)
        old = file.read(1)[0]
        file.seek(at)
        file.write(bytes([old ^ 1 << chosen.randrange(8)]))


@pytest.mark.parametrize("seed", range(12))
def test_flipped_bits_never_make_wrong_bytes(
    tmp_path: Path, pristine: tuple[Path, dict[bytes, Stored]], seed: int
) -> None:
    origin, stored = pristine
    shutil.copytree(origin, tmp_path, dirs_exist_ok=True)
    chosen = random.Random(seed)
    hit = set()
    for _ in range(40):
        name, record = chosen.choice(list(stored.items()))
        in_header = chosen.random() < 0.5
        at = record.place.offset + (
            chosen.randrange(220) if in_header else HEADER_BYTES + chosen.randrange(len(record.chunk))
        )
        flip(extents(tmp_path)[record.place.extent], chosen, at)
        hit.add(name)
    right, skipped, corrupt = survivors(tmp_path, stored)
    assert set(stored) - hit <= right
    assert corrupt + skipped.get("damaged header", 0) > 0


@pytest.mark.parametrize("seed", range(6))
def test_zeroed_and_torn_pages_cost_what_lay_in_them_only(
    tmp_path: Path, pristine: tuple[Path, dict[bytes, Stored]], seed: int
) -> None:
    origin, stored = pristine
    shutil.copytree(origin, tmp_path, dirs_exist_ok=True)
    chosen = random.Random(seed)
    hit = set()
    for name, record in chosen.sample(sorted(stored.items()), 12):
        begin = record.place.offset + chosen.randrange(record.place.record_bytes // PAGE) * PAGE
        with extents(tmp_path)[record.place.extent].open("r+b") as file:
            file.seek(begin)
            file.write(bytes(PAGE) if seed % 2 else chosen.randbytes(PAGE))
        hit.add(name)
    right, _, _ = survivors(tmp_path, stored)
    # A page of padding may be hit: then nothing is lost.
    assert set(stored) - hit <= right


@pytest.mark.parametrize("length", [0, 1, PAGE, 5 * PAGE, 300_000, MIB - 1])
def test_a_truncated_extent_costs_what_lay_behind(
    tmp_path: Path, pristine: tuple[Path, dict[bytes, Stored]], length: int
) -> None:
    origin, stored = pristine
    shutil.copytree(origin, tmp_path, dirs_exist_ok=True)
    with extents(tmp_path)[0].open("r+b") as file:
        file.truncate(length)
    right, skipped, _ = survivors(tmp_path, stored)
    kept = {
        name
        for name, record in stored.items()
        if record.place.extent != 0 or record.place.offset + record.place.record_bytes <= length
    }
    assert right == kept
    assert length >= PAGE or skipped == {"extent without a header": 1}


def test_a_read_from_an_extent_that_became_too_short_is_corrupt(tmp_path: Path) -> None:
    space = SPACES[0]
    with Rig([tmp_path]) as rig:
        place = rig.stored(space, key(1), bytes(space.chunk_bytes))
        with rig.extent_path(place).open("r+b") as file:
            file.truncate(place.offset + 2 * PAGE)
        assert rig.read(space, key(1), place).outcome is Outcome.CORRUPT
        with rig.extent_path(place).open("r+b") as file:
            file.truncate(0)
        assert rig.read(space, key(1), place).outcome is Outcome.CORRUPT
        assert rig.drive.state is DriveState.WORKING


@pytest.mark.parametrize(
    "wrong",
    [
        {"space": namespace("other", 20_000)},
        {"space": namespace("a", 20_000, layers=4)},
        {"space": namespace("a", 19_999)},
        {"name": key(2)},
        {"parent": key(9)},
        {"sequence": 77},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_a_record_is_believed_only_if_it_is_the_one_that_was_asked_for(
    tmp_path: Path, wrong: dict[str, object]
) -> None:
    space = SPACES[0]
    with Rig([tmp_path]) as rig:
        place = rig.stored(space, key(1), bytes(space.chunk_bytes), parent=key(5))
        asked: dict[str, object] = {
            "space": space,
            "name": key(1),
            "parent": key(5),
            "sequence": place.sequence,
        } | wrong
        other = place._replace(sequence=asked.pop("sequence"))
        assert rig.read(place=other, **asked).outcome is Outcome.CORRUPT  # type: ignore[arg-type]
        assert rig.read(space, key(1), place, parent=key(5)).outcome is Outcome.OK


@pytest.mark.parametrize("at", [30, PAGE + 70_000], ids=["header", "payload"])
def test_a_corrupt_record_is_not_moved(tmp_path: Path, at: int) -> None:
    space = SPACES[2]
    with Rig([tmp_path]) as rig:
        source = rig.stored(space, key(1), random.Random(1).randbytes(space.chunk_bytes))
        flip(rig.extent_path(source), random.Random(1), source.offset + at)
        target = rig.space.allocate(space.chunk_bytes, moving=True)
        assert target is not None
        assert rig.move(space, key(1), source, target).outcome is Outcome.CORRUPT
        other = rig.space.allocate(space.chunk_bytes, moving=True)
        assert other is not None
        rig.write(space, key(2), bytes(space.chunk_bytes), place=other)
    with Rig([tmp_path]) as rig:
        found, _ = rig.scan()
        assert target not in [record.place for record in found]
        assert other in [record.place for record in found]


def test_records_of_a_former_life_of_an_extent_do_not_come_back(tmp_path: Path) -> None:
    space = SPACES[0]
    with Rig([tmp_path], drive_bytes=4 * MIB) as rig:
        old = []
        while (place := rig.space.allocate(space.chunk_bytes)) is not None:
            old.append(place)
            rig.write(space, key(len(old)), random.Random(len(old)).randbytes(space.chunk_bytes), place=place)
        for place in old:
            rig.space.release(place)
        new = rig.stored(space, key(1000), bytes(space.chunk_bytes))
        assert any(place.extent == new.extent and place.offset > new.offset for place in old), "nothing to come back"
    with Rig([tmp_path], drive_bytes=4 * MIB) as rig:
        found, skipped = rig.scan()
        inside = [record.key for record in found if record.place.extent == new.extent]
        assert inside == [key(1000)]
        assert skipped["record of a former life"] > 0


def test_an_extent_that_has_lost_its_header_is_empty(
    tmp_path: Path, pristine: tuple[Path, dict[bytes, Stored]]
) -> None:
    # Without it nobody can tell the records of the present life from those of a former one.
    origin, stored = pristine
    shutil.copytree(origin, tmp_path, dirs_exist_ok=True)
    flip(extents(tmp_path)[0], random.Random(1), 30)
    right, skipped, _ = survivors(tmp_path, stored)
    assert right == {name for name, record in stored.items() if record.place.extent != 0}
    assert skipped == {"extent without a header": 1}


def test_extents_that_are_exchanged_are_not_believed(
    tmp_path: Path, pristine: tuple[Path, dict[bytes, Stored]]
) -> None:
    origin, stored = pristine
    shutil.copytree(origin, tmp_path, dirs_exist_ok=True)
    first, second = extents(tmp_path)[:2]
    first.rename(first.with_suffix(".aside"))
    second.rename(first)
    first.with_suffix(".aside").rename(second)
    right, skipped, _ = survivors(tmp_path, stored)
    assert right == {name for name, record in stored.items() if record.place.extent > 1}
    assert skipped["extent without a header"] == 2


def forged_with_another_secret(rig: Rig, space: Namespace, place: Place) -> bytes:
    """A header that says all the right things, made by somebody who does not know the secret."""
    header = real_header(rig, place)
    page = memoryview(bytearray(PAGE))
    pack_record(page, header._replace(key=key(666), offset=place.offset + 2 * PAGE), b"guess".ljust(32))
    return bytes(page)


def copied_from_the_disk(rig: Rig, space: Namespace, place: Place) -> bytes:
    """A header that was written here, found by somebody who can read the disk."""
    with rig.extent_path(place).open("rb") as file:
        file.seek(place.offset)
        return file.read(PAGE)


def real_header(rig: Rig, place: Place) -> Header:
    with rig.extent_path(place).open("rb") as file:
        file.seek(place.offset)
        header = parse_record(memoryview(file.read(PAGE)), rig.drive.directory.superblock.secret)
    assert header is not None
    return header


@pytest.mark.parametrize("forge", [forged_with_another_secret, copied_from_the_disk])
def test_a_header_inside_of_payload_is_not_believed(
    tmp_path: Path, forge: Callable[[Rig, Namespace, Place], bytes]
) -> None:
    space = namespace("f", 10 * PAGE)
    with Rig([tmp_path]) as rig:
        first = rig.stored(space, key(1), bytes(space.chunk_bytes))
        second = rig.space.allocate(space.chunk_bytes)
        assert second is not None and second.extent == first.extent
        forged = forge(rig, space, first)
        rig.write(space, key(2), forged * 10, place=second)
        third = rig.stored(space, key(3), bytes(space.chunk_bytes))
        flip(rig.extent_path(second), random.Random(1), second.offset + 50)  # now the scan looks for a header
    without_indexes(tmp_path)
    with Rig([tmp_path]) as rig:
        found, skipped = rig.scan()
        assert [record.key for record in found] == [key(1), key(3)]
        assert found[1].place == third
        assert skipped["damaged header"] + skipped.get("misplaced record", 0) == 11
        assert skipped["gap after a damaged record"] == 1


def test_foreign_files_are_left_alone(tmp_path: Path, pristine: tuple[Path, dict[bytes, Stored]]) -> None:
    origin, stored = pristine
    shutil.copytree(origin, tmp_path, dirs_exist_ok=True)
    directory = tmp_path / "kvd-spill"
    strangers = [directory / name for name in ("00000003.extent.bak", "3.extent", "notes.txt", "00000000.EXTENT")]
    for stranger in strangers:
        stranger.write_bytes(b"mine")
    (directory / "00000012.extent").mkdir()  # not even a file
    (directory / "00000013.extent").symlink_to("/etc/hostname")
    (directory / "00000014.extent").write_bytes(random.Random(1).randbytes(100_000))
    (directory / "namespaces" / "notes.txt").write_text("mine")
    right, skipped, _ = survivors(tmp_path, stored)
    assert right == set(stored)
    assert skipped == {"extent without a header": 1}
    assert all(stranger.read_bytes() == b"mine" for stranger in strangers)


@pytest.mark.parametrize("damaged", ["superblock", "superblock.copy"])
def test_one_damaged_superblock_is_mended_from_the_other(
    tmp_path: Path, pristine: tuple[Path, dict[bytes, Stored]], damaged: str
) -> None:
    origin, stored = pristine
    shutil.copytree(origin, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "kvd-spill" / damaged
    good = path.read_bytes()
    flip(path, random.Random(1), 20)
    right, _, _ = survivors(tmp_path, stored)
    assert right == set(stored)
    assert path.read_bytes() == good


@pytest.mark.parametrize("how", ["damaged", "of another format", "empty"])
def test_a_directory_that_cannot_be_believed_starts_anew(
    tmp_path: Path, pristine: tuple[Path, dict[bytes, Stored]], how: str, caplog: pytest.LogCaptureFixture
) -> None:
    origin, stored = pristine
    shutil.copytree(origin, tmp_path, dirs_exist_ok=True)
    for name in ("superblock", "superblock.copy"):
        path = tmp_path / "kvd-spill" / name
        content = bytearray(path.read_bytes())
        content[40] ^= 1
        if how == "of another format":
            content[8] += 1
        path.write_bytes(b"" if how == "empty" else content)
    assert survivors(tmp_path, stored) == (set(), {}, 0)
    assert "starts anew" in caplog.text and ("format 2" in caplog.text) == (how == "of another format")
    with Rig([tmp_path]) as rig:  # and can be used
        place = rig.stored(SPACES[0], key(1), bytes(SPACES[0].chunk_bytes))
        assert rig.read(SPACES[0], key(1), place).outcome is Outcome.OK


def test_a_smaller_tier_gives_up_the_extents_beyond_it(
    tmp_path: Path, pristine: tuple[Path, dict[bytes, Stored]]
) -> None:
    origin, stored = pristine
    shutil.copytree(origin, tmp_path, dirs_exist_ok=True)
    with Rig([tmp_path], drive_bytes=9 * MIB) as rig:
        extent_bytes = rig.drive.directory.superblock.extent_bytes
        assert extent_bytes > MIB
        attachment = rig.listener.attachments[0]
        assert attachment.extents * attachment.extent_bytes <= 9 * MIB
        assert max(attachment.existing) < attachment.extents
        found, _ = rig.scan()
        assert {record.key for record in found} == {
            name for name, record in stored.items() if record.place.extent < attachment.extents
        }


def test_a_tier_too_small_for_its_extents_starts_anew(
    tmp_path: Path, pristine: tuple[Path, dict[bytes, Stored]], caplog: pytest.LogCaptureFixture
) -> None:
    origin, _ = pristine
    shutil.copytree(origin, tmp_path, dirs_exist_ok=True)
    with Rig([tmp_path], drive_bytes=5 * MIB) as rig:
        assert rig.listener.attachments[0].existing == ()
        assert rig.drive.directory.superblock.extent_bytes == MIB
    assert "too large" in caplog.text
