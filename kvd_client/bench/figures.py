"""What a benchmark says: samples of a figure and of its limit, taken in turn, and their ratio."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

GIB = 1 << 30
MIB = 1 << 20


@dataclass(frozen=True)
class Figure:
    """One line of the result. ``ratio`` is figure to limit; for latencies lower is better, for bandwidths higher."""

    name: str
    unit: str
    median: float
    lowest: float
    highest: float
    limit_name: str | None = None
    limit: float | None = None
    ratio: float | None = None

    def as_json(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)


def interleave(parts: Mapping[str, Callable[[], float]], rounds: int, warmup: int) -> dict[str, list[float]]:
    """Runs the parts in turn, ``warmup`` + ``rounds`` times, and returns what the counted ones have returned.

    In turn, so that a change in the machine's speed meets the figure and its limit alike.
    """
    samples: dict[str, list[float]] = {name: [] for name in parts}
    for number in range(warmup + rounds):
        for name, part in parts.items():
            sample = part()
            if number >= warmup:
                samples[name].append(sample)
    return samples


def figure(name: str, unit: str, samples: Mapping[str, list[float]], limit_name: str | None = None) -> Figure:
    """The figure ``name`` of ``samples``, set beside the limit ``limit_name`` of the same samples."""
    own = samples[name]
    return beside(single(name, unit, own), limit_name, samples[limit_name] if limit_name is not None else ())


def single(name: str, unit: str, samples: Sequence[float]) -> Figure:
    """The figure of ``samples`` alone."""
    return Figure(name, unit, statistics.median(samples), min(samples), max(samples))


def beside(one: Figure, limit_name: str | None, limit_samples: Sequence[float]) -> Figure:
    """``one`` with a limit of other samples."""
    if limit_name is None:
        return one
    limit = statistics.median(limit_samples)
    return Figure(one.name, one.unit, one.median, one.lowest, one.highest, limit_name, limit, one.median / limit)


def percentile(samples: Sequence[float], percent: float) -> float:
    """The smallest sample that at least ``percent`` of them do not exceed. ValueError for no samples."""
    if not samples:
        raise ValueError("no samples")
    ordered = sorted(samples)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def timed(work: Callable[[], None]) -> float:
    """Seconds that ``work`` takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def table(figures: Sequence[Figure], *, markdown: bool = False) -> str:
    """For people."""
    rows = [("figure", "median", "lowest .. highest", "unit", "limit", "of", "ratio")]
    for one in figures:
        limit = ("", "", "") if one.limit is None else (_number(one.limit), one.limit_name or "", f"{one.ratio:.2f}")
        spread = f"{_number(one.lowest)} .. {_number(one.highest)}"
        rows.append((one.name, _number(one.median), spread, one.unit, *limit))
    return grid(rows, markdown=markdown)


def grid(rows: Sequence[Sequence[str]], *, markdown: bool = False) -> str:
    """Rows, the first of them a heading, in columns: plain, or as a table of Markdown."""
    if markdown:
        lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
        return "\n".join(f"| {' | '.join(row)} |" for row in lines)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def size_name(size_bytes: int) -> str:
    """``2MiB``."""
    for shift, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size_bytes >= 1 << shift and size_bytes % (1 << shift) == 0:
            return f"{size_bytes >> shift}{unit}"
    return f"{size_bytes}B"


def _number(value: float) -> str:
    return f"{value:.3f}" if 0 < abs(value) < 1 else f"{value:.2f}"
