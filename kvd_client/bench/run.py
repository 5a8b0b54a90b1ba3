"""Runs the parts of ``kvd bench`` that were asked for, and prints what they say."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

from kvd.wire.version import VERSION
from kvd_client.bench import copying, engine
from kvd_client.bench.engine_process import Size as EngineSize
from kvd_client.bench.figures import MIB, Figure, grid, table
from kvd_client.bench.load import Load, Plan, Row, headed
from kvd_client.bench.lookups import bench_held, bench_lookup
from kvd_client.bench.machine import machine
from kvd_client.bench.pages import bench_pages
from kvd_client.bench.parts import Size, bench_local, bench_tcp
from kvd_client.bench.plot import plot
from kvd_client.bench.starting import bench_start
from kvd_client.bench.tiers import bench_restart, bench_spill

#: 64 chunks of 2 MiB are moved in one round, and as many bytes in smaller chunks.
ROUND_BYTES = 128 * MIB
CHUNKS = (2 * MIB, 256 << 10)
#: Chunks of 4 MiB that are gathered and scattered in one round.
COPIER_CHUNKS = 32
#: Clients that look up at once.
CROWD = 8


@dataclass
class Result:
    """What all parts have said. ``about``: what was run beside kvd; ``notes``: what was left out, and why."""

    figures: list[Figure] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    about: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


Part = Callable[[argparse.Namespace, Result], None]


def run(arguments: argparse.Namespace) -> int:
    """Measures what ``arguments`` (see ``kvd bench --help``) ask for and prints figure, limit and ratio; 1 when a part
    could not be measured. Nothing is left in their ``dir``."""
    result = Result()
    failed = False
    for name in PARTS if arguments.part == "all" else [arguments.part]:
        print(f"measuring: {name}", file=sys.stderr)
        try:
            PARTS[name](arguments, result)
        except (OSError, RuntimeError) as error:
            print(f"kvd bench: {name}: {error}", file=sys.stderr)
            failed = True
    print(_said(result, arguments))
    for note in result.notes:
        print(f"kvd bench: left out: {note}", file=sys.stderr)
    if arguments.plot:
        with open(arguments.plot, "w") as file:
            file.write(plot(result.figures))
    return 1 if failed else 0


def _said(result: Result, arguments: argparse.Namespace) -> str:
    if arguments.json:
        figures, rows = [one.as_json() for one in result.figures], [row.as_json() for row in result.rows]
        facts = {"version": VERSION, "machine": machine(), "about": result.about, "notes": result.notes}
        return json.dumps({**facts, "figures": figures, "load": rows}, indent=2)
    parts = []
    if arguments.markdown:
        parts.append("\n".join(f"- {fact}" for fact in [f"kvd {VERSION}", *machine(), *result.about]))
    if result.figures:
        parts.append(table(result.figures, markdown=arguments.markdown))
    if result.rows:
        parts.append(grid(headed(result.rows), markdown=arguments.markdown))
    if arguments.markdown and result.notes:
        parts.append("Left out:\n\n" + "\n".join(f"- {note}" for note in result.notes))
    return "\n\n".join(parts)


# ---------------------------------------------------------------- the parts


def _local(arguments: argparse.Namespace, result: Result) -> None:
    for chunk_bytes in CHUNKS:
        result.figures += bench_local(Size(chunk_bytes, ROUND_BYTES // chunk_bytes, arguments.rounds))


def _tcp(arguments: argparse.Namespace, result: Result) -> None:
    for connections in (1, 4):
        result.figures += bench_tcp(Size(CHUNKS[0], ROUND_BYTES // CHUNKS[0], arguments.rounds), connections)


def _lookup(arguments: argparse.Namespace, result: Result) -> None:
    result.figures += bench_lookup("unix", arguments.rounds) + bench_lookup("tcp", arguments.rounds)
    result.figures += bench_held(arguments.held, min(arguments.rounds, 3))
    crowd = Load(
        Plan((CROWD,), (4096,), batch=128, pool_bytes=64 * MIB, seconds=arguments.seconds, phases=("lookup",)), []
    )
    _loaded(crowd, result)


def _start(arguments: argparse.Namespace, result: Result) -> None:
    result.figures += bench_start(arguments.rounds)


def _spill(arguments: argparse.Namespace, result: Result) -> None:
    result.figures += bench_spill(arguments.rounds, arguments.dir)


def _restart(arguments: argparse.Namespace, result: Result) -> None:
    result.figures += bench_restart(arguments.rounds)


def _pages(arguments: argparse.Namespace, result: Result) -> None:
    figures, notes = bench_pages(arguments.rounds, arguments.dir)
    result.figures += figures
    result.notes += notes


def _copier(arguments: argparse.Namespace, result: Result) -> None:
    if why := copying.missing():
        result.notes.append(why)
        return
    figures, notes = copying.bench_copier(arguments.rounds, COPIER_CHUNKS)
    result.figures += figures
    result.notes += notes


def _engine(arguments: argparse.Namespace, result: Result) -> None:
    if why := engine.missing():
        result.notes.append(why)
        return
    result.figures += engine.bench_engine(min(arguments.rounds, 3), EngineSize())


def _load(arguments: argparse.Namespace, result: Result) -> None:
    plan = Plan(
        arguments.clients,
        arguments.chunks,
        arguments.batch,
        arguments.writes,
        arguments.hits,
        arguments.seconds,
        min(arguments.rounds, 3),
        arguments.pool,
        arguments.dir,
    )
    _loaded(Load(plan, arguments.peer), result)


def _loaded(load: Load, result: Result) -> None:
    load.run()
    result.figures += load.figures
    result.rows += load.rows
    result.about += load.about
    result.notes += load.notes


PARTS: dict[str, Part] = {
    "local": _local,
    "tcp": _tcp,
    "spill": _spill,
    "lookup": _lookup,
    "start": _start,
    "restart": _restart,
    "pages": _pages,
    "copier": _copier,
    "engine": _engine,
    "load": _load,
}
