"""One replica of the demo: a real vLLM engine in a process of its own, asked over a socket in lines of JSON.

Started by ``run.py``. Requests: ``{"op": "ask", "prompt": [...], "tokens": n, "cold": bool}``, ``{"op": "settle"}`` and
``{"op": "counters"}``. Ends when the other side closes the socket.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import time
from typing import Any

# One process for the whole engine: it starts faster, and nothing is left behind when it ends.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "OMP_NUM_THREADS": "2",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}
COUNTERS = {
    "kvd_tokens": "vllm:external_prefix_cache_hits",
    "loaded_bytes": "vllm:kvd_loaded_bytes",
    "stored_bytes": "vllm:kvd_stored_bytes",
    "load_failures": "vllm:kvd_load_failures",
}
SETTLE_S = 20.0
#: Asked once before anything is measured: an engine's first steps are slow. Too short to be stored.
WARM_UP = [5] * 200


class Replica:
    """A vLLM engine with the kvd connector."""

    def __init__(self, model: str, endpoint: str, max_tokens: int) -> None:
        from vllm import LLM

        self._llm = LLM(
            model,
            dtype="float32",  # so that a prompt computed in one piece and one computed in two agree to the last token
            enforce_eager=True,
            max_model_len=max_tokens,
            max_num_batched_tokens=max_tokens,
            max_num_seqs=4,
            block_size=32,
            kv_cache_memory_bytes=512 << 20,
            gpu_memory_utilization=0.3,  # of a GPU that both replicas use
            disable_log_stats=False,
            kv_transfer_config={
                "kv_connector": "KvdConnector",
                "kv_connector_module_path": "kvd_client.adapters.vllm",
                "kv_role": "kv_both",
                # Two replicas and a daemon on two cores: the daemon may have to wait for its turn.
                "kv_connector_extra_config": {"endpoint": endpoint, "lookup_timeout_s": 2.0},
            },
        )
        self._engine = self._llm.llm_engine
        self._asked = 0

    def ask(self, prompt: list[int], tokens: int, cold: bool) -> dict[str, Any]:
        """Answers a prompt with exactly ``tokens`` tokens.

        ``cold``: everything is computed. Otherwise the engine's own prefix cache is emptied first, so that what it does
        not compute comes from kvd.
        """
        from vllm import SamplingParams

        self._forget()
        self._asked += 1
        settings = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, skip_reading_prefix_cache=cold)
        started = time.perf_counter()
        first = 0.0
        last = None
        self._engine.add_request(f"ask-{self._asked}", {"prompt_token_ids": prompt}, settings)
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                if not first and output.outputs[0].token_ids:
                    first = time.perf_counter() - started
                last = output
        assert last is not None
        return {
            "ttft_s": first,
            "prompt_tokens": len(prompt),
            "cached_tokens": last.num_cached_tokens or 0,
            "tokens": list(last.outputs[0].token_ids),
        }

    def settle(self) -> dict[str, Any]:
        """Lets the engine finish what it does behind the requests: its stores, and giving back its pages."""
        self._forget()
        return {}

    def counters(self) -> dict[str, Any]:
        """What the engine has counted since it started."""
        found = {m.name: getattr(m, "value", 0) for m in self._llm.get_metrics()}
        return {name: int(found.get(metric, 0)) for name, metric in COUNTERS.items()}

    def _forget(self) -> None:
        deadline = time.monotonic() + SETTLE_S
        while not self._llm.reset_prefix_cache():
            if time.monotonic() > deadline:
                raise TimeoutError(f"the engine still holds pages after {SETTLE_S:g} s")
            self._engine.step()
            time.sleep(0.005)


def main() -> None:
    """Starts the engine, says ready, then answers until the socket is closed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--endpoint", required=True)
    parser.add_argument("--max-tokens", type=int, required=True)
    parser.add_argument("--fd", type=int, required=True)
    args = parser.parse_args()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    with socket.socket(fileno=args.fd) as line, line.makefile("rw") as talk:
        replica = Replica(args.model, args.endpoint, args.max_tokens)
        replica.ask(WARM_UP, tokens=2, cold=True)
        print(json.dumps({"ready": True}), file=talk, flush=True)
        for request in talk:
            message = json.loads(request)
            answer = getattr(replica, message.pop("op"))(**message)
            print(json.dumps(answer), file=talk, flush=True)


if __name__ == "__main__":
    main()
