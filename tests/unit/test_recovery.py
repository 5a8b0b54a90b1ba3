"""What is remembered beside the chunks: kept whole or not at all, and a disk that hangs holds nobody up."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from kvd import recovery
from kvd.recovery import State, StateFiles
from tests.wait import wait_until

PATIENCE_S = 20.0


def files(*directories: Path) -> StateFiles:
    return StateFiles([str(directory / "state") for directory in directories])


def state(number: int) -> State:
    return State([["t", "00", ""]], [[1.5, number]], {b"\x01" * 32: number}, "day", float(number))


def test_the_youngest_state_counts_and_what_is_damaged_does_not(tmp_path: Path) -> None:
    one, other = tmp_path / "1", tmp_path / "2"
    one.mkdir()
    other.mkdir()
    assert files(one, other).load(PATIENCE_S) == State()
    assert files(one).save(state(1), PATIENCE_S) and files(other).save(state(2), PATIENCE_S)
    assert files(one, other).load(PATIENCE_S) == state(2)
    content = bytearray((other / "state").read_bytes())
    content[len(content) // 2] ^= 1
    (other / "state").write_bytes(content)
    assert files(one, other).load(PATIENCE_S) == state(1)


def test_a_disk_that_hangs_holds_up_neither_the_others_nor_whoever_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    well, hanging = tmp_path / "well", tmp_path / "hanging"
    well.mkdir()
    hanging.mkdir()
    heals, replace = threading.Event(), recovery._replace

    def write(path: str, content: bytes) -> None:
        if path.startswith(str(hanging)):
            assert heals.wait(PATIENCE_S)
        replace(path, content)

    monkeypatch.setattr(recovery, "_replace", write)
    both = files(well, hanging)
    try:
        assert not both.save(state(1), 0.2)
        assert files(well).load(PATIENCE_S) == state(1)
        assert not both.save(state(2), 0.2), "nothing is written past a write that has not come to its end"
    finally:
        heals.set()
    wait_until(lambda: both.save(state(3), PATIENCE_S), what="the disk to take part again")
    assert files(hanging).load(PATIENCE_S) == state(3)
