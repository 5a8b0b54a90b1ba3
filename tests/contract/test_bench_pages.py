"""``kvd bench pages`` in small: what it calls huge pages are such, and what was not given is left out and said."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from xml.etree import ElementTree

import pytest

from kvd.cli import main
from kvd.memory import segment
from kvd.memory.backing import Backing, anonymous_backing
from kvd.memory.generations import GenerationTable
from kvd.memory.segment import Segment
from kvd_client.bench import pages
from kvd_client.bench.daemon import BenchDaemon
from kvd_client.bench.figures import Figure, single
from kvd_client.bench.pages import HUGETLB, ORDINARY, TRANSPARENT, Kind, bench_pages, kind_of
from kvd_client.bench.run import PARTS

MIB = 1 << 20


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "POOL_BYTES", 64 * MIB)
    monkeypatch.setattr(pages, "CHUNKS", 3)
    monkeypatch.setattr(pages, "WARMUP", 0)


@pytest.fixture
def generous(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that gives every kind of page to whoever asks for it, and transparent ones to whoever may have them."""
    monkeypatch.setattr(pages, "backing_of", _as_asked)


def _as_asked(daemon: BenchDaemon) -> str:
    if "--huge-pages" in daemon.settings:
        return "hugetlb memfd, 2 MiB pages, locked"
    status = Path(f"/proc/{daemon.pid}/status").read_text()
    return f"memfd, {100 if _field(status, 'THP_enabled') == '1' else 0} % on huge pages, locked"


def _field(status: str, name: str) -> str:
    return next(line.split()[1] for line in status.splitlines() if line.startswith(f"{name}:"))


# ---------------------------------------------------------------- what counts


def described(backing: Backing) -> str:
    made = Segment(backing, GenerationTable.anonymous(backing.size, 1))
    try:
        made.populate()
        return made.describe()
    finally:
        made.close()


@pytest.mark.parametrize(
    ("huge_bytes", "kind"),
    [(200 * MIB, TRANSPARENT), (198 * MIB, TRANSPARENT), (196 * MIB, None), (2 * MIB, None), (0, ORDINARY)],
)
def test_a_pool_counts_for_transparent_pages_when_nearly_all_of_it_lies_on_them(
    monkeypatch: pytest.MonkeyPatch, huge_bytes: int, kind: str | None
) -> None:
    monkeypatch.setattr(segment.syscalls, "madvise", lambda *_: None)
    monkeypatch.setattr(segment, "_huge_bytes_mapped", lambda address, size: huge_bytes)
    assert kind_of(described(dataclasses.replace(anonymous_backing(200 * MIB), advise_huge=True))) == kind


@pytest.mark.parametrize(
    ("page_bytes", "origin", "kind"),
    [
        (4096, "memfd", ORDINARY),
        (64 << 10, "memfd", ORDINARY),
        (2 * MIB, "hugetlb memfd", HUGETLB),
        (1 << 30, "hugetlbfs file in /mnt", HUGETLB),
    ],
)
def test_other_pools_count_for_the_size_of_their_pages(page_bytes: int, origin: str, kind: str) -> None:
    plain = dataclasses.replace(anonymous_backing(2 * MIB), advise_huge=False)
    assert kind_of(described(dataclasses.replace(plain, page_bytes=page_bytes, kind=origin))) == kind


def test_a_pool_that_was_not_looked_at_counts_for_nothing() -> None:
    made = Segment(
        dataclasses.replace(anonymous_backing(2 * MIB), advise_huge=True), GenerationTable.anonymous(2 * MIB, 1)
    )
    assert kind_of(made.describe()) is None
    made.close()


# ---------------------------------------------------------------- what is measured


@pytest.mark.slow
def test_every_kind_is_measured_against_ordinary_pages(generous: None, tmp_path: Path) -> None:
    figures, notes = bench_pages(1, str(tmp_path))
    assert names(figures) == [f"{what}, {kind}" for what in pages.UNITS for kind in (TRANSPARENT, HUGETLB)]
    assert notes == []
    assert {figure.limit_name for figure in figures} == {ORDINARY}
    assert all(figure.median > 0 and figure.limit and figure.ratio for figure in figures)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_disk_that_is_only_reached_through_the_page_cache_is_left_out(
    generous: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(pages, "takes_direct", lambda path: False)
    monkeypatch.setattr(pages, "_starts", lambda kinds, rounds: {})
    figures, (note,) = bench_pages(1, str(tmp_path))
    assert {name.split(",")[0] for name in names(figures)} == {
        "map",
        "first write",
        "path write",
        "path read",
    }
    assert "page cache" in note and str(tmp_path) in note


def test_ordinary_pages_are_ordinary_whatever_the_machine_gives(small: None) -> None:
    before = _field(Path("/proc/self/status").read_text(), "THP_enabled")
    with Kind(ORDINARY).serve() as daemon:  # serve believes only what the daemon says
        assert _field(Path(f"/proc/{daemon.pid}/status").read_text(), "THP_enabled") == "0"
    assert _field(Path("/proc/self/status").read_text(), "THP_enabled") == before


@pytest.mark.parametrize("given", ["memfd, 4 KiB pages, locked", "memfd, 98 % on huge pages, locked"])
def test_what_a_machine_does_not_give_is_left_out_and_said(
    small: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, given: str
) -> None:
    monkeypatch.setattr(pages, "backing_of", lambda daemon: given)
    figures, notes = bench_pages(1, str(tmp_path))
    assert figures == []
    assert [note.split(":")[0] for note in notes] == [TRANSPARENT, HUGETLB]
    assert notes[0].count(given) == 2 and "anonymous" in notes[0] and "/dev/shm" in notes[0]
    assert given in notes[1]


def test_transparent_pages_in_the_place_of_hugetlb_ones_are_not_called_so(
    small: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(pages, "backing_of", lambda daemon: "memfd, 100 % on huge pages, locked")
    monkeypatch.setattr(pages, "_measured", _only_asked)
    figures, notes = bench_pages(1, str(tmp_path))
    assert names(figures) == [f"{ORDINARY} in an anonymous pool", f"{TRANSPARENT} in an anonymous pool"]
    assert notes == [f"{HUGETLB}: an anonymous pool got: memfd, 100 % on huge pages, locked"]


def test_the_reference_lies_where_transparent_pages_were_given(
    small: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(pages, "backing_of", _only_in_shared_memory)
    monkeypatch.setattr(pages, "_measured", _only_asked)
    figures, notes = bench_pages(1, str(tmp_path))
    assert names(figures) == [f"{ORDINARY} in a pool in /dev/shm", f"{TRANSPARENT} in a pool in /dev/shm"]
    assert [note.split(":")[0] for note in notes] == [HUGETLB]


def test_shared_memory_without_room_keeps_nobody_from_the_other_pages(
    generous: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def serve(kind: Kind) -> BenchDaemon:
        if kind.named:
            raise RuntimeError("the daemon did not start")
        if kind.name == TRANSPARENT:
            raise pages.NotGiven(kind, "memfd, 4 KiB pages, locked")
        return really(kind)

    really = Kind.serve
    monkeypatch.setattr(Kind, "serve", serve)
    monkeypatch.setattr(pages, "_measured", _only_asked)
    figures, notes = bench_pages(1, str(tmp_path))
    assert names(figures) == [f"{ORDINARY} in an anonymous pool", f"{HUGETLB} in an anonymous pool"]
    assert notes == [
        f"{TRANSPARENT}: an anonymous pool got: memfd, 4 KiB pages, locked; "
        "a pool in /dev/shm: the daemon did not start"
    ]


def test_a_daemon_that_does_not_start_at_all_is_no_lack_of_pages(
    small: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def serve(kind: Kind) -> BenchDaemon:
        raise RuntimeError("the daemon did not start")

    monkeypatch.setattr(Kind, "serve", serve)
    with pytest.raises(RuntimeError, match="did not start"):
        bench_pages(1, str(tmp_path))


def test_pages_that_are_lost_on_the_way_are_left_out_and_the_others_are_measured(
    generous: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def lost(kinds: list[Kind], *rest: object) -> tuple[list[Figure], list[str]]:
        if Kind(HUGETLB) in kinds:
            raise pages.NotGiven(Kind(HUGETLB), "memfd, 4 KiB pages, locked")
        return _only_asked(kinds, *rest)

    monkeypatch.setattr(pages, "_measured", lost)
    figures, notes = bench_pages(1, str(tmp_path))
    assert names(figures) == [f"{ORDINARY} in an anonymous pool", f"{TRANSPARENT} in an anonymous pool"]
    assert notes == [f"{HUGETLB}: an anonymous pool got: memfd, 4 KiB pages, locked"]


def test_nothing_is_measured_against_a_reference_that_is_none(
    generous: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(pages, "kind_of", lambda backing: TRANSPARENT)
    with pytest.raises(pages.NotGiven, match=ORDINARY):
        bench_pages(1, str(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["_first_write", "_disk_read"])
def test_bytes_that_do_not_arrive_are_noticed(
    generous: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, broken: str
) -> None:
    monkeypatch.setattr(pages.Pool, broken, lambda self: 1.0)
    wrong = pytest.raises(RuntimeError, match="not what it should be")
    with closing(pages.Pool(Kind(ORDINARY), str(tmp_path))) as pool, wrong:
        pool.check(disk=True)


def _only_asked(kinds: list[Kind], *_: object) -> tuple[list[Figure], list[str]]:
    """In the place of a measurement: what it was asked for."""
    return [single(f"{kind.name} in {kind.place}", "s", [1.0]) for kind in kinds], []


def names(figures: list[Figure]) -> list[str]:
    return [figure.name for figure in figures]


def _only_in_shared_memory(daemon: BenchDaemon) -> str:
    return "memfd, 4 KiB pages, locked" if "--pool-dir none" in daemon.settings else "file, 100 % on huge pages, locked"


# ---------------------------------------------------------------- the command


def test_the_command_says_what_was_left_out(
    small: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pages, "backing_of", lambda daemon: "memfd, 4 KiB pages, locked")
    picture = tmp_path / "ratios.svg"
    assert main(["bench", "pages", "--rounds", "1", "--json", "--plot", str(picture), "--dir", str(tmp_path)]) == 0
    said = capsys.readouterr()
    answer = json.loads(said.out)
    assert answer["figures"] == [] and len(answer["notes"]) == 2
    assert said.err.count("left out") == 2
    ElementTree.parse(picture)


def test_every_part_can_be_asked_for(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    measured: list[str] = []
    for name in PARTS:
        monkeypatch.setitem(PARTS, name, _noting(name, measured))
        assert main(["bench", name]) == 0
    assert main(["bench", "all"]) == 0
    assert measured == [*PARTS, *PARTS] and "pages" in PARTS
    capsys.readouterr()


def _noting(name: str, measured: list[str]) -> Callable[[object, object], None]:
    return lambda arguments, result: measured.append(name)
