"""An index beside an extent makes a start fast, and changes nothing else, whatever becomes of it."""

from __future__ import annotations

import os
import random
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from kvd.spill import index, scan
from kvd.spill.drive import DriveState
from kvd.spill.files import Files
from kvd.spill.record import HEADER_BYTES, Header, padded
from kvd.types import ROOT, Found, Outcome, Place
from tests.unit.spill.harness import EIO, KIB, MIB, PAGE, FaultyFiles, Rig, key, namespace
from tests.wait import wait_until

DRIVE_BYTES = 9 * MIB
RECORDS = 590
SPACES = (namespace("a", 6 * KIB), namespace("b", 5000))
SPACE = SPACES[0]
LIFE = bytes(range(16))


class Watched(Files):
    """Knows what was read of extents, bytes. ``broken``: an errno for whatever is asked of an index."""

    def __init__(self) -> None:
        self.reads: list[int] = []
        self.broken = 0
        self._kinds: dict[int, str] = {}

    def open(self, path: str, flags: int) -> int:
        kind = path.rpartition(".")[2]
        if self.broken and kind == "index":
            raise OSError(self.broken, os.strerror(self.broken), path)
        fd = super().open(path, flags)
        self._kinds[fd] = kind
        return fd

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        length = super().preadv(fd, buffers, offset)
        if self._kinds[fd] == "extent":
            self.reads.append(length)
        return length


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of two namespaces in several extents, which came into the indexes in several batches."""
    parent = tmp_path_factory.mktemp("pristine")
    with Rig([parent], drive_bytes=DRIVE_BYTES) as rig:
        for number in range(RECORDS):
            space = SPACES[number % 2]
            rig.stored(space, key(number), bytes(space.chunk_bytes), parent=key(number - 2) if number > 1 else ROOT)
            if number % 40 == 0:
                place = Path(rig.drive.path)
                before = sum(path.stat().st_size for path in place.glob("*.index"))
                rig.drive.sync()
                wait_until(
                    lambda place=place, before=before: sum(f.stat().st_size for f in place.glob("*.index")) > before,
                    what="the keeper",
                )
    return parent


@pytest.fixture
def filled(tmp_path: Path, pristine: Path) -> Path:
    """A copy."""
    shutil.copytree(pristine, tmp_path, dirs_exist_ok=True)
    return tmp_path


def found_in(parent: Path, files: Files | None = None, *, drive_bytes: int = DRIVE_BYTES) -> list[Found]:
    """What a start finds, in the order of the places."""
    with Rig([parent], drive_bytes=drive_bytes, files=files) as rig:
        found, _ = rig.scan()
        assert rig.drive.state is DriveState.WORKING
    return sorted(found, key=lambda one: one.place)


def by_headers(parent: Path, beside: Path, **options: int) -> list[Found]:
    """The same, without indexes."""
    shutil.copytree(parent / "kvd-spill", beside / "kvd-spill")
    for path in indexes(beside):
        path.unlink()
    return found_in(beside, **options)


def indexes(parent: Path) -> list[Path]:
    return sorted((parent / "kvd-spill").glob("*.index"))


def next_place(found: list[Found]) -> Place:
    """Where the youngest extent goes on."""
    last = max((one.place for one in found), key=lambda place: place.sequence)
    return last._replace(
        offset=last.offset + last.record_bytes,
        record_bytes=HEADER_BYTES + padded(SPACE.chunk_bytes),
        sequence=last.sequence + 1,
    )


def read_by_a_start(parent: Path) -> int:
    """How much of extents is read, bytes."""
    files = Watched()
    found_in(parent, files)
    return sum(files.reads)


def test_an_index_is_read_instead_of_headers_and_says_the_same(
    filled: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    files = Watched()
    found = found_in(filled, files)
    extents = len({one.place.extent for one in found})
    assert len(found) == RECORDS and extents > 6 and len(indexes(filled)) == extents
    # Its header, the last record's, and what is behind that.
    behind = extents * MIB - sum(one.place.record_bytes for one in found)
    assert sum(files.reads) <= 2 * PAGE * extents + behind < sum(one.place.record_bytes for one in found)
    assert found == by_headers(filled, tmp_path_factory.mktemp("beside"))


def test_batches_of_an_index_fit_into_what_is_read_at_once() -> None:
    assert index.BATCH_BYTES + index.MAX_ENTRIES * index.ENTRY_BYTES <= scan._WINDOW_BYTES


def cut_short(path: Path, dice: random.Random, parent: Path) -> None:
    os.truncate(path, dice.randrange(path.stat().st_size))


def flipped(path: Path, dice: random.Random, parent: Path) -> None:
    content = bytearray(path.read_bytes())
    content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    path.write_bytes(content)


def torn(path: Path, dice: random.Random, parent: Path) -> None:
    content = path.read_bytes()
    at = dice.randrange(len(content))
    path.write_bytes(content[:at] + bytes(len(content) - at))


def longer(path: Path, dice: random.Random, parent: Path) -> None:
    path.write_bytes(path.read_bytes() + dice.randbytes(dice.randrange(1, 5000)))


def twice(path: Path, dice: random.Random, parent: Path) -> None:
    path.write_bytes(path.read_bytes() * 2)


def foreign(path: Path, dice: random.Random, parent: Path) -> None:
    """That of another extent."""
    path.write_bytes(dice.choice([one for one in indexes(parent) if one != path]).read_bytes())


def gone(path: Path, dice: random.Random, parent: Path) -> None:
    path.unlink()


def unreadable(path: Path, dice: random.Random, parent: Path) -> None:
    path.unlink()
    path.symlink_to("/proc/self/mem")


def pipe(path: Path, dice: random.Random, parent: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def directory(path: Path, dice: random.Random, parent: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "damage", [cut_short, flipped, torn, longer, twice, foreign, gone, unreadable, pipe, directory]
)
def test_a_damaged_index_costs_time_only_and_is_mended(
    filled: Path, pristine: Path, damage: Callable[[Path, random.Random, Path], None], seed: int
) -> None:
    dice = random.Random(f"{damage.__name__} {seed}")
    right = found_in(filled)
    fast = read_by_a_start(filled)
    for path in dice.sample(indexes(filled), 3):
        damage(path, dice, filled)
    assert found_in(filled) == right
    assert read_by_a_start(filled) == fast


def test_what_does_not_count_is_cut_off_before_anything_follows(filled: Path) -> None:
    with Rig([filled], drive_bytes=DRIVE_BYTES) as rig:
        found, _ = rig.scan()
        place = next_place(found)
        path = rig.extent_path(place).with_suffix(".index")
        content = path.read_bytes()
    path.write_bytes(content + content)
    with Rig([filled], drive_bytes=DRIVE_BYTES) as rig:
        rig.scan()
        rig.write(SPACE, key(777), bytes(SPACE.chunk_bytes), place=place)
    assert path.read_bytes()[: len(content)] == content
    assert path.stat().st_size == len(content) + index.BATCH_BYTES + index.ENTRY_BYTES


def test_an_index_with_another_secret_is_not_believed(filled: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    right = by_headers(filled, tmp_path_factory.mktemp("beside"))
    for path in indexes(filled):
        content = memoryview(path.read_bytes())
        size = len(content) - index.BATCH_BYTES
        first = right[0]._replace(key=key(666))
        header = Header(0, HEADER_BYTES, LIFE, padded(size), 1, first.namespace_id, first.key, b"", 1, 1, 1, 0, 1, 0, 0)
        run = index.Run(LIFE)
        run.add(header)
        path.write_bytes(index.pack_batch(int(path.stem), LIFE, HEADER_BYTES, run.entries, b"guess".ljust(32)))
    assert found_in(filled) == right


def test_a_record_that_the_index_has_and_the_disk_lost_is_no_obstacle(filled: Path) -> None:
    """A disk that keeps nothing of what it said it had: the next record in the same place must be found."""
    right = found_in(filled)
    last = max((one for one in right if one.place.extent == 0), key=lambda one: one.place)
    with (filled / "kvd-spill" / "00000000.extent").open("r+b") as file:
        file.seek(last.place.offset)
        file.write(bytes(last.place.record_bytes))
    with Rig([filled], drive_bytes=DRIVE_BYTES) as rig:
        found, _ = rig.scan()
        assert sorted(one.key for one in found) == sorted(one.key for one in right if one != last)
        again = last.place._replace(sequence=10_000)
        space = next(space for space in SPACES if space.id == last.namespace_id)
        assert rig.write(space, key(777), bytes(space.chunk_bytes), place=again)[1].outcome is Outcome.OK
    old = [one for one in right if one != last]
    assert {one.key for one in found_in(filled)} == {one.key for one in old} | {key(777)}
    assert read_by_a_start(filled) < RECORDS * PAGE


def test_an_extent_that_was_cut_short_has_what_is_left(filled: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    os.truncate(filled / "kvd-spill" / "00000001.extent", MIB // 2)
    right = by_headers(filled, tmp_path_factory.mktemp("beside"))
    assert found_in(filled) == right and len(right) < RECORDS


def test_a_former_life_is_continued_in_its_index(tmp_path: Path) -> None:
    for number in range(4):
        files = Watched()
        with Rig([tmp_path], files=files) as rig:
            found, _ = rig.scan()
            assert len(found) == 5 * number and files.reads.count(PAGE) <= 3
            for at in range(5 * number, 5 * number + 5):
                if not found:
                    last = rig.stored(SPACE, key(at), bytes(SPACE.chunk_bytes))
                    found = [Found(SPACE.id, key(at), ROOT, SPACE.chunk_bytes, last)]
                    continue
                place = next_place(found)
                assert rig.write(SPACE, key(at), bytes(SPACE.chunk_bytes), place=place)[1].outcome is Outcome.OK
                found.append(Found(SPACE.id, key(at), ROOT, SPACE.chunk_bytes, place))
    assert [one.key for one in found_in(tmp_path, drive_bytes=33 * MIB)] == [key(at) for at in range(20)]


def test_what_was_moved_is_in_the_index(tmp_path: Path) -> None:
    with Rig([tmp_path]) as rig:
        source = rig.stored(SPACE, key(1), bytes(SPACE.chunk_bytes))
        rig.space.removed(0, [source.extent])  # so that the target is in another one
        target = rig.space.allocate(SPACE.chunk_bytes, moving=True)
        assert target is not None and target.extent != source.extent
        assert rig.move(SPACE, key(1), source, target).outcome is Outcome.OK
    assert len(indexes(tmp_path)) == 2


def test_behind_a_write_that_failed_headers_are_read(tmp_path: Path) -> None:
    written: list[Place] = []
    with Rig([tmp_path]) as rig:
        for number in range(20):
            place = rig.space.allocate(SPACE.chunk_bytes)
            assert place is not None
            if number != 8:  # that is how the index sees a write that failed
                assert rig.write(SPACE, key(number), bytes(SPACE.chunk_bytes), place=place)[1].outcome is Outcome.OK
                written.append(place)
    (path,) = indexes(tmp_path)
    assert path.stat().st_size < 8 * index.ENTRY_BYTES + 8 * index.BATCH_BYTES + 1
    for _ in range(2):
        assert [one.place for one in found_in(tmp_path, drive_bytes=33 * MIB)] == written


def test_a_new_life_has_a_new_index(tmp_path: Path) -> None:
    former: dict[Path, bytes] = {}
    with Rig([tmp_path], drive_bytes=4 * MIB) as rig:
        old = []
        while (place := rig.space.allocate(SPACE.chunk_bytes)) is not None:
            old.append(place)
            rig.write(SPACE, key(len(old)), bytes(SPACE.chunk_bytes), place=place)
        rig.drive.sync()
        extents = {place.extent for place in old}
        wait_until(lambda: len(indexes(tmp_path)) == len(extents), what="the keeper")
        former = {path: path.read_bytes() for path in indexes(tmp_path)}
        for place in old:
            rig.space.release(place)
        new = rig.stored(SPACE, key(1000), bytes(SPACE.chunk_bytes))
    path = tmp_path / "kvd-spill" / f"{new.extent:08d}.index"
    present = path.read_bytes()
    assert len(present) == index.BATCH_BYTES + index.ENTRY_BYTES
    for content in (present, former[path], former[path] + present, present + former[path]):
        path.write_bytes(content)
        inside = [one for one in found_in(tmp_path, drive_bytes=4 * MIB) if one.place.extent == new.extent]
        assert [one.key for one in inside] == [key(1000)]


def test_records_come_into_the_index_once_they_are_on_the_disk(tmp_path: Path) -> None:
    files = FaultyFiles()
    with Rig([tmp_path], files=files) as rig:
        rig.stored(SPACE, key(0), bytes(SPACE.chunk_bytes))
        wait_until(lambda: len(indexes(tmp_path)) == 1, what="the keeper")
        (path,) = indexes(tmp_path)
        before = path.stat().st_size
        files.hold["sync"] = threading.Event()
        files.held.clear()
        rig.stored(SPACE, key(1), bytes(SPACE.chunk_bytes))
        rig.drive.sync()
        wait_until(lambda: "sync" in files.held, what="the keeper to sync")
        assert path.stat().st_size == before
        files.hold.pop("sync").set()
        wait_until(lambda: path.stat().st_size > before, what="the index to be written")


def test_what_a_walk_has_found_is_synced_before_it_comes_into_the_index(filled: Path) -> None:
    for path in indexes(filled):
        path.unlink()
    files = FaultyFiles()
    with Rig([filled], drive_bytes=DRIVE_BYTES, files=files) as rig:
        files.hold["sync"] = threading.Event()
        rig.scan()
        wait_until(lambda: "sync" in files.held, what="the keeper to sync")
        assert indexes(filled) == []
        files.hold.pop("sync").set()
        wait_until(lambda: indexes(filled), what="the indexes to be written")


def test_a_sync_that_failed_leaves_records_out_until_one_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TICK_S", "SYNC_S", "PROBE_S"):
        monkeypatch.setattr(f"kvd.spill.drive.{name}", 0.05)
    files = FaultyFiles()
    with Rig([tmp_path], files=files) as rig:
        rig.stored(SPACE, key(0), bytes(SPACE.chunk_bytes))
        wait_until(lambda: len(indexes(tmp_path)) == 1, what="the keeper")
        (path,) = indexes(tmp_path)
        before = path.stat().st_size
        files.fail["sync"] = EIO
        assert rig.write(SPACE, key(1), bytes(SPACE.chunk_bytes))[1].outcome is Outcome.OK
        rig.wait_state(DriveState.DEGRADED)
        assert path.stat().st_size == before
        files.fail.clear()
        wait_until(lambda: path.stat().st_size > before, what="the drive to be well, and the index to be written")


@pytest.mark.parametrize("error", [EIO, 28, 13, 20])
def test_an_index_that_cannot_be_read_or_written_is_done_without(filled: Path, error: int) -> None:
    right, there = found_in(filled), len(indexes(filled))
    files = Watched()
    with Rig([filled], drive_bytes=DRIVE_BYTES, files=files) as rig:
        files.broken = error
        found, skipped = rig.scan()
        assert sorted(found, key=lambda one: one.place) == right
        assert skipped["unreadable index"] == there
        rig.drive.sync()
        place, result = rig.write(SPACE, key(5000), bytes(SPACE.chunk_bytes), place=next_place(found))
        assert result.outcome is Outcome.OK
        assert rig.read(SPACE, key(5000), place).outcome is Outcome.OK
        assert rig.drive.state is DriveState.WORKING
    assert {one.key for one in found_in(filled)} == {one.key for one in right} | {key(5000)}


def test_an_index_has_its_part_of_the_drive_and_no_more(
    filled: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = by_headers(filled, tmp_path_factory.mktemp("beside"))
    for path in indexes(filled):
        path.unlink()
    bound = 3000
    with Rig([filled], drive_bytes=DRIVE_BYTES) as rig:
        rig.drive.directory.index_bytes = bound
        rig.scan()
    sizes = [path.stat().st_size for path in indexes(filled)]
    assert bound - index.ENTRY_BYTES < max(sizes) <= bound
    assert found_in(filled) == right


def test_an_index_leaves_the_file_system_its_floor(tmp_path: Path) -> None:
    files = FaultyFiles()
    with Rig([tmp_path], files=files, floor_bytes=MIB) as rig:
        place = rig.space.allocate(SPACE.chunk_bytes)
        assert place is not None
        rig.drive.prepare(SPACE, place)
        files.free = MIB + 50
        rig.write(SPACE, key(1), bytes(SPACE.chunk_bytes), place=place)
    assert [path.stat().st_size for path in indexes(tmp_path)] in ([], [0])
    assert [one.key for one in found_in(tmp_path, drive_bytes=33 * MIB)] == [key(1)]


def test_indexes_go_with_their_extents(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvd.spill.drive.TICK_S", 0.05)
    place = filled / "kvd-spill"
    (place / "00000000.extent").unlink()
    (place / "00000777.index").write_bytes(b"of nobody")
    (place / "00000001.index.bak").write_bytes(b"mine")
    with Rig([filled], drive_bytes=DRIVE_BYTES) as rig:
        there = {path.stem for path in place.glob("*.extent")}
        assert {path.stem for path in indexes(filled)} == there
        (place / "00000002.extent").unlink()
        rig.drive.sync()
        wait_until(lambda: not (place / "00000002.index").exists(), what="the keeper")
        wait_until(lambda: (0, [2]) in rig.listener.losses, what="the loss to be told")
    assert (place / "00000001.index.bak").read_bytes() == b"mine"


def test_an_index_that_somebody_shortens_or_removes_meanwhile_is_written_anew_by_the_next(filled: Path) -> None:
    fast = read_by_a_start(filled)
    for number, harm in enumerate((lambda path: os.truncate(path, 100), lambda path: path.unlink())):
        with Rig([filled], drive_bytes=DRIVE_BYTES) as rig:
            found, _ = rig.scan()
            place = next_place(found)
            harm(filled / "kvd-spill" / f"{place.extent:08d}.index")
            result = rig.write(SPACE, key(9000 + number), bytes(SPACE.chunk_bytes), place=place)[1]
            assert result.outcome is Outcome.OK
        assert len(found_in(filled)) == RECORDS + number + 1
        assert read_by_a_start(filled) <= fast
