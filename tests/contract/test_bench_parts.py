"""The other parts of ``kvd bench`` in small: they measure what they say, against the limit that they name."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from kvd_client.bench import copying, lookups
from kvd_client.bench.figures import Figure, beside, grid, percentile, single, table
from kvd_client.bench.limits import BareSockets, Memcpy, together
from kvd_client.bench.lookups import bench_held, bench_lookup
from kvd_client.bench.parts import THREADS, Size, bench_local, bench_tcp
from kvd_client.bench.plot import plot
from tests.daemon import run_kvd

KIB = 1 << 10
SMALL = Size(64 * KIB, 8, 1)


def by_name(figures: list[Figure]) -> dict[str, Figure]:
    found = {figure.name: figure for figure in figures}
    assert len(found) == len(figures), "two figures of one name"
    assert all(figure.median >= 0 for figure in figures)
    return found


def test_the_same_node_is_measured_against_memcpy_with_as_many_threads() -> None:
    found = by_name(bench_local(SMALL))
    for threads in {1, THREADS}:
        assert found[f"local 64KiB path write x{threads}"].limit_name == f"memcpy in x{threads}"
        assert found[f"local 64KiB path read x{threads}"].limit_name == f"memcpy out x{threads}"
    assert found["local 64KiB store"].limit_name == "memcpy in x1"
    assert found["local 64KiB load"].limit_name == "memcpy out x1"
    assert {f"local 64KiB {op}: CPU of the {who}" for op in ("store", "load") for who in ("client", "daemon")} <= set(
        found
    )


def test_tcp_is_measured_against_bare_sockets_both_ways() -> None:
    found = by_name(bench_tcp(SMALL, 2))
    assert found["tcp x2 store"].limit_name == found["tcp x2 path write"].limit_name == "bare send x2"
    assert found["tcp x2 load"].limit_name == found["tcp x2 path read"].limit_name == "bare receive x2"
    for name in ("tcp x2 path write", "tcp x2 path read"):
        assert found[f"{name}, unchecked"].limit_name == found[name].limit_name
    assert "bare send x2: CPU of the other end" in found


@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_lookups_are_measured_against_empty_calls(monkeypatch: pytest.MonkeyPatch, transport: str) -> None:
    monkeypatch.setattr(lookups, "CALLS", 3)
    found = by_name(bench_lookup(transport, 1))  # type: ignore[arg-type]
    ways = [transport] if transport == "unix" else [transport, "gRPC over tcp"]
    wanted = [f"lookup of {count}, {way}" for count in (1, 128, 2000) for way in ways]
    wanted.append(f"lookup of 128, none found, {transport}")
    assert set(found) == {f"{name}, {which}" for name in wanted for which in ("p50", "p99")}
    assert {figure.limit_name for name, figure in found.items() if name.endswith("p99")} == {
        f"empty gRPC call, {transport}, p99"
    }


def test_lookups_are_measured_while_the_daemon_fills_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookups, "CALLS", 2)
    monkeypatch.setattr(lookups, "HELD", (100, 1500, 10**9))
    found = by_name(bench_held(2000, 1))
    assert [name for name in found if name.startswith("memory")] == [
        "memory per chunk, 100 held",
        "memory per chunk, 1500 held",
    ]
    assert found["lookup of 128, 1500 held, p50"].median > 0


def test_the_copier_is_measured_and_what_cannot_be_is_said() -> None:
    if why := copying.missing():
        pytest.skip(why)
    figures, notes = copying.bench_copier(1, 2)
    found = by_name(figures)
    assert found["copier store, cpu"].limit_name == "memcpy in"
    assert found["copier load, cpu"].limit_name == "memcpy out"
    assert ("copier store, gpu" in found) != any("on a GPU" in note for note in notes)


@pytest.mark.engine
@pytest.mark.timeout(600)
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_an_engine_is_measured() -> None:
    from kvd_client.bench.engine import bench_engine
    from kvd_client.bench.engine_process import Size as EngineSize

    size = EngineSize(layers=2, hidden=128, heads=4, kv_heads=2, intermediate=256, prefix_tokens=512, stream_tokens=12)
    found = by_name(bench_engine(1, size))
    assert found["time to first token, from kvd"].limit_name == "own hit + bare copy"
    for what in ("prefixes are loaded", "prefixes are own hits"):
        assert found[f"time between tokens while {what}, p50"].limit_name == "no load, p50"


# ---------------------------------------------------------------- limits


def test_bare_sockets_move_whole_regions_both_ways() -> None:
    bare = BareSockets(1 << 20, 2)
    try:
        assert bare.send() > 0 and bare.receive() > 0 and bare.send() > 0
    finally:
        bare.close()


def test_memcpy_copies_every_chunk_whatever_the_threads() -> None:
    copy = Memcpy(4096, 5, threads=3)
    copy._private.write(bytes(range(256)) * 80)
    assert copy.into() > 0
    assert copy._shared[:] == bytes(range(256)) * 80
    copy._private.seek(0)
    copy._private.write(bytes(5 * 4096))
    assert copy.out() > 0
    assert copy._private[:] == bytes(range(256)) * 80


def test_a_failing_thread_fails_the_measurement() -> None:
    def work(number: int) -> None:
        if number == 1:
            raise ConnectionError("gone")

    with pytest.raises(ConnectionError):
        together(work, 2)


# ---------------------------------------------------------------- what is said


def test_percentiles_are_samples() -> None:
    samples = [float(i) for i in range(100, 0, -1)]
    assert [percentile(samples, p) for p in (50, 99, 100)] == [50, 99, 100]
    assert percentile([7.0], 99.9) == 7
    with pytest.raises(ValueError):
        percentile([], 50)


def test_tables_are_markdown_when_asked() -> None:
    one = beside(single("load", "GiB/s", [1.0, 3.0, 2.0]), "memcpy", [4.0])
    head, rule, row = table([one], markdown=True).splitlines()
    assert head.count("|") == rule.count("|") == row.count("|")
    assert row == "| load | 2.00 | 1.00 .. 3.00 | GiB/s | 4.00 | memcpy | 0.50 |"
    assert grid([("a", "bb"), ("ccc", "d")]) == "a    bb\nccc  d"


def test_the_picture_has_a_bar_for_each_ratio_and_the_line_of_the_limit() -> None:
    figures = [
        beside(single("half <of it>", "GiB/s", [1.0]), "memcpy", [2.0]),
        beside(single("far more", "us", [9.0]), "an empty call", [1.0]),
        single("no limit", "MiB", [1.0]),
    ]
    picture = ElementTree.fromstring(plot(figures))
    shape = "{http://www.w3.org/2000/svg}"
    bars = [float(bar.attrib["width"]) for bar in picture.findall(f"{shape}rect")[1:]]
    (line,) = picture.findall(f"{shape}line")
    origin = float(picture.findall(f"{shape}rect")[1].attrib["x"])
    at_limit = float(line.attrib["x1"]) - origin
    assert bars == [at_limit / 2, at_limit * 2]  # what is beyond twice the limit is cut
    texts = [text.text for text in picture.findall(f"{shape}text")]
    assert "half <of it>" in texts and "9.00" in texts and "no limit" not in texts


def test_the_command_writes_json_and_a_picture(tmp_path: Path) -> None:
    picture = tmp_path / "ratios.svg"
    result = run_kvd("bench", "copier", "--rounds", "1", "--json", "--plot", str(picture))
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer["machine"] and (answer["figures"] or answer["notes"])
    ElementTree.parse(picture)
