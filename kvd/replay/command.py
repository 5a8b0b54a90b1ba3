"""The command: which replays are made of a trace, and in which order they are reported."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator

from kvd.ledger import policies
from kvd.replay.optimum import belady, next_uses
from kvd.replay.report import Progress, Row, as_json, as_text
from kvd.replay.run import Setup, keys_of, replay, work_of
from kvd.replay.trace import Trace, TraceError, read

OPTIMUM = "belady"
_USAGE = 2


def run(arguments: argparse.Namespace) -> int:
    """Replay the trace and print what came of it; the exit code."""
    progress = Progress()
    try:
        names = _names(arguments.policy)
        percents = _percents(arguments.capacity_percent, "--capacity-percent")
        disks: list[float | None] = [None]
        if arguments.disk_percent is not None:
            disks = [*_percents(arguments.disk_percent, "--disk-percent")]
        if not math.isfinite(arguments.recompute_weight) or arguments.recompute_weight < 0:
            raise ValueError("--recompute-weight is not 0 or more")
        progress.begin(f"reading {arguments.trace}")
        trace = read(arguments.trace, progress)
        rows = list(_rows(trace, names, percents, disks, arguments, progress))
    except (TraceError, ValueError) as error:
        progress.end()
        print(f"kvd: {error}", file=sys.stderr)
        return _USAGE
    progress.end()
    print(as_json(rows) if arguments.json else as_text(rows))
    return 0


def _rows(
    trace: Trace,
    names: list[str],
    percents: list[float],
    disks: list[float | None],
    arguments: argparse.Namespace,
    progress: Progress,
) -> Iterator[Row]:
    keys = keys_of(trace)
    following = next_uses(trace)
    work = work_of(trace)
    tails = arguments.partial_tails
    for name in names:
        for disk in disks:
            disk_chunks = None if disk is None else _chunks(trace, disk)
            for percent in percents:
                chunks = _chunks(trace, percent)
                progress.begin(f"{name} at {percent:g} %" + (f", disk {disk:g} %" if disk is not None else ""))
                began = time.monotonic()
                host_hits = spilled = None
                if name == OPTIMUM:
                    total = chunks + (disk_chunks or 0)
                    hits, saved = belady(trace, following, total, store_tails=tails, progress=progress)
                else:
                    setup = Setup(
                        name,
                        chunks,
                        disk_chunks,
                        recompute_weight=arguments.recompute_weight,
                        reused_only=arguments.spill_admit == "reused",
                        store_tails=tails,
                    )
                    hits, saved, host_hits, spilled = replay(trace, keys, setup, progress)
                yield Row(
                    policy=name,
                    capacity_percent=percent,
                    prefix_hit_ratio=hits / len(trace.blocks),
                    saved_work_ratio=saved / work,
                    capacity_chunks=chunks,
                    requests=len(trace),
                    accesses=len(trace.blocks),
                    unique_chunks=trace.unique,
                    seconds=round(time.monotonic() - began, 3),
                    disk_percent=disk,
                    disk_chunks=disk_chunks,
                    host_hit_ratio=None if disk is None or host_hits is None else host_hits / len(trace.blocks),
                    spilled_chunks=None if disk is None else spilled,
                )


def _names(text: str) -> list[str]:
    """Policies in the order of the report: the default first, then the others asked for, LRU and the optimum."""
    asked = [name.strip() for name in text.split(",")]
    for name in asked:
        if name not in (*policies.NAMES, OPTIMUM):
            raise ValueError(f"no policy is called {name!r}: there are {', '.join(policies.NAMES)}")
    rest = [name for name in asked if name not in (policies.DEFAULT, policies.LRU, OPTIMUM)]
    default = [policies.DEFAULT] if policies.DEFAULT in asked else []
    return list(dict.fromkeys([*default, *rest, policies.LRU, OPTIMUM]))


def _percents(text: str, flag: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < percent <= 100 for percent in found):
        raise ValueError(f"{flag}: {text!r} is no list of percentages above 0, up to 100")
    return list(dict.fromkeys(found))


def _chunks(trace: Trace, percent: float) -> int:
    """This share of the trace's unique blocks, at least one."""
    return max(1, round(trace.unique * percent / 100))
