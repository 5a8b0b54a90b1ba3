"""Which records come into an index, and which batches of it count."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from kvd.spill import index
from kvd.spill.files import Files
from kvd.spill.index_files import IndexFiles
from kvd.spill.record import HEADER_BYTES, Header
from tests.unit.spill.harness import Rig, key

LIFE = bytes(range(16))


def header_at(offset: int) -> Header:
    return Header(3, offset, LIFE, 2 * HEADER_BYTES, offset, bytes(32), key(offset), b"", 1, 1, 1, 0, 1, 0, 0)


def test_records_join_the_run_in_the_order_of_their_places() -> None:
    dice = random.Random(1)
    offsets = [HEADER_BYTES + number * 2 * HEADER_BYTES for number in range(300)]
    run = index.Run(LIFE)
    left = offsets[:]
    while left:
        run.add(header_at(left.pop(dice.randrange(min(8, len(left))))))
    part = index.parse_batch(
        memoryview(index.pack_batch(3, LIFE, HEADER_BYTES, run.entries, bytes(32))), 0, 3, LIFE, HEADER_BYTES, bytes(32)
    )
    assert part is not None and [one.place.offset for one in part.found] == offsets
    assert [one.key for one in part.found] == [key(offset) for offset in offsets] and part.end == run.end


def test_what_waits_behind_a_gap_is_bounded() -> None:
    run = index.Run(LIFE)
    for number in range(1, 5 * index._MAX_BEHIND):
        run.add(header_at(HEADER_BYTES + number * 2 * HEADER_BYTES))
        assert len(run._behind) <= index._MAX_BEHIND
    assert run.end == HEADER_BYTES and not run.entries


@pytest.mark.parametrize("change", range(6))
def test_a_batch_counts_in_its_place_only(change: int) -> None:
    run = index.Run(LIFE)
    run.add(header_at(HEADER_BYTES))
    content = memoryview(index.pack_batch(3, LIFE, HEADER_BYTES, run.entries, bytes(32)))
    wanted = [3, LIFE, HEADER_BYTES, bytes(32)]
    assert index.parse_batch(content, 0, *wanted) is not None  # type: ignore[arg-type]
    if change < 4:
        wanted[change] = [4, LIFE[::-1], 2 * HEADER_BYTES, b"\1" * 32][change]
    else:
        content = content[: change - 4 or -1]
    assert index.parse_batch(content, 0, *wanted) is None  # type: ignore[arg-type]


def test_indexes_forget_lives_that_are_over(tmp_path: Path) -> None:
    with Rig([tmp_path]) as rig:
        files = IndexFiles(rig.drive.directory, Files(), 0)
        files.begin(3, LIFE)
        files.add(header_at(HEADER_BYTES)._replace(life=LIFE[::-1]))
        assert files.complete() == []
        files.add(header_at(HEADER_BYTES))
        former = files.complete()
        files.begin(3, LIFE[::-1])
        files.go_on(3, index.Run(LIFE))  # a scan comes too late
        assert files.complete() == [] and [one.length for one in former] == [index.ENTRY_BYTES]
        files.add(header_at(HEADER_BYTES)._replace(life=LIFE[::-1]))
        assert len(files.complete()) == 1
        files.forget(3)
        assert files.complete() == []
