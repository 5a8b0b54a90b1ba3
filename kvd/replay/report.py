"""What a replay shows: a bar while it runs, a table or JSON at the end."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

_BAR_WIDTH = 30
_REDRAW_S = 0.1


@dataclass(frozen=True, slots=True)
class Row:
    """One policy at one size. Capacities in percent of the trace's unique blocks, and in chunks; ratios of all blocks
    that requests asked for, 0 to 1. Without disks the three fields about them are None."""

    policy: str
    capacity_percent: float
    prefix_hit_ratio: float
    saved_work_ratio: float
    capacity_chunks: int
    requests: int
    accesses: int
    unique_chunks: int
    seconds: float
    disk_percent: float | None = None
    disk_chunks: int | None = None
    host_hit_ratio: float | None = None
    spilled_chunks: int | None = None


def as_json(rows: Sequence[Row]) -> str:
    """``{"results": [...]}``, the rows in their order; what a row has nothing to say about is left out."""
    results = [{key: value for key, value in asdict(row).items() if value is not None} for row in rows]
    return json.dumps({"results": results}, indent=2)


def as_text(rows: Sequence[Row]) -> str:
    """A line per policy and size of the disks, a column per size of the pool: prefix hit ratios in percent."""
    sizes = list(dict.fromkeys(row.capacity_percent for row in rows))
    first = rows[0]
    lines = [
        f"{first.requests} requests, {first.accesses} blocks asked for, {first.unique_chunks} different ones",
        "prefix hit ratio in percent; capacity in percent of the different blocks",
        "",
    ]
    with_disks = any(row.disk_percent is not None for row in rows)
    lines.append(f"{'policy':<10}{'disk':>8}" * with_disks + f"{'policy':<10}" * (not with_disks))
    lines[-1] += "".join(f"{size:>9g}" for size in sizes)
    found = {(row.policy, row.disk_percent, row.capacity_percent): row for row in rows}
    for policy, disk in dict.fromkeys((row.policy, row.disk_percent) for row in rows):
        line = f"{policy:<10}" + (f"{disk:>8g}" if disk is not None else "")
        for size in sizes:
            line += f"{100 * found[policy, disk, size].prefix_hit_ratio:>9.2f}"
        lines.append(line)
    return "\n".join(lines)


class Progress:
    """A bar on stderr, if that is a terminal."""

    def __init__(self) -> None:
        self._shown = sys.stderr.isatty()
        self._next = 0.0
        self._text = ""

    def begin(self, text: str) -> None:
        """What runs now."""
        self._text = text
        self._next = 0.0
        self(0.0)

    def __call__(self, share: float) -> None:
        """How much of it is done, 0 to 1."""
        now = time.monotonic()
        if self._shown and now >= self._next:
            self._next = now + _REDRAW_S
            done = int(share * _BAR_WIDTH)
            bar = "#" * done + "." * (_BAR_WIDTH - done)
            print(f"\r\x1b[K[{bar}] {share:4.0%}  {self._text}", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        """Take the bar away."""
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
