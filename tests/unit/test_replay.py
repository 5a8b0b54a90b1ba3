"""``kvd replay``: what it reads, what it counts, and what it says of broken traces."""

from __future__ import annotations

import io
import itertools
import json
import lzma
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvd.cli import main
from kvd.replay.optimum import belady, next_uses
from kvd.replay.run import Setup, keys_of, replay
from kvd.replay.tiers import EqualSlots
from kvd.replay.trace import Trace, TraceError, read

Write = Callable[[Iterable[Any]], Path]


def request(*ids: int | str, at: float = 0, tokens: int | None = None, **more: Any) -> dict[str, Any]:
    """A request for these blocks, all full unless ``tokens`` says otherwise."""
    tokens = 512 * len(ids) if tokens is None else tokens
    return {"timestamp": at, "input_length": tokens, "output_length": 1, "hash_ids": list(ids), **more}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes requests, or lines as they are, and says where."""

    def write(requests: Iterable[Any]) -> Path:
        path = tmp_path / "trace.jsonl"
        lines = [one if isinstance(one, str) else json.dumps(one) for one in requests]
        path.write_text("".join(line + "\n" for line in lines))
        return path

    return write


def quiet(share: float) -> None:
    """Nobody looks."""


def traced(requests: Sequence[Sequence[int]]) -> Trace:
    """A trace of full blocks in memory."""
    trace, numbers = Trace(), {}
    for at, ids in enumerate(requests):
        above = -1
        for name in ids:
            if name not in numbers:
                numbers[name] = len(numbers)
                trace.parents.append(above)
            above = numbers[name]
            trace.blocks.append(above)
        trace.ends.append(len(trace.blocks))
        trace.times.append(float(at))
        trace.tails.append(0)
    return trace


def hits(trace: Trace, policy: str, host: int, disk: int | None = None, **more: Any) -> tuple[int, int]:
    """All hits, and those in memory."""
    done = replay(trace, keys_of(trace), Setup(policy, host, disk, **more), quiet)
    return done.hits, done.host_hits


def optimum(trace: Trace, capacity: int) -> int:
    return belady(trace, next_uses(trace), capacity, store_tails=False, progress=quiet)[0]


# ---------------------------------------------------------------- traces with known results


def test_a_loop_larger_than_the_pool_is_nothing_for_lru_and_something_for_who_learns() -> None:
    trace = traced([[number % 100] for number in range(20_000)])
    assert hits(trace, "lru", 64) == (0, 0)
    assert optimum(trace, 64) == pytest.approx(0.64 * 19_900, rel=0.02)
    assert hits(trace, "gittins", 64)[0] > 0.8 * 0.64 * 19_900


def test_a_loop_that_fits_hits_from_its_second_round_on() -> None:
    trace = traced([[number % 50] for number in range(1000)])
    assert {hits(trace, policy, 50)[0] for policy in ("lru", "gittins", "s3fifo")} == {950}


def test_a_scan_does_not_wash_away_what_is_in_use() -> None:
    scan = itertools.count(1000)
    # Ten are in use again and again, with more new ones in between than the pool has room for.
    trace = traced([[turn // 8 % 10] if turn % 8 == 0 else [next(scan)] for turn in range(16_000)])
    assert hits(trace, "lru", 40)[0] == 0
    assert hits(trace, "gittins", 40)[0] > 0.75 * 2000
    assert hits(trace, "s3fifo", 40)[0] > 0.75 * 2000


def test_a_hit_needs_all_blocks_before_it() -> None:
    # Room for two: the second request evicts the leaf of the first, and finds the root again.
    trace = traced([[1, 2], [3], [1, 2], [1, 4]])
    assert hits(trace, "lru", 2)[0] == 1 + 1


def test_a_request_longer_than_the_pool_keeps_what_fits() -> None:
    trace = traced([list(range(10))] * 3)
    for policy in ("lru", "gittins", "s3fifo"):
        assert hits(trace, policy, 4)[0] == 8
    assert hits(trace, "gittins", 1)[0] == 2


def test_what_does_not_fit_into_memory_comes_back_from_the_disks() -> None:
    trace = traced([[number % 20] for number in range(200)])
    both, host = hits(trace, "lru", 5, 20)
    assert (both, host) == (180, 0)
    assert hits(trace, "lru", 5, 10)[0] == 0
    assert hits(trace, "lru", 20, 20) == (180, 180)


def test_prefixes_longer_than_may_come_up_at_once_come_up_in_steps() -> None:
    trace = traced([[*range(40)], [*range(100, 160)], [*range(40)]])
    both, host = hits(trace, "lru", 64, 200)
    assert both == 40
    assert host < 40


def test_chunks_used_once_stay_off_the_disks_if_so_wanted() -> None:
    trace = traced([[1, 2], [1, 2], [3, 4]])
    done = replay(trace, keys_of(trace), Setup("lru", 10, 10, reused_only=True), quiet)
    assert done.spilled == 2
    assert replay(trace, keys_of(trace), Setup("lru", 10, 10), quiet).spilled == 4


PREFIXES = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=5), min_size=1, max_size=40)


@given(PREFIXES, st.integers(1, 8))
def test_nothing_beats_the_optimum_and_it_is_the_best_there_is(paths: list[list[int]], capacity: int) -> None:
    requests = [[int("1" + "".join(map(str, path[: depth + 1])), 2) for depth in range(len(path))] for path in paths]
    trace = traced(requests)
    best = optimum(trace, capacity)
    for policy in ("lru", "gittins", "s3fifo"):
        assert hits(trace, policy, capacity)[0] <= best
    assert optimum(trace, 1000) == len(trace.blocks) - trace.unique


@given(st.lists(st.integers(0, 4), min_size=1, max_size=9), st.integers(1, 3))
def test_the_optimum_of_single_blocks_is_found_by_trying_everything(blocks: list[int], capacity: int) -> None:
    def most(at: int, inside: frozenset[int]) -> int:
        if at == len(blocks):
            return 0
        block = blocks[at]
        if block in inside:
            return 1 + most(at + 1, inside)
        ways = [inside] + [inside | {block}] * (len(inside) < capacity)
        ways += [inside - {other} | {block} for other in inside]
        return max(most(at + 1, way) for way in ways)

    assert optimum(traced([[block] for block in blocks]), capacity) == most(0, frozenset())


def test_slots_are_exactly_as_many_as_said() -> None:
    slots = EqualSlots(3)
    taken = [slots.allocate(4096) for _ in range(4)]
    assert taken[3] is None
    assert len({*taken}) == 4
    slots.free(4096)
    assert (slots.free_bytes, slots.allocate(4096)) == (4096, 4096)


# ---------------------------------------------------------------- reading


def test_last_blocks_that_are_not_full_count_and_are_not_stored(write: Write) -> None:
    trace = read(str(write([request(1, 2, tokens=600), request(1, 2, tokens=600), request(1, 2)])), quiet)
    assert list(trace.tails) == [1, 1, 0]
    assert hits(trace, "lru", 10)[0] == 2
    assert hits(trace, "lru", 10, store_tails=True)[0] == 4


def test_blocks_may_have_another_size(write: Write) -> None:
    trace = read(str(write([request(1, 2, tokens=40, block_tokens=16), request("a", "b", "c", tokens=48)])), quiet)
    assert (list(trace.tails), trace.unique, trace.block_tokens) == ([0, 0], 5, 512)


@pytest.mark.parametrize("name", ["trace.jsonl.xz", "no-suffix"])
def test_xz_is_read_whatever_its_name(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / name
    path.write_bytes(lzma.compress(json.dumps(request(1, 2)).encode()))
    assert main(["replay", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["results"][0]["accesses"] == 2


def test_zstd_is_read(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    path = tmp_path / "trace.zst"
    frames = [json.dumps(request(1, 2)).encode() + b"\n", json.dumps(request(1, 2, 3)).encode() + b"\n"]
    path.write_bytes(b"".join(zstandard.compress(frame) for frame in frames))
    assert len(read(str(path), quiet).blocks) == 5
    path.write_bytes(zstandard.compress(b"x" * 100_000)[:-9] + b"not so at all")
    with pytest.raises(TraceError):
        read(str(path), quiet)


def test_without_the_library_for_zstd_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    path = tmp_path / "trace.zst"
    path.write_bytes(b"\x28\xb5\x2f\xfd and so on")
    assert main(["replay", str(path)]) == 2
    assert "kvd[compress]" in capsys.readouterr().err


GOOD = request(1, 2, 3)


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([GOOD, "{oops"], "line 2: no JSON"),
        ([GOOD, "", "[1, 2]"], "line 3: not a JSON object"),
        (["[" * 100_000], "line 1"),
        (['{"timestamp": ' + "9" * 5000 + "}"], "line 1"),
        ([GOOD, {"timestamp": 1, "hash_ids": [1]}], "line 2: input_length is missing"),
        ([GOOD, {"input_length": 1, "hash_ids": [1]}], "line 2: timestamp is missing"),
        ([GOOD, {"timestamp": 1, "input_length": 9}], "line 2: hash_ids is missing"),
        ([{**GOOD, "timestamp": float("nan")}], "line 1: timestamp is out of range"),
        ([{**GOOD, "input_length": -1}], "line 1: input_length"),
        ([{**GOOD, "block_tokens": 0}], "line 1: input_length or block_tokens"),
        ([{**GOOD, "hash_ids": [1, None]}], "line 1: 'None' among the hash_ids"),
        ([GOOD, request(7), request(1, 7)], "line 3: the ids are not chained: block 7"),
        ([request(1, 1)], "line 1: the ids are not chained: block 1"),
        ([request()], "there is no block in it"),
        ([], "there is no block in it"),
    ],
)
def test_a_broken_trace_ends_with_the_line_that_is_wrong(
    write: Write, capsys: pytest.CaptureFixture[str], lines: list[Any], says: str
) -> None:
    assert main(["replay", str(write(lines))]) == 2
    said = capsys.readouterr()
    assert says in said.err
    assert (said.out, said.err.count("\n")) == ("", 1)


@pytest.mark.parametrize("name", ["missing", "broken.xz", "plain.zst", "binary"])
def test_a_file_that_is_no_trace_is_said_to_be_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    path = tmp_path / name
    if name == "broken.xz":
        path.write_bytes(lzma.compress(json.dumps(request(*range(1000))).encode())[:-20])
    elif name == "plain.zst":
        path.write_text(json.dumps(GOOD))
    elif name == "binary":
        path.write_bytes(bytes(range(256)))
    assert main(["replay", str(path)]) == 2
    assert str(path) in capsys.readouterr().err


# ---------------------------------------------------------------- the command


@pytest.fixture
def small(write: Write) -> str:
    """40 chains of 5, asked for in turn."""
    return str(write(request(*range(10 * turn, 10 * turn + 5), at=turn) for turn in [*range(40)] * 3))


def rows(capsys: pytest.CaptureFixture[str], *flags: str) -> list[dict[str, Any]]:
    assert main(["replay", *flags, "--json"]) == 0
    said = capsys.readouterr()
    assert said.err == ""  # no bar where there is no terminal
    found: list[dict[str, Any]] = json.loads(said.out)["results"]
    return found


def test_the_result_has_the_default_first_beside_lru_and_the_optimum(
    small: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = rows(capsys, small, "--policy", "s3fifo,gittins", "--capacity-percent", "50,100")
    assert [(row["policy"], row["capacity_percent"]) for row in found] == [
        (policy, percent) for policy in ("gittins", "s3fifo", "lru", "belady") for percent in (50, 100)
    ]
    assert {(row["requests"], row["accesses"], row["unique_chunks"]) for row in found} == {(120, 600, 200)}
    assert [row["capacity_chunks"] for row in found[:2]] == [100, 200]
    assert all(0 <= row["prefix_hit_ratio"] <= 1 and row["seconds"] >= 0 for row in found)
    assert found[1]["prefix_hit_ratio"] == found[-1]["prefix_hit_ratio"] == pytest.approx(400 / 600)
    assert not any("disk_percent" in row for row in found)


def test_disks_have_rows_of_their_own(small: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = rows(capsys, small, "--capacity-percent", "10", "--disk-percent", "50,100")
    assert [row["disk_percent"] for row in found] == [50, 100] * 3
    full = found[1]
    assert (full["disk_chunks"], full["prefix_hit_ratio"]) == (200, pytest.approx(400 / 600))
    assert full["host_hit_ratio"] < full["prefix_hit_ratio"]


def test_people_get_a_table(small: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", small, "--capacity-percent", "1,100", "--disk-percent", "20"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[3].split() == ["policy", "disk", "1", "100"]
    assert [line.split()[0] for line in lines[4:]] == ["gittins", "lru", "belady"]
    assert lines[4].split()[-1] == "66.67"


def test_a_bar_is_drawn_where_there_is_a_terminal(small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    assert main(["replay", small, "--capacity-percent", "10"]) == 0
    assert "gittins at 10 %" in screen.getvalue()
    assert screen.getvalue().endswith("\r\x1b[K")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--policy", "clock"], "no policy is called 'clock'"),
        (["--capacity-percent", "0"], "--capacity-percent"),
        (["--capacity-percent", "1,x"], "--capacity-percent"),
        (["--disk-percent", "101"], "--disk-percent"),
        (["--recompute-weight", "-1"], "--recompute-weight"),
        (["--recompute-weight", "nan"], "--recompute-weight"),
    ],
)
def test_bad_flags_are_named(small: str, capsys: pytest.CaptureFixture[str], flags: list[str], says: str) -> None:
    assert main(["replay", small, *flags]) == 2
    assert says in capsys.readouterr().err
