"""Records on a real file system: what is written is what is read, in this life of the daemon and in the next."""

from __future__ import annotations

import os
import random
import stat
from pathlib import Path

import pytest

from kvd.lock import AlreadyLocked, PathLock
from kvd.spill.drive import DriveState
from kvd.spill.transfer import PIECE_BYTES, checksum_of
from kvd.types import Outcome
from tests.unit.spill.harness import KIB, MIB, PAGE, FaultyFiles, Rig, key, namespace
from tests.wait import wait_until

RANDOM = random.Random(5)


@pytest.mark.parametrize("chunk_bytes", [1, PAGE - 1, PAGE, 100_000, 2 * MIB - 4 * PAGE])
def test_what_is_written_is_read(tmp_path: Path, chunk_bytes: int) -> None:
    space = namespace(chunk_bytes=chunk_bytes)
    chunk = RANDOM.randbytes(chunk_bytes)
    with Rig([tmp_path]) as rig:
        place = rig.stored(space, key(1), chunk, parent=key(7))
        rig.clear(0, chunk_bytes)
        result = rig.read(space, key(1), place, parent=key(7), offset=4 * MIB)
        assert result == (result.ticket, Outcome.OK, checksum_of(memoryview(chunk)), None)
        assert rig.chunk(4 * MIB, chunk_bytes) == chunk


def test_a_large_record_goes_in_pieces(tmp_path: Path) -> None:
    space = namespace(chunk_bytes=2 * PIECE_BYTES + 100_000)
    chunk = RANDOM.randbytes(space.chunk_bytes)
    with Rig([tmp_path], drive_bytes=320 * MIB, pool_bytes=64 * MIB) as rig:
        place = rig.stored(space, key(1), chunk)
        assert rig.read(space, key(1), place, offset=32 * MIB).outcome is Outcome.OK
        assert rig.chunk(32 * MIB, len(chunk)) == chunk
        target = rig.space.allocate(len(chunk), moving=True)
        assert target is not None and target.extent != place.extent
        assert rig.move(space, key(1), place, target).outcome is Outcome.OK
        rig.clear(32 * MIB, len(chunk))
        assert rig.read(space, key(1), target, offset=32 * MIB).outcome is Outcome.OK
        assert rig.chunk(32 * MIB, len(chunk)) == chunk


def test_short_reads_and_writes_are_continued(tmp_path: Path) -> None:
    files = FaultyFiles()
    space = namespace(chunk_bytes=5 * PAGE)
    chunk = RANDOM.randbytes(space.chunk_bytes)
    with Rig([tmp_path], files=files) as rig:
        files.short = PAGE
        place = rig.stored(space, key(1), chunk)
        assert rig.read(space, key(1), place, offset=MIB).outcome is Outcome.OK
        files.short = 0
        assert rig.chunk(MIB, len(chunk)) == chunk
        assert files.calls.count("pwritev") > 6


def test_the_next_daemon_finds_every_record(tmp_path: Path) -> None:
    spaces = [namespace("a", 60_000), namespace("b", 8 * KIB, layers=4), namespace("c", 700 * KIB)]
    parents = [tmp_path / "one", tmp_path / "two"]
    for parent in parents:
        parent.mkdir()
    chunks = {}
    with Rig(parents) as rig:
        for number in range(60):
            space = spaces[number % 3]
            chunk = RANDOM.randbytes(space.chunk_bytes)
            parent_key = key(number - 3) if number > 2 else b""
            place = rig.stored(space, key(number), chunk, parent=parent_key)
            chunks[key(number)] = (space, parent_key, chunk, place)
        assert {place.drive for *_, place in chunks.values()} == {0, 1}
    with Rig(parents) as rig:
        found, skipped = rig.scan()
        assert skipped == {}
        assert {record.key for record in found} == set(chunks)
        described = {drive.index: drive.namespaces() for drive in rig.drives}
        for record in found:
            space, parent_key, chunk, place = chunks[record.key]
            assert record == (space.id, record.key, parent_key, space.chunk_bytes, place)
            assert described[record.place.drive][record.namespace_id] == space
            assert rig.read(space, record.key, record.place, parent=parent_key).outcome is Outcome.OK
            assert rig.chunk(0, len(chunk)) == chunk
        new = rig.space.allocate(1)
        assert new is not None and new.sequence > max(record.place.sequence for record in found)


def test_a_moved_record_is_found_twice_and_the_newer_has_the_higher_sequence(tmp_path: Path) -> None:
    space = namespace()
    chunk = RANDOM.randbytes(space.chunk_bytes)
    with Rig([tmp_path]) as rig:
        source = rig.stored(space, key(1), chunk)
        target = rig.space.allocate(len(chunk), moving=True)
        assert target is not None
        assert rig.move(space, key(1), source, target).outcome is Outcome.OK
    with Rig([tmp_path]) as rig:
        found, _ = rig.scan()
        assert [record.place for record in sorted(found, key=lambda record: record.place.sequence)] == [source, target]
        assert rig.read(space, key(1), target).outcome is Outcome.OK


def test_a_seal_takes_the_checksum_that_a_verify_checks(tmp_path: Path) -> None:
    space = namespace(chunk_bytes=10_000)
    chunk = RANDOM.randbytes(10_000)
    with Rig([tmp_path]) as rig:
        rig.fill(PAGE, chunk)
        sealed = rig.seal(space, PAGE)
        assert sealed.checksum == checksum_of(memoryview(chunk)) and sealed.encoded is None
        assert rig.verify(PAGE, 10_000, sealed.checksum).outcome is Outcome.OK
        rig.pool[PAGE + 9_999] ^= 1
        assert rig.verify(PAGE, 10_000, sealed.checksum).outcome is Outcome.CORRUPT


def test_the_directory_and_its_files_are_their_users_alone(tmp_path: Path) -> None:
    with Rig([tmp_path]) as rig:
        rig.stored(namespace(), key(1), bytes(64 * KIB))
        directory = Path(rig.drive.path)
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        files = [path for path in directory.rglob("*") if path.is_file()]
        assert len(files) >= 5
        assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}


def test_extents_have_their_bytes_before_they_are_written_and_the_tier_keeps_to_its_size(tmp_path: Path) -> None:
    space = namespace(chunk_bytes=500 * KIB)
    with Rig([tmp_path], drive_bytes=5 * MIB) as rig:
        places = []
        while (place := rig.space.allocate(space.chunk_bytes)) is not None:
            places.append(rig.write(space, key(len(places)), RANDOM.randbytes(space.chunk_bytes), place=place))
        assert len(places) > 2 and all(result.outcome is Outcome.OK for _, result in places)
        files = sorted(Path(rig.drive.path).glob("*.extent"))
        extent_bytes = rig.drive.directory.superblock.extent_bytes
        assert all(path.stat().st_blocks * 512 >= extent_bytes for path in files)
        used = sum(path.stat().st_blocks * 512 for path in Path(rig.drive.path).rglob("*"))
        assert used <= 5 * MIB


def test_a_new_life_is_on_the_disk_before_its_first_record_and_records_soon_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvd.spill.drive.TICK_S", 0.02)
    monkeypatch.setattr("kvd.spill.drive.SYNC_S", 0.02)
    files = FaultyFiles()
    with Rig([tmp_path], files=files) as rig:
        place = rig.stored(namespace(), key(1), bytes(64 * KIB))
        begun = [call for call in files.calls if call in ("allocate", "pwritev", "sync")]
        assert begun[:4] == ["allocate", "pwritev", "sync", "pwritev"]
        wait_until(lambda: files.calls.count("sync") == 2, what="the record to be synced")
        again = rig.stored(namespace(), key(2), bytes(64 * KIB))
        assert again.extent == place.extent
        wait_until(lambda: files.calls.count("sync") == 3, what="the second record to be synced")
        assert files.calls.count("allocate") == 1


def test_a_second_daemon_does_not_get_the_directory(tmp_path: Path) -> None:
    with Rig([tmp_path]), Rig([tmp_path], start=False) as second:
        assert second.drive.state is DriveState.DEGRADED
        assert str(os.getpid()) in second.drive.reason
    with Rig([tmp_path]) as third:
        assert third.drive.state is DriveState.WORKING


def test_the_lock_is_let_go_when_all_is_written(tmp_path: Path) -> None:
    with Rig([tmp_path]) as rig:
        rig.stored(namespace(), key(1), bytes(64 * KIB))
        with pytest.raises(AlreadyLocked):
            PathLock(str(tmp_path / "kvd-spill" / "lock"))
    PathLock(str(tmp_path / "kvd-spill" / "lock")).release()


def test_a_file_system_without_direct_io_does_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvd.spill.directory._takes_direct", lambda path: False)
    space = namespace()
    chunk = RANDOM.randbytes(space.chunk_bytes)
    with Rig([tmp_path]) as rig:
        assert not rig.drive.direct
        place = rig.stored(space, key(1), chunk)
        assert rig.read(space, key(1), place, offset=MIB).outcome is Outcome.OK
        assert rig.chunk(MIB, len(chunk)) == chunk
