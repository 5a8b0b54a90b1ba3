"""Runs the parts of ``kvd bench`` that were asked for, and prints what they say."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

from kvd.wire.version import VERSION
from kvd_client.bench.figures import Figure, table
from kvd_client.bench.parts import Size, bench_local, bench_lookup, bench_start, bench_tcp
from kvd_client.bench.tiers import bench_restart, bench_spill

MIB = 1 << 20


def _local(rounds: int) -> list[Figure]:
    return bench_local(Size(2 * MIB, 64, rounds))


def _tcp(rounds: int) -> list[Figure]:
    return [one for connections in (1, 4) for one in bench_tcp(Size(2 * MIB, 64, rounds), connections)]


def _lookup(rounds: int) -> list[Figure]:
    return bench_lookup("unix", rounds) + bench_lookup("tcp", rounds)


_PARTS: dict[str, Callable[[int], list[Figure]]] = {
    "local": _local,
    "tcp": _tcp,
    "lookup": _lookup,
    "start": bench_start,
}


def run(part: str, rounds: int, *, directory: str, as_json: bool) -> int:
    """Measures ``part`` ("all": every one) and prints figure, limit and ratio; 1 when a part could not be measured.

    ``directory``: on the disk that is measured; nothing is left there.
    """
    parts = {**_PARTS, "spill": lambda rounds: bench_spill(rounds, directory), "restart": bench_restart}
    figures: list[Figure] = []
    failed = False
    for name in parts if part == "all" else [part]:
        print(f"measuring: {name}", file=sys.stderr)
        try:
            figures += parts[name](rounds)
        except (OSError, RuntimeError) as error:
            print(f"kvd bench: {name}: {error}", file=sys.stderr)
            failed = True
    if as_json:
        print(json.dumps({"version": VERSION, "figures": [one.as_json() for one in figures]}, indent=2))
    else:
        print(table(figures))
    return 1 if failed else 0
