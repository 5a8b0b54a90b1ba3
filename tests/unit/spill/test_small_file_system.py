"""A real file system that fills up, turns read-only and is taken away. Needs to be allowed to mount one."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvd.spill.drive import DriveState
from kvd.types import Outcome
from tests.unit.spill.harness import DEADLINE_S, KIB, MIB, Rig, key, namespace
from tests.wait import wait_until

SPACE = namespace(chunk_bytes=500 * KIB)
CHUNK = random.Random(3).randbytes(SPACE.chunk_bytes)


def run(*command: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(command, capture_output=True, timeout=DEADLINE_S, check=False)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """An ext4 of 48 MiB."""
    if os.geteuid() != 0 or shutil.which("mkfs.ext4") is None:
        pytest.skip("only root can mount")
    image, mounted = tmp_path / "image", tmp_path / "mounted"
    mounted.mkdir()
    with image.open("wb") as file:
        file.truncate(48 * MIB)
    run("mkfs.ext4", "-q", "-F", "-m", "0", str(image))
    if run("mount", "-o", "loop", str(image), str(mounted)).returncode != 0:
        pytest.skip("no loop device")
    try:
        yield mounted
    finally:
        while os.path.ismount(mounted):
            assert run("umount", "-l", str(mounted)).returncode == 0


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TICK_S", "SYNC_S", "LOOK_S", "PROBE_S"):
        monkeypatch.setattr(f"kvd.spill.drive.{name}", 0.05)


def test_the_tier_takes_what_the_file_system_has(small: Path) -> None:
    with Rig([small], drive_bytes=200 * MIB) as rig:
        extents = rig.listener.attachments[0].extents
        outcomes = []
        for number in range(100):
            place = rig.space.allocate(SPACE.chunk_bytes)
            if place is None:
                break
            outcomes.append(rig.write(SPACE, key(number), CHUNK, place=place)[1].outcome)
            for drive, gone in rig.listener.losses:
                rig.space.removed(drive, gone)
            rig.listener.losses.clear()
            if outcomes[-1] is not Outcome.OK:
                rig.space.release(place)
                wait_until(lambda: rig.listener.room[-1][1] < extents, what="the room that there is")
            if rig.listener.room:
                rig.space.set_available(*rig.listener.room[-1])
        else:
            pytest.fail("it never became full")
        assert outcomes.count(Outcome.OK) > 20 and rig.drive.state is DriveState.WORKING
    with Rig([small], drive_bytes=200 * MIB) as rig:
        found, skipped = rig.scan()
        assert len(found) == outcomes.count(Outcome.OK) and skipped == {}
        assert all(rig.read(SPACE, record.key, record.place).outcome is Outcome.OK for record in found)


def test_room_that_others_need_is_given_back(small: Path) -> None:
    with Rig([small], drive_bytes=34 * MIB, floor_bytes=8 * MIB) as rig:
        places = [rig.stored(SPACE, key(number), CHUNK) for number in range(40)]
        for place in places[:-1]:
            rig.space.release(place)
        before = set(Path(rig.drive.path).glob("*.extent"))
        (small / "other").write_bytes(bytes(16 * MIB))
        full = rig.listener.attachments[0].extents
        wait_until(lambda: rig.listener.room and rig.listener.room[-1][1] < full, what="less room")
        rig.drive.give_back(rig.space.set_available(*rig.listener.room[-1]))
        wait_until(lambda: os.statvfs(small).f_bavail * os.statvfs(small).f_frsize >= 8 * MIB, what="the floor")
        wait_until(lambda: rig.listener.losses, what="what was removed")
        removed = {extent for _, gone in rig.listener.losses for extent in gone}
        assert len(set(Path(rig.drive.path).glob("*.extent"))) == len(before) - len(removed)
        rig.space.removed(0, removed)
        assert rig.read(SPACE, key(39), places[-1]).outcome is Outcome.OK


def test_a_file_system_that_turns_read_only_is_left_alone_until_it_can_be_written_again(small: Path) -> None:
    with Rig([small], drive_bytes=20 * MIB) as rig:
        place = rig.stored(SPACE, key(1), CHUNK)
        assert run("mount", "--bind", str(small), str(small)).returncode == 0
        assert run("mount", "-o", "remount,bind,ro", str(small)).returncode == 0
        result = rig.write(SPACE, key(2), CHUNK)[1]
        assert result.outcome is Outcome.FAILED
        assert rig.drive.state is DriveState.DEGRADED and rig.drive.reason == "Read-only file system"
        assert run("umount", str(small)).returncode == 0
        rig.wait_state(DriveState.WORKING)
        assert rig.read(SPACE, key(1), place).outcome is Outcome.OK
        rig.stored(SPACE, key(3), CHUNK)


def test_what_lies_below_a_file_system_that_is_taken_away_is_not_written_to(small: Path) -> None:
    with Rig([small], drive_bytes=20 * MIB) as rig:
        rig.stored(SPACE, key(1), CHUNK)
        assert run("umount", "-l", str(small)).returncode == 0
        rig.wait_state(DriveState.DEGRADED)
        wait_until(lambda: rig.drive.reason == "another file system is there now", what="the reason")
        assert list(small.iterdir()) == []
