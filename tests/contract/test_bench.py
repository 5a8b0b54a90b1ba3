"""``kvd bench`` of the tiers in small: it measures what it says, checks its bytes, and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvd_client.bench import disks, tiers
from kvd_client.bench.disks import BareDisk
from kvd_client.bench.figures import Figure

MIB = 1 << 20


def assert_good(figures: list[Figure], names: list[str]) -> None:
    assert [figure.name for figure in figures] == names
    assert all(figure.median > 0 for figure in figures)
    assert all(figure.limit is None or figure.limit > 0 for figure in figures)


@pytest.mark.parametrize("fio", [True, False])
def test_a_bare_disk_is_measured_with_fio_or_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fio: bool
) -> None:
    if fio and disks.shutil.which("fio") is None:
        pytest.skip("there is no fio here")
    if not fio:
        monkeypatch.setattr(disks.shutil, "which", lambda name: None)
    bare = BareDisk(str(tmp_path), 256 << 10, threads=2, total_bytes=4 * MIB)
    try:
        assert ("fio" in bare.tool) == fio
        assert bare.write() > 0 and bare.read() > 0 and bare.read_block() > 0
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert [path.stat().st_size for path in files] == [2 * MIB, 2 * MIB]
    finally:
        bare.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_disk_tier_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiers, "SET_CHUNKS", 8)
    monkeypatch.setattr(tiers, "SINGLES", 3)
    monkeypatch.setattr(tiers, "SMALL_CHUNKS", 2048)
    figures = tiers.bench_spill(2, str(tmp_path))
    assert_good(
        figures,
        ["spill", "promote", "promote of one chunk", "promote of one chunk, client", "records found by a start"],
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_restarts_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiers, "RESTART_POOL_BYTES", 64 * MIB)
    figures = tiers.bench_restart(2)
    assert_good(figures, ["start after SIGKILL", "first hit after SIGKILL", "all hits after SIGKILL"])
