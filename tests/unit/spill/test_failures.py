"""Drives that fail, fill up, hang, vanish and come back; orders are answered exactly once whatever happens."""

from __future__ import annotations

import random
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvd.spill import engine, transfer
from kvd.spill.drive import Drive, DriveState
from kvd.spill.engine import Threads
from kvd.spill.health import Patience
from kvd.spill.transfer import checksum_of
from kvd.types import ROOT, Outcome, Read, Seal, Write
from tests.unit.spill.harness import EIO, ENOSPC, EROFS, KIB, MIB, PAGE, FaultyFiles, Rig, key, namespace
from tests.wait import wait_until

SPACE = namespace(chunk_bytes=40 * KIB)
CHUNK = random.Random(3).randbytes(SPACE.chunk_bytes)
CHECKSUM = checksum_of(memoryview(CHUNK))
HASTY = Patience(stall_s=0.5)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for seconds."""
    for name in ("TICK_S", "SYNC_S", "LOOK_S", "PROBE_S"):
        monkeypatch.setattr(f"kvd.spill.drive.{name}", 0.03)
    monkeypatch.setattr("kvd.spill.engine._WATCH_S", 0.03)


@pytest.fixture
def files() -> Iterator[FaultyFiles]:
    """Calls that fail; nothing is held or failing any more when the test is over."""
    made = FaultyFiles()
    yield made
    for held in made.hold.values():
        held.set()


@pytest.mark.parametrize("error", [EIO, EROFS])
@pytest.mark.parametrize("call", ["pwritev", "open"])
def test_a_drive_that_does_not_write_is_left_alone_until_it_does(
    tmp_path: Path, files: FaultyFiles, caplog: pytest.LogCaptureFixture, call: str, error: int
) -> None:
    with Rig([tmp_path], files=files) as rig:
        place = rig.stored(SPACE, key(1), CHUNK)
        files.fail[call] = error
        other, result = rig.write(SPACE, key(2), CHUNK)
        assert result.outcome is Outcome.FAILED
        rig.wait_state(DriveState.DEGRADED)
        assert rig.read(SPACE, key(1), place).outcome is Outcome.FAILED  # at once, though reading would do
        assert rig.drive.reason
        del files.fail[call]
        rig.wait_state(DriveState.WORKING)
        assert rig.drive.reason == ""
        assert rig.read(SPACE, key(1), place, offset=MIB).outcome is Outcome.OK
        assert rig.write(SPACE, key(2), CHUNK, place=other)[1].outcome is Outcome.OK
    changes = [state for _, state, _ in rig.listener.states]
    assert changes == [DriveState.WORKING, DriveState.DEGRADED, DriveState.WORKING, DriveState.CLOSED]
    assert caplog.text.count("does not work") == 1 == caplog.text.count("works again")


def test_a_spot_that_cannot_be_read_costs_its_record_a_drive_that_cannot_be_read_is_left_alone(
    tmp_path: Path, files: FaultyFiles
) -> None:
    with Rig([tmp_path], files=files) as rig:
        place = rig.stored(SPACE, key(1), CHUNK)
        files.fail["preadv"] = EIO
        assert rig.read(SPACE, key(1), place).outcome is Outcome.CORRUPT
        assert rig.read(SPACE, key(1), place).outcome is Outcome.CORRUPT
        assert rig.drive.state is DriveState.WORKING
        assert rig.read(SPACE, key(1), place).outcome is Outcome.FAILED
        assert rig.drive.state is DriveState.DEGRADED
        files.fail.clear()
        rig.wait_state(DriveState.WORKING)
        assert rig.read(SPACE, key(1), place).outcome is Outcome.OK


def test_the_other_drive_goes_on(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    with Rig([tmp_path / "a", tmp_path / "missing", tmp_path / "b"]) as rig:
        assert rig.drives[1].state is DriveState.DEGRADED and rig.drives[1].reason == "No such file or directory"
        places = {rig.stored(SPACE, key(number), CHUNK).drive for number in range(6)}
        assert places == {0, 2}
        (tmp_path / "missing").mkdir()  # somebody mounts it
        rig.wait_state(DriveState.WORKING, 1)
        rig.space.attach(1, *rig.listener.attachments[1])
        places = {rig.stored(SPACE, key(number), CHUNK).drive for number in range(10, 16)}
        assert places == {0, 1, 2}


def test_a_file_system_without_room_fails_the_write_and_not_the_drive(tmp_path: Path, files: FaultyFiles) -> None:
    with Rig([tmp_path], files=files) as rig:
        first = rig.stored(SPACE, key(1), CHUNK)
        files.fail["allocate"] = ENOSPC
        files.free = 0
        rig.space.removed(0, [first.extent])  # as if it were full: the next record needs a new extent
        place, result = rig.write(SPACE, key(2), CHUNK)
        assert result.outcome is Outcome.FAILED and rig.drive.state is DriveState.WORKING
        assert rig.listener.losses == [(0, [place.extent])]
        assert not rig.extent_path(place).exists()
        wait_until(lambda: (0, 1) in rig.listener.room, what="the room that there is")
        rig.space.release(place)
        rig.space.removed(0, [place.extent])
        rig.space.set_available(0, 1)
        assert rig.space.allocate(1) is None
        assert rig.read(SPACE, key(1), first).outcome is Outcome.OK
        del files.fail["allocate"]
        files.free = None
        wait_until(lambda: rig.listener.room[-1] == (0, rig.listener.attachments[0].extents), what="room again")


def test_the_floor_of_the_file_system_is_kept(tmp_path: Path, files: FaultyFiles) -> None:
    with Rig([tmp_path], files=files, floor_bytes=100 * MIB) as rig:
        extent_bytes = rig.drive.directory.superblock.extent_bytes
        files.free = 100 * MIB + extent_bytes - 1
        place, result = rig.write(SPACE, key(1), CHUNK)
        assert result.outcome is Outcome.FAILED and not rig.extent_path(place).exists()
        files.free = 100 * MIB + extent_bytes
        assert rig.write(SPACE, key(1), CHUNK, place=place)[1].outcome is Outcome.OK


def test_free_extents_are_given_back_while_the_file_system_is_below_its_floor(
    tmp_path: Path, files: FaultyFiles
) -> None:
    with Rig([tmp_path], files=files, floor_bytes=50 * MIB) as rig:
        places = [rig.stored(namespace("l", MIB), key(number), bytes(MIB)) for number in range(9)]
        held = {place.extent for place in places}
        assert len(held) > 4
        for place in places:
            if place.extent not in (places[-1].extent, places[0].extent):
                rig.space.release(place)
        files.free = 50 * MIB - 1
        wait_until(lambda: rig.listener.room[-1][1] == len(held) - 1, what="one extent too many")
        spares = rig.space.set_available(*rig.listener.room[-1])
        reopened = rig.space.allocate(MIB, moving=True)
        assert reopened is not None and reopened.extent in {spare.extent for spare in spares}
        assert rig.write(namespace("l", MIB), key(99), bytes(MIB), place=reopened)[1].outcome is Outcome.OK
        rig.drive.give_back(spares)
        wait_until(lambda: len(rig.listener.losses) == 1, what="extents to be given back")
        removed = set(rig.listener.losses[0][1])
        # What has been given a new life meanwhile stays, and so does what is not free.
        assert removed == {spare.extent for spare in spares} - {reopened.extent}
        assert rig.read(namespace("l", MIB), key(0), places[0]).outcome is Outcome.OK
        assert rig.read(namespace("l", MIB), key(99), reopened).outcome is Outcome.OK
        rig.space.removed(0, removed)


def test_extents_that_vanish_are_told_and_the_rest_stays(tmp_path: Path) -> None:
    space = namespace("l", MIB)
    with Rig([tmp_path]) as rig:
        places = [rig.stored(space, key(number), bytes(MIB)) for number in range(4)]
        gone = places[0]
        rig.extent_path(gone).unlink()
        wait_until(lambda: rig.listener.losses, what="the loss")
        assert rig.listener.losses == [(0, [gone.extent])]
        assert rig.read(space, key(0), gone).outcome is not Outcome.OK
        assert rig.drive.state is DriveState.WORKING
        kept = next(place for place in places if place.extent != gone.extent)
        assert rig.read(space, key(places.index(kept)), kept).outcome is Outcome.OK
        rig.space.removed(0, [gone.extent])
        assert rig.stored(space, key(9), bytes(MIB)).extent != gone.extent


def test_a_directory_that_is_removed_is_made_anew_and_what_it_held_is_told(tmp_path: Path) -> None:
    with Rig([tmp_path]) as rig:
        place = rig.stored(SPACE, key(1), CHUNK)
        wait_until(rig.extent_path(place).with_suffix(".index").exists, what="the keeper to have done its part")
        shutil.rmtree(tmp_path / "kvd-spill")
        wait_until(lambda: rig.listener.losses, what="the loss")
        assert rig.listener.losses == [(0, [place.extent])]
        rig.wait_state(DriveState.WORKING)
        assert [state for _, state, _ in rig.listener.states] == [
            DriveState.WORKING,
            DriveState.DEGRADED,
            DriveState.WORKING,
        ]
        rig.space.removed(0, [place.extent])
        rig.space.release(place)
        rig.stored(SPACE, key(2), CHUNK)
    with Rig([tmp_path]) as rig:  # its lock, superblock and namespaces are those of a whole directory
        assert [record.key for record in rig.scan()[0]] == [key(2)]
        assert list(rig.drive.namespaces().values()) == [SPACE]


def test_another_directory_in_its_place_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "other").mkdir()
    with Rig([tmp_path / "other"]):
        pass
    with Rig([tmp_path / "here"]) as rig:
        rig.stored(SPACE, key(1), CHUNK)
        (tmp_path / "here").rename(tmp_path / "aside")
        (tmp_path / "other").rename(tmp_path / "here")
        rig.wait_state(DriveState.DEGRADED)
        wait_until(lambda: rig.drive.reason == "another spill directory is there now", what="the reason")
        (tmp_path / "here").rename(tmp_path / "other")
        (tmp_path / "aside").rename(tmp_path / "here")
        rig.wait_state(DriveState.WORKING)


def test_a_drive_that_hangs_fails_what_waits_and_answers_what_has_begun_when_the_kernel_lets_go(
    tmp_path: Path, files: FaultyFiles
) -> None:
    with Rig([tmp_path], files=files, patience=HASTY, threads=Threads(readers=1, writers=1, sealers=1)) as rig:
        place = rig.stored(SPACE, key(1), CHUNK)
        files.hold["preadv"] = threading.Event()
        begun = rig.submit(lambda ticket: Read(ticket, SPACE, key(1), ROOT, place, MIB))
        wait_until(lambda: "preadv" in files.held, what="the read to begin")
        waiting = [
            rig.submit(lambda ticket: Read(ticket, SPACE, key(1), ROOT, place, 2 * MIB)),
            rig.submit(lambda ticket: Read(ticket, SPACE, key(1), ROOT, place, 3 * MIB)),
        ]
        assert [result.outcome for result in rig.listener.wait(waiting)] == [Outcome.FAILED] * 2
        assert rig.drive.state is DriveState.DEGRADED and "under way" in rig.drive.reason
        # The kernel may still write to the slot: nobody may be told that it is free.
        assert begun not in rig.listener.results
        assert rig.read(SPACE, key(1), place).outcome is Outcome.FAILED
        files.hold.pop("preadv").set()
        assert rig.listener.wait([begun])[0].outcome is Outcome.OK
        rig.wait_state(DriveState.WORKING)
        assert rig.read(SPACE, key(1), place).outcome is Outcome.OK


def test_what_waits_for_a_drive_fails_as_soon_as_the_drive_does(
    tmp_path: Path, files: FaultyFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvd.spill.engine._WATCH_S", 3600.0)  # not by the watch
    with Rig([tmp_path], files=files, threads=Threads(readers=1, writers=1, sealers=1)) as rig:
        place = rig.stored(SPACE, key(1), CHUNK)
        held = files.hold["preadv"] = threading.Event()
        begun = rig.submit(lambda ticket: Read(ticket, SPACE, key(1), ROOT, place, MIB))
        wait_until(lambda: "preadv" in files.held, what="the read to begin")
        waiting = rig.submit(lambda ticket: Read(ticket, SPACE, key(1), ROOT, place, 2 * MIB))
        files.fail["open"] = EIO
        assert rig.write(SPACE, key(2), CHUNK)[1].outcome is Outcome.FAILED
        assert rig.listener.wait([waiting])[0].outcome is Outcome.FAILED
        assert begun not in rig.listener.results
        files.fail.clear()
        held.set()
        assert rig.listener.wait([begun])[0].outcome is Outcome.OK


def test_close_does_not_wait_for_ever_and_says_so(tmp_path: Path, files: FaultyFiles) -> None:
    rig = Rig([tmp_path], files=files)
    place = rig.stored(SPACE, key(1), CHUNK)
    held = files.hold["preadv"] = threading.Event()
    begun = rig.submit(lambda ticket: Read(ticket, SPACE, key(1), ROOT, place, MIB))
    wait_until(lambda: "preadv" in files.held, what="the read to begin")
    assert not rig.movers.close(0.2)
    assert rig.listener.wait([begun])[0].outcome is Outcome.FAILED
    held.set()
    assert rig.movers.close(10)
    assert rig.listener.answers == 2 and rig.listener.twice == []
    late = rig.submit(lambda ticket: Seal(ticket, 0, SPACE, False))
    assert rig.listener.results[late].outcome is Outcome.FAILED


def test_a_mistake_in_a_thread_costs_one_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Rig([tmp_path], threads=Threads(readers=1, writers=1, sealers=1)) as rig:
        place = rig.stored(SPACE, key(1), CHUNK)
        with monkeypatch.context() as patch:
            patch.setattr(engine, "read_record", lambda *_: 1 // 0)
            patch.setattr(engine, "checksum_of", lambda *_: 1 // 0)
            assert rig.read(SPACE, key(1), place).outcome is Outcome.FAILED
            assert rig.seal(SPACE, 0).outcome is Outcome.FAILED
        assert rig.read(SPACE, key(1), place).outcome is Outcome.OK
        assert rig.seal(SPACE, 0).outcome is Outcome.OK


def test_who_does_not_listen_hurts_nobody_else(tmp_path: Path) -> None:
    with Rig([tmp_path], threads=Threads(readers=1, writers=1, sealers=1), start=False) as rig:
        heard = rig.listener.complete

        def complete(result: object) -> None:
            heard(result)  # type: ignore[arg-type]
            raise RuntimeError("deaf")

        rig.movers._complete = complete
        rig.movers.start()
        place = rig.stored(SPACE, key(1), CHUNK)
        assert rig.read(SPACE, key(1), place).outcome is Outcome.OK


@pytest.mark.parametrize("seed", range(4))
def test_every_order_is_answered_exactly_once_whatever_fails(tmp_path: Path, seed: int) -> None:
    chosen = random.Random(seed)
    files = FaultyFiles()
    parents = [tmp_path / "a", tmp_path / "b"]
    for parent in parents:
        parent.mkdir()
    rig = Rig(parents, files=files, drive_bytes=9 * MIB, patience=HASTY)
    tickets = []
    written = []
    for number in range(300):
        if chosen.random() < 0.1:
            files.fail = {
                chosen.choice(["preadv", "pwritev", "sync", "open", "allocate"]): chosen.choice([EIO, ENOSPC])
            }
        elif chosen.random() < 0.3:
            files.fail = {}
        kind = chosen.random()
        place = rig.space.allocate(SPACE.chunk_bytes, moving=True)
        if kind < 0.5 and place is not None:
            tickets.append(rig.submit(lambda t, n=number, p=place: Write(t, SPACE, key(n), ROOT, 0, CHECKSUM, None, p)))
            written.append((number, place))
        elif kind < 0.8 and written:
            name, source = chosen.choice(written)
            tickets.append(rig.submit(lambda t, n=name, p=source: Read(t, SPACE, key(n), ROOT, p, MIB)))
        else:
            tickets.append(rig.submit(lambda t: Seal(t, 0, SPACE, False)))
        if chosen.random() < 0.2:
            time.sleep(0.002)
    if seed % 2:
        files.fail = {}
        rig.listener.wait(tickets)
    assert rig.movers.close(20)
    rig.listener.wait(tickets)
    assert rig.listener.answers == len(tickets) and rig.listener.twice == []


def test_a_record_in_pieces_gets_its_header_last(
    tmp_path: Path, files: FaultyFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "PIECE_BYTES", 64 * KIB)
    space = namespace("p", 200 * KIB)
    with Rig([tmp_path], files=files) as rig:
        reached: list[str] = []
        monkeypatch.setattr(transfer, "reach", lambda name: reached.append(f"{name} {files.calls.count('pwritev')}"))
        first = rig.stored(namespace("first", PAGE), key(0), bytes(PAGE))  # opens the extent
        index = rig.extent_path(first).with_suffix(".index")
        wait_until(lambda: index.exists() and index.stat().st_size > 0, what="the keeper to have done its part")
        files.calls.clear()
        reached.clear()
        place = rig.stored(space, key(1), bytes(space.chunk_bytes))
        assert reached == ["spill.record.write.before 0", "spill.record.header.before 3", "spill.record.write.after 4"]
        assert rig.read(space, key(1), place).outcome is Outcome.OK


def test_a_drive_is_opened_by_its_keeper_when_nobody_else_does(tmp_path: Path) -> None:
    drive = Drive(0, str(tmp_path), 9 * MIB, floor_bytes=0)
    thread = threading.Thread(target=drive.run)
    thread.start()
    wait_until(lambda: drive.state is DriveState.WORKING, what="the drive to be opened")
    drive.close()
    thread.join(10)
    assert not thread.is_alive() and drive.state is DriveState.CLOSED
