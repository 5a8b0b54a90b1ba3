"""The load generator: clients, each a process, that store, load and look up at the same time.

Every store gets the same requests: the same chunks, so many to a request, from as many clients, in turn within one run.
A store holds ``pool_bytes`` and runs full: what is stored pushes out what was stored long ago. What is read again is a
quarter of that at most, so that a store which keeps what was used last has it.
"""

from __future__ import annotations

import json
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Self

from kvd_client.bench.figures import GIB, MIB, Figure, percentile, single, size_name
from kvd_client.bench.stores import Server, start
from kvd_client.bench.usage import cpu_s

#: Nothing that a client does takes so long, seconds.
PATIENCE_S = 120.0
END_S = 30.0
#: After a store was filled: some make room in the background, and not at once, seconds.
SETTLE_S = 2.0
#: Percentiles that are said; one needs so many samples that its last one does not decide it alone.
PERCENTS = (50.0, 99.0, 99.9)
PHASES = ("store", "load", "lookup", "mixed")
WORKER = str(Path(__file__).with_name("worker.py"))


@dataclass(frozen=True)
class Plan:
    """What is asked. Sizes in bytes. ``batch``: chunks of a request, 0 for as many as make ``request_bytes``.
    ``writes``, ``hits``: shares of the mixed phase. ``seconds``: of each phase."""

    clients: Sequence[int] = (1, 4, 16)
    chunks: Sequence[int] = (256 << 10, 2 * MIB, 40 * MIB)
    batch: int = 0
    writes: float = 0.25
    hits: float = 0.8
    seconds: float = 1.0
    rounds: int = 3
    pool_bytes: int = 1 << 30
    directory: str = "."
    request_bytes: int = 8 * MIB
    phases: Sequence[str] = PHASES

    def request(self, chunk_bytes: int) -> int:
        """Chunks of a request."""
        return self.batch or max(1, self.request_bytes // chunk_bytes)

    def recent(self, chunk_bytes: int, clients: int) -> int:
        """Requests that each client reads again; 0: the pool is too small for so many clients."""
        return self.pool_bytes // 4 // (clients * chunk_bytes * self.request(chunk_bytes))

    def turnover(self, chunk_bytes: int, clients: int) -> int:
        """Requests that each client stores before anything is measured: more than the pool holds, all together."""
        return -(-self.pool_bytes * 5 // 4 // (clients * chunk_bytes * self.request(chunk_bytes)))

    def requests(self) -> list[dict[str, Any]]:
        """What clients are told for each phase: stores alone, loads alone, lookups alone, all mixed."""
        shares = {
            "store": (1.0, 1.0, 0.0),
            "load": (0.0, 1.0, 0.0),
            "lookup": (0.0, self.hits, 1.0),
            "mixed": (self.writes, self.hits, 0.0),
        }
        return [
            {"op": "phase", "name": name, "seconds": self.seconds, "writes": writes, "hits": hits, "lookups": lookups}
            for name, (writes, hits, lookups) in ((name, shares[name]) for name in self.phases)
        ]


@dataclass
class Turn:
    """What one phase of one store has shown so far, all rounds together. Times in seconds."""

    taken: dict[str, list[float]]
    moved_bytes: int = 0
    busy_s: float = 0.0
    clients_cpu_s: float = 0.0
    server_cpu_s: float = 0.0
    wanted: int = 0
    missed: int = 0
    offered: int = 0
    refused: int = 0


@dataclass(frozen=True)
class Row:
    """One line of the result: one phase of one store. Times in milliseconds (None: too few samples), CPU in seconds per
    GiB. ``misses``: share of the chunks wanted that should have been there and were not; ``refused``: of those stored.
    """

    store: str
    chunk_bytes: int
    clients: int
    phase: str
    kind: str
    gib_per_s: float
    requests: int
    p50_ms: float | None
    p99_ms: float | None
    p999_ms: float | None
    clients_cpu: float | None
    server_cpu: float | None
    misses: float
    refused: float

    def as_json(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)


class Clients:
    """``count`` worker processes of one store. Raises RuntimeError when one of them fails."""

    def __init__(self, server: Server, options: dict[str, Any], plan: Plan, chunk_bytes: int, count: int) -> None:
        self._processes: list[subprocess.Popen[str]] = []
        setup = {
            "store": server.client,
            "options": {**options, "clients": count},
            "chunk_bytes": chunk_bytes,
            "batch": plan.request(chunk_bytes),
            "recent": plan.recent(chunk_bytes, count),
        }
        self._errors: list[IO[str]] = []  # of each its own: what one says last is not lost among the others
        try:
            for number in range(count):
                self._errors.append(tempfile.TemporaryFile("w+"))  # noqa: SIM115 - closed with the process
                self._processes.append(
                    subprocess.Popen(
                        [server.python, "-P", WORKER, json.dumps({**setup, "client": number})],
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=self._errors[-1],
                        text=True,
                    )
                )
            self._answers()
        except BaseException:
            self.close()
            raise

    def ask(self, request: dict[str, Any]) -> list[dict[str, Any]]:
        """What every client answers; all of them do it at the same time."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
        return self._answers()

    def close(self) -> None:
        """Ends them all."""
        for process in self._processes:
            if process.stdin is not None:
                process.stdin.close()
        for process in self._processes:
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()
        for errors in self._errors:
            errors.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answers(self) -> list[dict[str, Any]]:
        answers = []
        for process, errors in zip(self._processes, self._errors, strict=True):
            assert process.stdout is not None
            ready = select.select([process.stdout], [], [], PATIENCE_S)[0]
            line = process.stdout.readline() if ready else ""
            if not line:
                errors.seek(0)
                said = errors.read().strip().splitlines()[-3:]
                raise RuntimeError(f"a client {'failed' if ready else 'did not answer'}: {' | '.join(said)}")
            answers.append(json.loads(line))
        return answers


class Load:
    """Runs a plan against kvd and peers. ``notes``: what was left out, and why."""

    def __init__(self, plan: Plan, peers: Sequence[str]) -> None:
        self._plan, self._names = plan, ["kvd", *peers]
        self._about: dict[str, str] = {}
        self.notes: list[str] = []
        self.rows: list[Row] = []
        self.figures: list[Figure] = []

    @property
    def about(self) -> list[str]:
        """What was run: a line for each store, its addresses those of its first start."""
        return list(self._about.values())

    def run(self) -> None:
        """Fills ``rows`` and ``figures``. A store that fails is left out, and a note says so. Every size of chunks
        meets new stores: where engines are alike there is one size."""
        for chunk_bytes in self._plan.chunks:
            with ExitStack() as stack:
                home = stack.enter_context(tempfile.TemporaryDirectory(prefix="kvd-bench-", dir=self._plan.directory))
                servers = self._start(stack, home)
                before = {name: server.loop_lag() for name, server in servers.items()}
                for clients in self._plan.clients:
                    self._cell(servers, chunk_bytes, clients)
                for name, lags in before.items():
                    self._lag(f"{name}, {size_name(chunk_bytes)}", lags, servers[name].loop_lag())
        self.notes = list(dict.fromkeys(self.notes))

    def _start(self, stack: ExitStack, home: str) -> dict[str, Server]:
        servers: dict[str, Server] = {}
        for name in self._names:
            try:
                servers[name] = server = start(name, self._plan.pool_bytes, home)
            except (OSError, RuntimeError) as error:
                self.notes.append(f"{name}: {error}")
                continue
            stack.callback(server.close)
            self._about.setdefault(name, server.about)
        return servers

    def _cell(self, servers: dict[str, Server], chunk_bytes: int, clients: int) -> None:
        """One size of chunks and number of clients, all stores in turn."""
        what = f"{size_name(chunk_bytes)} x{clients}"
        if not self._plan.recent(chunk_bytes, clients):
            self.notes.append(f"{what}: left out, the pool is too small for it")
            return
        turns: dict[str, dict[str, Turn]] = {}
        for number in range(self._plan.rounds):
            for name, server in servers.items():
                for variant, options in server.variants.items():
                    label = f"{name} {variant}"
                    if clients > server.most_clients or (number and label not in turns):
                        continue
                    print(f"load: {what}: {label}", file=sys.stderr)
                    try:
                        self._turn(server, options, chunk_bytes, clients, turns.setdefault(label, {}))
                    except (OSError, RuntimeError) as error:
                        self.notes.append(f"{label}, {what}: {error}")
                        turns.pop(label, None)
        for label, phases in turns.items():
            self.rows += [row for phase in phases for row in _rows(label, chunk_bytes, clients, phase, phases[phase])]

    def _turn(
        self, server: Server, options: dict[str, Any], chunk_bytes: int, clients: int, turns: dict[str, Turn]
    ) -> None:
        first = not turns
        with Clients(server, options, self._plan, chunk_bytes, clients) as workers:
            workers.ask({"op": "fill", "requests": self._plan.turnover(chunk_bytes, clients)})
            time.sleep(SETTLE_S)
            for phase in self._plan.requests():
                turn = turns.setdefault(phase["name"], Turn({}))
                used = cpu_s(server.pids)
                answers = workers.ask(phase)
                turn.server_cpu_s += cpu_s(server.pids) - used
                for answer in answers:
                    for kind, taken in answer["taken"].items():
                        turn.taken.setdefault(kind, []).extend(taken)
                    stored, loaded = answer["stored"], answer["loaded"]
                    turn.moved_bytes += (stored + loaded) * chunk_bytes
                    turn.clients_cpu_s += answer["cpu"]
                    turn.wanted += answer["wanted"]
                    turn.missed += answer["wanted"] - loaded
                    offered = len(answer["taken"]["store"]) * self._plan.request(chunk_bytes)
                    turn.offered += offered
                    turn.refused += offered - stored
                turn.busy_s += max(a["ended"] for a in answers) - min(a["began"] for a in answers)
            if first and not all(answer["good"] for answer in workers.ask({"op": "check"})):
                raise RuntimeError("what was loaded is not what was stored")

    def _lag(self, name: str, before: list[tuple[float, float]], after: list[tuple[float, float]]) -> None:
        """p99 of the loop's lag meanwhile, as the bound of the bucket that it is in."""
        counts = [(bound, count - old) for (bound, count), (_, old) in zip(after, before, strict=True)]
        if counts and (total := counts[-1][1]):
            p99 = next(bound for bound, count in counts if count >= 0.99 * total)
            self.figures.append(single(f"event loop lag, {name}, p99 at most", "ms", [p99 * 1e3]))


def headed(rows: Sequence[Row]) -> list[Sequence[str]]:
    """The rows for people, a heading first."""
    heading = ("store", "chunk", "clients", "phase", "requests", "GiB/s", "p50 ms", "p99 ms", "p99.9 ms")
    found: list[Sequence[str]] = [(*heading, "CPU s/GiB clients", "CPU s/GiB server", "missed", "refused")]
    for row in rows:
        times = [f"{one:.3f}" if one is not None else "" for one in (row.p50_ms, row.p99_ms, row.p999_ms)]
        costs = [f"{one:.3f}" if one is not None else "" for one in (row.clients_cpu, row.server_cpu)]
        phase = row.phase if row.kind == row.phase else f"{row.phase}: {row.kind}"
        moved = f"{row.gib_per_s:.2f}" if row.gib_per_s else ""
        shares = [f"{share:.1%}" if share else "" for share in (row.misses, row.refused)]
        found.append(
            (row.store, size_name(row.chunk_bytes), str(row.clients), phase, str(row.requests), moved, *times)
            + (*costs, *shares)
        )
    return found


def _rows(label: str, chunk_bytes: int, clients: int, phase: str, turn: Turn) -> list[Row]:
    """A row for each kind of request that the phase made."""
    rows = []
    gib = turn.moved_bytes / GIB
    for kind, taken in turn.taken.items():
        if not taken:
            continue
        times = [percentile(taken, p) * 1e3 if len(taken) * (100 - p) >= 100 else None for p in PERCENTS]
        whole_phase = kind == phase or kind == "store"  # what belongs to the phase as a whole stands in one row
        rows.append(
            Row(
                label,
                chunk_bytes,
                clients,
                phase,
                kind,
                gib / turn.busy_s if whole_phase else 0.0,
                len(taken),
                times[0],
                times[1],
                times[2],
                turn.clients_cpu_s / gib if whole_phase and gib else None,
                turn.server_cpu_s / gib if whole_phase and gib and turn.server_cpu_s else None,
                turn.missed / turn.wanted if kind == "load" and turn.wanted else 0.0,
                turn.refused / turn.offered if kind == "store" else 0.0,
            )
        )
    return rows
