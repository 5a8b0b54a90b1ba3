"""``make demo``: one daemon, two real vLLM replicas in processes of their own, and what the second need not compute.

Replica A computes every prompt once (cold) and stores its KV as it goes. Then A and B answer the same prompts again, A
over shared memory, B over TCP; their own prefix caches are emptied before each, so what they do not compute comes from
kvd. Exits 1 if any output differs or a prompt was not found in the cache.
"""

from __future__ import annotations

import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.demo.conversations import make_conversations
from deploy.demo.models import make_model
from deploy.demo.processes import END_S, ROOT, Daemon, Failed, Replica, environment

#: About 100 million parameters: small enough for two CPU cores, big enough that computing a prompt is felt.
MODEL = {"layers": 6, "hidden": 1024, "heads": 16, "kv_heads": 8, "intermediate": 2816, "vocabulary": 2000}
MAX_TOKENS = 3072
CONVERSATIONS = 2
TURNS = 3
ANSWER_TOKENS = 16


def say(text: str) -> None:
    """A line of progress."""
    print(f"  {text}", flush=True)


@dataclass
class Pass:
    """One replica's answers to all prompts."""

    title: str
    answers: list[dict[str, Any]]
    moved: str
    from_kvd: int = 0  # prompt tokens, by the engine's own count
    identical: str = ""


def play_cold(replica: Replica) -> tuple[list[list[int]], Pass]:
    """The conversations, turn by turn, everything computed. Also returns the prompts."""
    prompts: list[list[int]] = []
    answers = []
    for number, talk in enumerate(make_conversations(CONVERSATIONS, TURNS, vocabulary=MODEL["vocabulary"]), 1):
        for turn in range(TURNS):
            prompt = talk.ask(turn)
            answer = replica.request("ask", prompt=prompt, tokens=ANSWER_TOKENS, cold=True)
            talk.answered(answer["tokens"])
            prompts.append(prompt)
            answers.append(answer)
            say(f"conversation {number}, turn {turn + 1}: {_one(answer)}")
    replica.request("settle")
    stored = replica.request("counters")["stored_bytes"]
    return prompts, Pass(f"{replica.name} cold", answers, f"{_mib(stored)} stored")


def play_warm(replica: Replica, prompts: list[list[int]], way: str) -> Pass:
    """The same prompts again."""
    answers = []
    for number, prompt in enumerate(prompts, 1):
        answers.append(replica.request("ask", prompt=prompt, tokens=ANSWER_TOKENS, cold=False))
        say(f"prompt {number}: {_one(answers[-1])}")
    counters = replica.request("counters")
    moved = f"{_mib(counters['loaded_bytes'])} loaded"
    return Pass(f"{replica.name} warm, {way}", answers, moved, counters["kvd_tokens"])


def main() -> int:
    """Plays the demo; returns the exit code."""
    for number in (signal.SIGTERM, signal.SIGHUP):  # end like Ctrl-C, by way of everything that cleans up
        signal.signal(number, lambda signum, _: sys.exit(128 + signum))
    try:
        return play()
    except Failed as failure:
        print(f"\n  FAILED: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def play() -> int:
    """Plays; returns 0 if every output was right and came from where it should. Raises Failed."""
    home = ROOT / ".demo"
    home.mkdir(exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix="kvd-demo-"))
    began = time.monotonic()
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        print("kvd demo: what one vLLM replica has computed, another one loads\n")
        model = make_model("llama", home / "model", max_tokens=MAX_TOKENS, **MODEL)
        daemon = Daemon(directory)
        stack.callback(daemon.close)
        say(daemon.line)
        replicas = []
        for name, endpoint in (("A", daemon.unix), ("B", daemon.tcp)):
            say(f"starting replica {name} at {endpoint}: a real vLLM, this takes a while")
            replicas.append(Replica(name, model, MAX_TOKENS, endpoint, directory))
            stack.callback(replicas[-1].close)
        a, b = replicas
        for replica in replicas:
            replica.wait_ready()
            say(f"replica {replica.name} is ready, {time.monotonic() - began:.0f} s after the start")

        say("replica A computes everything, and stores it as it goes")
        prompts, cold = play_cold(a)
        say("replica A again, its own prefix cache emptied before each prompt")
        warm_a = play_warm(a, prompts, "shared memory")
        say("replica B, which has never seen these prompts")
        warm_b = play_warm(b, prompts, "TCP")

        good = True
        for one in (warm_a, warm_b):
            same = all(x["tokens"] == y["tokens"] for x, y in zip(one.answers, cold.answers, strict=True))
            # Every prompt hit, and all that was not computed came from kvd.
            hit = all(answer["cached_tokens"] > 0 for answer in one.answers)
            hit = hit and one.from_kvd == sum(answer["cached_tokens"] for answer in one.answers)
            one.identical = "yes" if same else "NO"
            good = good and same and hit
        _table([cold, warm_a, warm_b])
        print(f"\n  {time.monotonic() - began:.0f} s in all. What the daemon says (kvd status):\n")
        status = [sys.executable, "-m", "kvd", "status", "--endpoint", daemon.unix]
        subprocess.run(status, env=environment(), timeout=END_S, check=False)
        print("\n  Look next: `make run` starts a daemon that stays; then `.venv/bin/kvd status`, and its metrics at")
        print("  http://127.0.0.1:7441/metrics. README.md says how to point your vLLM at it.")
        if not good:
            print("\n  FAILED: an output differs, or a prompt did not come from the cache", file=sys.stderr)
        return 0 if good else 1


def _table(passes: list[Pass]) -> None:
    rows = [("", "prompt tokens", "from the cache", "time to first token", "moved", "same output")]
    cold_s = statistics.median(answer["ttft_s"] for answer in passes[0].answers)
    for one in passes:
        ttft_s = statistics.median(answer["ttft_s"] for answer in one.answers)
        faster = "" if one is passes[0] else f" ({cold_s / ttft_s:.1f} times faster)"
        prompt_tokens, cached = (sum(a[k] for a in one.answers) for k in ("prompt_tokens", "cached_tokens"))
        share = f"{cached} ({100 * cached / prompt_tokens:.0f} %)"
        rows.append((one.title, str(prompt_tokens), share, f"{ttft_s:.2f} s{faster}", one.moved, one.identical))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    print()
    for row in rows:
        print("  " + "   ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    print("  (time to first token: the median of all prompts)")


def _one(answer: dict[str, Any]) -> str:
    return (
        f"{answer['prompt_tokens']} tokens, {answer['cached_tokens']} from the cache, "
        f"first token after {answer['ttft_s']:.2f} s"
    )


def _mib(count: int) -> str:
    return f"{count / (1 << 20):.0f} MiB"


if __name__ == "__main__":
    sys.exit(main())
