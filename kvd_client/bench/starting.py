"""Starts: of the daemon, of a client, and what the engine's adapter adds to the engine's own import."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

from kvd_client.bench.daemon import BenchDaemon
from kvd_client.bench.figures import MIB, Figure, figure, interleave, single

POOL_BYTES = 4 << 30
#: Nothing that is started here takes so long, seconds; importing an engine takes long.
PATIENCE_S = 300.0

_CLIENT = """
import json, sys, time
began = time.perf_counter()
from kvd_client import Client
imported = time.perf_counter()
with Client(sys.argv[1]) as client:
    client.connect(30.0)
    connected = time.perf_counter()
print(json.dumps([imported - began, connected - imported]))
"""

_ADAPTER = """
import json, time
began = time.perf_counter()
import vllm.distributed.kv_transfer.kv_connector.v1.base
import vllm.v1.core.sched.output
imported = time.perf_counter()
import kvd_client.adapters.vllm
print(json.dumps([imported - began, time.perf_counter() - imported]))
"""


def bench_start(rounds: int) -> list[Figure]:
    """From the start of the process to SERVING with a pool of 4 GiB, not populated, and memory beside the pool; then
    how long a client's import and its first connection take; with vLLM installed also the adapter's import after it."""
    rss_mib: list[float] = []
    taken_s: dict[str, list[float]] = {"client import": [], "client connect": []}

    def start() -> float:
        with BenchDaemon(POOL_BYTES, populate="lazy") as daemon:
            rss_mib.append(daemon.rss_bytes() / MIB)
            for name, seconds in zip(taken_s, _run(_CLIENT, daemon.unix_endpoint), strict=True):
                taken_s[name].append(seconds)
            return daemon.start_s

    samples = interleave({"start": start}, rounds, 1)
    figures = [figure("start", "s", samples), single("memory beside the pool", "MiB", rss_mib)]
    figures += [single(name, "s", seconds[1:]) for name, seconds in taken_s.items()]
    if importlib.util.find_spec("vllm") is None:
        print("start: vLLM is not installed here, so its adapter's import is left out", file=sys.stderr)
        return figures
    imports = {"import of vLLM": [0.0], "import of the adapter": [0.0]}
    for name, seconds in zip(imports, _run(_ADAPTER), strict=True):
        imports[name] = [seconds]
    return figures + [figure("import of the adapter", "s", imports, "import of vLLM")]


def _run(script: str, *arguments: str) -> list[float]:
    """The seconds that a Python process of its own prints. Raises RuntimeError."""
    result = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        env={name: value for name, value in os.environ.items() if not name.startswith("KVD_")},
        check=False,
    )
    if result.returncode:
        raise RuntimeError(result.stderr.strip().splitlines()[-1])
    seconds: list[float] = json.loads(result.stdout.strip().splitlines()[-1])
    return seconds
