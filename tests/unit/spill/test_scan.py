"""A scan is stopped at once, waits for who listens and for drives that come back, and says how far it is."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from kvd.spill.drive import DriveState
from kvd.spill.scan import Batch, Scan
from tests.unit.spill.harness import DEADLINE_S, EIO, KIB, MIB, FaultyFiles, Rig, key, namespace
from tests.wait import wait_until

SPACE = namespace(chunk_bytes=6 * KIB)


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    """Records in several extents."""
    with Rig([tmp_path], drive_bytes=9 * MIB) as rig:
        for number in range(590):
            rig.stored(SPACE, key(number), bytes(SPACE.chunk_bytes))
        assert len(rig.listener.attachments) == 1
    return tmp_path


def test_batches_are_bounded_and_the_last_of_an_extent_is_marked(filled: Path) -> None:
    batches: list[Batch] = []
    ended = threading.Event()
    with Rig([filled], drive_bytes=9 * MIB) as rig:
        existing = rig.listener.attachments[0].existing
        scan = Scan(rig.drive, existing, batches.append, ended.set, threads=3)
        scan.start()
        assert ended.wait(DEADLINE_S) and scan.join(DEADLINE_S)
        assert scan.progress.extents == scan.progress.extents_done == len(existing) > 6
        assert scan.progress.records == 590 == sum(len(batch.found) for batch in batches)
        assert max(len(batch.found) for batch in batches) <= 256
        for extent in existing:
            of_extent = [batch for batch in batches if batch.extent == extent]
            assert [batch.last for batch in of_extent] == [False] * (len(of_extent) - 1) + [True]
            offsets = [record.place.offset for batch in of_extent for record in batch.found]
            assert offsets == sorted(offsets)


def test_it_stops_at_once_and_waits_for_who_listens(filled: Path) -> None:
    heard = threading.Semaphore(0)
    go_on = threading.Event()
    ended = threading.Event()

    def listen(batch: Batch) -> None:
        heard.release()
        assert go_on.wait(DEADLINE_S)

    with Rig([filled], drive_bytes=9 * MIB) as rig:
        scan = Scan(rig.drive, rig.listener.attachments[0].existing, listen, ended.set, threads=1)
        scan.start()
        assert heard.acquire(timeout=DEADLINE_S)
        scan.stop()
        go_on.set()
        assert scan.join(DEADLINE_S)
        assert not heard.acquire(timeout=0.05) and scan.progress.extents_done <= 1
        assert not ended.is_set(), "a scan that was stopped has not seen everything"


def test_a_drive_that_does_not_work_is_waited_for(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvd.spill.drive.PROBE_S", 0.05)
    monkeypatch.setattr("kvd.spill.drive.TICK_S", 0.05)
    files = FaultyFiles()
    with Rig([filled], drive_bytes=9 * MIB, files=files) as rig:
        files.fail["pwritev"] = EIO
        rig.drive.failed(OSError(EIO, "broken"))
        assert rig.drive.state is DriveState.DEGRADED
        scan = Scan(rig.drive, rig.listener.attachments[0].existing, lambda batch: None, threads=2)
        scan.start()
        assert not scan.join(0.2) and scan.progress.records == 0
        files.fail.clear()
        assert scan.join(DEADLINE_S)
        assert scan.progress.records == 590


def test_an_extent_that_cannot_be_read_is_skipped_and_counted(filled: Path) -> None:
    files = FaultyFiles()
    with Rig([filled], drive_bytes=9 * MIB, files=files) as rig:
        files.fail["preadv"] = EIO
        existing = rig.listener.attachments[0].existing
        scan = Scan(rig.drive, existing, lambda batch: None, threads=1)
        scan.start()
        assert scan.join(DEADLINE_S)
        assert scan.progress.extents_done == len(existing) and scan.progress.records == 0
        assert sum(scan.progress.skipped.values()) == len(existing)


def test_an_extent_that_is_gone_is_skipped_and_counted(filled: Path) -> None:
    with Rig([filled], drive_bytes=9 * MIB) as rig:
        (filled / "kvd-spill" / "00000000.extent").unlink()
        last: list[int] = []
        existing = rig.listener.attachments[0].existing
        scan = Scan(rig.drive, existing, lambda batch: last.append(batch.extent) if batch.last else None, threads=1)
        scan.start()
        assert scan.join(DEADLINE_S)
        assert scan.progress.skipped == {"extent gone": 1} and sorted(last) == list(existing)


def test_a_mistake_of_who_listens_ends_the_scan_and_nothing_else(
    filled: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Rig([filled], drive_bytes=9 * MIB) as rig:
        scan = Scan(rig.drive, rig.listener.attachments[0].existing, lambda batch: 1 // 0, threads=2)
        scan.start()
        assert scan.join(DEADLINE_S)
        assert "ZeroDivisionError" in caplog.text and rig.drive.state is DriveState.WORKING
        wait_until(lambda: rig.seal(SPACE, 0), what="the movers to go on")
