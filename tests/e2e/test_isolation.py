"""What must not be shared is not, and what is loaded is really used."""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvd.wire.lifeline import socket_path
from tests.daemon import Daemon
from tests.e2e.engine import Answer, Engine, prompt
from tests.raw import RawLifeline
from tests.wait import wait_until

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]


def negate_pool(daemon: Daemon) -> None:
    """Flips the sign of every bfloat16 in the pool."""
    numpy = pytest.importorskip("numpy")
    lifeline = RawLifeline(socket_path(daemon.socket))
    try:
        welcome = lifeline.hello()
        with mmap.mmap(welcome.descriptors[0], welcome.segments[0].data_bytes) as memory:
            numpy.frombuffer(memory, dtype=numpy.uint8)[1::2] ^= 0x80
    finally:
        lifeline.close()


def test_spoiled_bytes_in_the_pool_change_the_output_so_they_were_used(model: Callable[..., Path]) -> None:
    long, short = prompt(1, 2 * 256 + 9), prompt(1, 60)
    with Daemon() as daemon, Engine(model("llama"), endpoint=daemon.unix_endpoint) as engine:
        good, uncached = engine.generate([long, short])
        engine.reset()
        assert engine.generate([long])[0].tokens == good.tokens
        engine.reset()
        negate_pool(daemon)
        spoiled, still_uncached = engine.generate([long, short])
        assert spoiled.cached == 512
        assert spoiled.logprobs != good.logprobs
        assert spoiled.tokens != good.tokens
        assert still_uncached.tokens == uncached.tokens
        assert daemon.audit() == []


def test_cache_salts_isolate(model: Callable[..., Path]) -> None:
    long = prompt(2, 2 * 256 + 9)
    with Daemon() as daemon, Engine(model("llama"), endpoint=daemon.unix_endpoint) as engine:
        engine.generate([long], salt="one")
        engine.reset()
        assert engine.generate([long], salt="two")[0].cached == 0
        assert engine.generate([long])[0].cached == 0
        engine.reset()
        assert engine.generate([long], salt="one")[0].cached == 512
        assert daemon.audit() == []


def test_other_weights_of_the_same_name_and_shape_never_share(model: Callable[..., Path]) -> None:
    long = prompt(3, 2 * 256 + 9)
    with Daemon() as daemon:
        with Engine(model("llama", seed=0), endpoint=daemon.unix_endpoint) as first:
            of_first = first.generate([long])[0]
            first.drain()
        assert daemon.stats().counters["stored_chunks"] == 2
        with Engine(model("llama", seed=1), endpoint=daemon.unix_endpoint) as second:
            of_second = second.generate([long])[0]
            assert of_second.cached == 0
            assert of_second.tokens != of_first.tokens
            second.reset()
            assert second.generate([long])[0].tokens == of_second.tokens
        assert len(daemon.stats().namespaces) == 2


def write_adapter(directory: Path, seed: int) -> Path:
    """A LoRA adapter for the tiny llama, other weights for another seed."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(4):
        for module, outputs in (("q_proj", 256), ("v_proj", 64)):
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(8, 256, generator=draw)
            tensors[f"{name}.lora_B.weight"] = torch.randn(outputs, 8, generator=draw)
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def test_an_adapter_trained_anew_under_its_old_path_is_not_taken_for_the_old_one(
    model: Callable[..., Path], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"enable_lora": True, "max_lora_rank": 8, "dtype": "float32"}
    long = prompt(8, 256 + 9)
    tokens = []
    with Daemon() as daemon:
        for seed in (1, 2):
            lora = write_adapter(tmp_path / "tuned", seed)
            with Engine(model("llama"), endpoint=daemon.unix_endpoint, **options) as engine:
                answers = [engine.generate([long], lora=lora)[0]]

                def shared(engine: Engine = engine, lora: Path = lora, answers: list[Answer] = answers) -> bool:
                    engine.reset()
                    answers += engine.generate([long], lora=lora)
                    return answers[-1].cached == 256

                wait_until(shared, 60, "the adapter to be read, and its pages to be shared")
                assert {answer.cached for answer in answers[:-1]} == {0}
                assert all(answer.tokens == answers[0].tokens for answer in answers)
                tokens.append(answers[0].tokens)
        assert tokens[0] != tokens[1]
        assert daemon.audit() == []


def test_a_hybrid_model_answers_and_says_that_it_is_not_cached(model: Callable[..., Path]) -> None:
    prompts = [prompt(4, 600), prompt(5, 300)]
    with Engine(model("gemma3"), without=True) as plain:
        expected = plain.generate(prompts)
    with Daemon() as daemon, Engine(model("gemma3"), endpoint=daemon.unix_endpoint) as engine:
        assert engine.generate(prompts) == expected
        engine.reset()
        assert engine.generate(prompts) == expected
        assert "hybrid model" in engine.log
        assert daemon.stats().counters["reserved_chunks"] == 0


def test_decoded_blocks_are_stored_as_well(model: Callable[..., Path]) -> None:
    with Daemon() as daemon, Engine(model("llama"), endpoint=daemon.unix_endpoint) as engine:
        start = prompt(6, 200)
        answer = engine.generate([start], max_tokens=80)[0]
        engine.reset()
        follow_up = start + answer.tokens + prompt(7, 10)
        assert engine.generate([follow_up])[0].cached == 256
        assert daemon.audit() == []


def test_preemption_under_a_small_kv_budget_does_not_change_the_tokens(model: Callable[..., Path]) -> None:
    prompts = [prompt(10 + i, 300 + 20 * i) for i in range(6)]
    small: dict[str, Any] = {
        "dtype": "float32",  # tokens do not depend on what else is in a batch
        "kv_cache_memory_bytes": 44 * 64 * 1024,
        "max_num_batched_tokens": 512,
        "max_model_len": 1024,
    }
    with Engine(model("llama"), without=True, **small) as plain:
        expected = plain.generate(prompts, max_tokens=100)
        assert plain.metrics()["vllm:num_preemptions"] > 0, "the budget is not small enough to show anything"
    with Daemon() as daemon, Engine(model("llama"), endpoint=daemon.unix_endpoint, **small) as engine:
        for _ in range(2):
            answers = engine.generate(prompts, max_tokens=100)
            assert [a.tokens for a in answers] == [a.tokens for a in expected]
            engine.reset()
        assert engine.metrics()["vllm:num_preemptions"] > 0
        assert engine.metrics()["vllm:external_prefix_cache_hits"] > 0
        assert daemon.audit() == []
        assert daemon.stats().pool.writing_bytes == 0
