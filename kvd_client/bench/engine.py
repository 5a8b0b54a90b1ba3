"""What a user of an engine sees: time to first token, and the time between tokens while a prefix is loaded."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict

from kvd_client.bench.daemon import BenchDaemon
from kvd_client.bench.engine_process import Size
from kvd_client.bench.figures import GIB, MIB, Figure, beside, percentile, single
from kvd_client.bench.limits import Memcpy

#: The whole of it may take so long, seconds.
PATIENCE_S = 900.0
#: One process for the whole engine; its threads leave a core to the daemon.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 2) - 1)),
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
#: Lines of the engine's log that are shown when it fails.
LOG_LINES = 5


def missing() -> str | None:
    """Why no engine can be measured here; None: one can."""
    return None if importlib.util.find_spec("vllm") else "engine: vLLM is not installed here"


def bench_engine(rounds: int, size: Size) -> list[Figure]:
    """A small model with random weights. Time to first token of a prompt whose prefix is new, is in the engine's own
    cache, or comes from kvd, the last against the second and one bare copy of the prefix; and the time between tokens
    of a running request while others load such prefixes, or have them in the own cache, against none. Needs vLLM.
    Raises RuntimeError."""
    with (
        BenchDaemon(max(256 * MIB, 8 * (rounds + 2) * (1 + size.loads) * size.prefix_bytes // 4)) as daemon,
        tempfile.TemporaryDirectory(prefix="kvd-bench-") as directory,
    ):
        setup = {"endpoint": daemon.unix_endpoint, "directory": directory, "rounds": rounds, "size": asdict(size)}
        result = subprocess.run(
            [sys.executable, "-m", "kvd_client.bench.engine_process", json.dumps(setup)],
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            env={**{k: v for k, v in os.environ.items() if not k.startswith("KVD_")}, **ENVIRONMENT},
            check=False,
        )
    if result.returncode:
        raise RuntimeError("the engine failed: " + " | ".join(result.stderr.strip().splitlines()[-LOG_LINES:]))
    taken = json.loads(result.stdout.strip().splitlines()[-1])["taken"]
    bare = Memcpy(size.prefix_bytes // 8, 8)
    copy_s = [size.prefix_bytes / GIB / bare.out() for _ in range(rounds + 1)][1:]
    hit, kvd, cold = (f"time to first token, {what}" for what in ("own hit", "from kvd", "cold"))
    figures = [
        single(cold, "ms", _ms(taken["cold"])),
        beside(single(hit, "ms", _ms(taken["own hit"])), cold, _ms(taken["cold"])),
        beside(
            single(kvd, "ms", _ms(taken["kvd"])),
            "own hit + bare copy",
            _ms([a + b for a, b in zip(taken["own hit"], copy_s, strict=True)]),
        ),
    ]
    for percent in (50, 99):
        alone, *others = (_ms([percentile(taken[name], percent)]) for name in ("alone", "loading", "hitting"))
        for what, gaps in zip(("prefixes are loaded", "prefixes are own hits"), others, strict=True):
            name = f"time between tokens while {what}, p{percent}"
            figures.append(beside(single(name, "ms", gaps), f"no load, p{percent}", alone))
    return figures


def _ms(seconds: list[float]) -> list[float]:
    return [one * 1e3 for one in seconds]
