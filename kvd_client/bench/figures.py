"""What a benchmark says: samples of a figure and of its limit, taken in turn, and their ratio."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

GIB = 1 << 30


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
    median = statistics.median(own)
    if limit_name is None:
        return Figure(name, unit, median, min(own), max(own))
    limit = statistics.median(samples[limit_name])
    return Figure(name, unit, median, min(own), max(own), limit_name, limit, median / limit)


def timed(work: Callable[[], None]) -> float:
    """Seconds that ``work`` takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def table(figures: list[Figure]) -> str:
    """For people."""
    rows = [("figure", "median", "lowest .. highest", "unit", "limit", "", "ratio")]
    for one in figures:
        limit = ("", "", "") if one.limit is None else (f"{one.limit:.2f}", one.limit_name or "", f"{one.ratio:.2f}")
        rows.append((one.name, f"{one.median:.2f}", f"{one.lowest:.2f} .. {one.highest:.2f}", one.unit, *limit))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)
