"""A real vLLM engine in a process of its own, for tests, and the talk with it.

    with Engine(model, endpoint=daemon.unix_endpoint) as engine:
        first = engine.generate([prompt])
        engine.reset()
        again = engine.generate([prompt])

The process reads one JSON request per line and answers each with one line. Its log is a file (``engine.log``).
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import json
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.daemon import ROOT, clean_environment

START_TIMEOUT_S = 300.0
CALL_TIMEOUT_S = 120.0

_alive: weakref.WeakSet[Engine] = weakref.WeakSet()


@atexit.register
def _clean_up() -> None:
    for engine in list(_alive):
        engine.close()


def prompt(seed: int, tokens: int) -> list[int]:
    """A prompt of so many random tokens, the same for the same seed."""
    draw = random.Random(seed)
    return [draw.randrange(4, 500) for _ in range(tokens)]


@dataclass(frozen=True)
class Answer:
    """What came of one prompt."""

    tokens: list[int]
    logprobs: list[float]  # of the sampled tokens, and of the runners-up
    cached: int  # prompt tokens that were not computed


class Engine:
    """One engine process. ``connector``: the connector's options; ``options``: vLLM's. ``without`` runs it without kvd.

    ``prefix_caching_anyway`` leaves prefix caching on where vLLM's CPU platform turns it off (MLA without AMX), so that
    such a model can be looked at here at all.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        endpoint: str | None = None,
        connector: dict[str, Any] | None = None,
        without: bool = False,
        wait: bool = True,
        prefix_caching_anyway: bool = False,
        **options: Any,
    ) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="kvd-engine-", dir="/tmp"))
        self._log = self.directory / "log"
        # A busy machine may keep a daemon waiting for longer than these deadlines: only tests of deadlines want them.
        patient = {"lookup_timeout_s": 5.0, "promote_timeout_s": 30.0}
        extra = {**patient, **({"endpoint": endpoint} if endpoint else {}), **(connector or {})}
        ranks = options.get("tensor_parallel_size", 1) * options.get("pipeline_parallel_size", 1)
        arguments: dict[str, Any] = {
            "model": str(model),
            "dtype": "bfloat16",
            "enforce_eager": True,
            "block_size": 32,
            "kv_cache_memory_bytes": 32 << 20,
            "max_model_len": 2048,
            "max_num_seqs": 8,
            "disable_log_stats": False,
            **options,
        }
        if not without:
            arguments["kv_transfer_config"] = {
                "kv_connector": "KvdConnector",
                "kv_connector_module_path": "kvd_client.adapters.vllm",
                "kv_role": "kv_both",
                "kv_connector_extra_config": extra,
            }
        environment = clean_environment(
            VLLM_ENABLE_V1_MULTIPROCESSING="1" if ranks > 1 else "0",
            OMP_NUM_THREADS="1",
            HF_HUB_OFFLINE="1",
            TRANSFORMERS_OFFLINE="1",
            VLLM_NO_USAGE_STATS="1",
            DO_NOT_TRACK="1",
            TOKENIZERS_PARALLELISM="false",
            **({"KVD_TEST_PREFIX_CACHING": "1"} if prefix_caching_anyway else {}),
        )
        if ranks > 1:
            environment["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(str(i % (os.cpu_count() or 1)) for i in range(ranks))
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.e2e.engine", json.dumps(arguments)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                cwd=ROOT,
                start_new_session=True,
            )
        self._buffer = b""
        _alive.add(self)
        if wait:
            self.wait_ready()

    def wait_ready(self) -> None:
        """Waits until the engine can be used."""
        try:
            assert self._answer(START_TIMEOUT_S) == "ready"
        except BaseException:
            self.close()
            raise

    # -- what it does

    def generate(
        self,
        prompts: list[list[int]],
        *,
        max_tokens: int = 8,
        salt: str | None = None,
        lora: Path | None = None,
        timeout_s: float = CALL_TIMEOUT_S,
    ) -> list[Answer]:
        """Greedy output for each prompt, with logprobs."""
        self.start_generate(prompts, max_tokens=max_tokens, salt=salt, lora=lora)
        return self.finish_generate(timeout_s)

    def start_generate(
        self, prompts: list[list[int]], *, max_tokens: int = 8, salt: str | None = None, lora: Path | None = None
    ) -> None:
        """Begins what ``finish_generate`` waits for."""
        self._ask(op="generate", prompts=prompts, max_tokens=max_tokens, salt=salt, lora=str(lora) if lora else None)

    def finish_generate(self, timeout_s: float = CALL_TIMEOUT_S) -> list[Answer]:
        """The answers to ``start_generate``."""
        return [Answer(**answer) for answer in self._answer(timeout_s)]

    def abandon(self, prompts: list[list[int]], steps: int) -> None:
        """Begins on the prompts, and aborts them all after so many steps of the engine."""
        self._call(op="abandon", prompts=prompts, steps=steps)

    def reset(self) -> None:
        """Finishes stores, then forgets the engine's own prefix cache: only the connector can supply KV now."""
        self.drain()
        assert self._call(op="reset"), "the prefix cache could not be reset"

    def drain(self) -> None:
        """Steps until the engine owes nothing, and all that was copied has been committed."""
        self._call(op="drain")

    def metrics(self) -> dict[str, float]:
        """The engine's counters and gauges."""
        answer: dict[str, float] = self._call(op="metrics")
        return answer

    def slowest_hooks(self) -> dict[str, float]:
        """Longest time that each hook of the connector has taken since the last call, seconds (one rank only)."""
        answer: dict[str, float] = self._call(op="hooks")
        return answer

    def lock_step(self, fail_layer: int | None = None) -> None:
        """From now on synchronous loads go as ``lockstep`` says (one rank only)."""
        self._call(op="lock_step", fail_layer=fail_layer)

    @property
    def log(self) -> str:
        """What the engine has said."""
        return self._log.read_text(errors="replace")

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    # -- its end

    def kill(self) -> None:
        """Ends the engine and its workers as a crash would."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(30)

    def close(self) -> None:
        """Leaves nothing behind, nor what vLLM leaves of its ranks' shared memory."""
        shared = self._shared_memory()
        if self._process.poll() is None:
            with contextlib.suppress(OSError):
                assert self._process.stdin is not None
                self._process.stdin.close()
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                pass
        self.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        for path in shared:
            path.unlink(missing_ok=True)
        shutil.rmtree(self.directory, ignore_errors=True)
        _alive.discard(self)

    def _shared_memory(self) -> set[Path]:
        """Files in /dev/shm that processes of this engine have mapped, the pools of daemons aside."""
        found = set()
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has just ended
                if os.getpgid(int(process.name)) == self._process.pid:
                    maps = (process / "maps").read_text().splitlines()
                    found |= {Path(line.split()[5]) for line in maps if re.search(" /dev/shm/(?!kvd-)", line)}
        return found

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            print(f"--- log of engine {self.pid}\n{self.log[-6000:]}", file=sys.stderr)
        self.close()

    # -- inside

    def _call(self, **request: Any) -> Any:
        self._ask(**request)
        return self._answer(CALL_TIMEOUT_S)

    def _ask(self, **request: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()

    def _answer(self, timeout_s: float) -> Any:
        assert self._process.stdout is not None
        pipe, deadline = self._process.stdout.fileno(), time.monotonic() + timeout_s
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
            part = os.read(pipe, 1 << 20) if ready else b""
            if not part:
                what = "ended" if ready else f"did not answer within {timeout_s} s"
                raise AssertionError(f"the engine {what}:\n{self.log[-6000:]}")
            self._buffer += part
        line, self._buffer = self._buffer.split(b"\n", 1)
        answer = json.loads(line)
        assert "error" not in answer, f"{answer['error']}\n{self.log[-6000:]}"
        return answer["result"]


# ---------------------------------------------------------------- in the engine's process


class _Server:
    def __init__(self, arguments: dict[str, Any]) -> None:
        from vllm import LLM

        self.llm = LLM(**arguments)
        self.hooks: dict[str, float] = {}
        self.lockstep: Any = None
        core = getattr(self.llm.llm_engine.engine_core, "engine_core", None)
        self.scheduler = getattr(core, "scheduler", None)
        if self.scheduler is not None and self.scheduler.connector is not None:
            from vllm.distributed.kv_transfer import get_kv_transfer_group

            for connector in (self.scheduler.connector, get_kv_transfer_group()):
                self._time(connector)

    def _time(self, connector: Any) -> None:
        for name in (
            "get_num_new_matched_tokens",
            "update_state_after_alloc",
            "build_connector_meta",
            "update_connector_output",
            "request_finished_all_groups",
            "bind_connector_metadata",
            "start_load_kv",
            "wait_for_layer_load",
            "wait_for_save",
            "get_finished",
        ):
            setattr(connector, name, self._timed(name, getattr(connector, name)))

    def _timed(self, name: str, hook: Any) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.monotonic()
            try:
                return hook(*args, **kwargs)
            finally:
                self.hooks[name] = max(self.hooks.get(name, 0.0), time.monotonic() - began)

        return timed

    def generate(
        self, prompts: list[list[int]], max_tokens: int, salt: str | None, lora: str | None
    ) -> list[dict[str, Any]]:
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        adapter = LoRARequest("tuned", 1, lora) if lora else None
        sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, logprobs=3)
        inputs = [{"prompt_token_ids": ids, **({"cache_salt": salt} if salt else {})} for ids in prompts]
        outputs = self.llm.generate(inputs, sampling, lora_request=adapter, use_tqdm=False)
        return [
            {
                "tokens": list(output.outputs[0].token_ids),
                "logprobs": [entry.logprob for step in output.outputs[0].logprobs for _, entry in sorted(step.items())],
                "cached": output.num_cached_tokens or 0,
            }
            for output in outputs
        ]

    def abandon(self, prompts: list[list[int]], steps: int) -> None:
        from vllm import SamplingParams

        engine = self.llm.llm_engine
        names = [f"abandoned-{time.monotonic_ns()}-{i}" for i in range(len(prompts))]
        for name, ids in zip(names, prompts, strict=True):
            engine.add_request(name, {"prompt_token_ids": ids}, SamplingParams(max_tokens=100, ignore_eos=True))
        for _ in range(steps):
            engine.step()
        engine.abort_request(names)
        while engine.has_unfinished_requests():
            engine.step()

    def drain(self) -> None:
        if self.scheduler is None:
            return  # the engine's own process steps by itself
        deadline = time.monotonic() + 60
        while self.scheduler.has_requests() and time.monotonic() < deadline:
            self.llm.llm_engine.engine_core.get_output()
            time.sleep(0.001)
        half = getattr(self.scheduler.connector, "_scheduler", None)
        controller = getattr(half, "_controller", None)
        if controller is not None:
            import threading

            idle = threading.Event()
            controller._queue.put(idle.set)
            idle.wait(30)

    def metrics(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for metric in self.llm.get_metrics():
            value = getattr(metric, "value", None)
            if value is not None:
                found[metric.name] = found.get(metric.name, 0.0) + value
        return found

    def lock_step(self, fail_layer: int | None) -> None:
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        from tests.e2e.lockstep import LockStep

        self.lockstep = self.lockstep or LockStep(get_kv_transfer_group()._worker)
        self.lockstep.fail_layer = fail_layer

    def answer(self, request: dict[str, Any]) -> Any:
        op = request.pop("op")
        if op == "generate":
            return self.generate(**request)
        if op == "reset":
            deadline = time.monotonic() + 30  # blocks of requests that have just finished may still be on their way
            while not (done := self.llm.reset_prefix_cache()) and time.monotonic() < deadline:
                time.sleep(0.05)
            return done
        if op == "abandon":
            return self.abandon(**request)
        if op == "lock_step":
            return self.lock_step(**request)
        if op == "drain":
            return self.drain()
        if op == "metrics":
            return self.metrics()
        if op == "hooks":
            hooks, self.hooks = self.hooks, {}
            return hooks
        raise ValueError(f"unknown request {op!r}")


def _keep_prefix_caching() -> None:
    from vllm.platforms.cpu import CpuPlatform

    check = CpuPlatform.check_and_update_config

    def keeping(config: Any) -> None:
        check(config)
        config.cache_config.enable_prefix_caching = True

    CpuPlatform.check_and_update_config = staticmethod(keeping)


def main() -> None:
    """The engine's process."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # the engine and its libraries print
    faulthandler.register(signal.SIGUSR1)  # for whoever looks into an engine that hangs: its stacks go to the log
    if os.environ.get("KVD_TEST_PREFIX_CACHING"):
        _keep_prefix_caching()
    server = _Server(json.loads(sys.argv[1]))
    answers.write(json.dumps({"result": "ready"}) + "\n")
    for line in sys.stdin:
        try:
            answer = {"result": server.answer(json.loads(line))}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
