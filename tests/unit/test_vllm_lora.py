"""LoRA adapters: what one engine computed with other weights under the same name and path is never another's."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from kvd_client.adapters.vllm.lora import Adapters
from kvd_client.adapters.vllm.matching import Grid
from tests.unit.vllm_fakes import FakeRequest, hashes_of
from tests.wait import wait_until


@dataclass
class FakeLora:
    lora_path: str
    lora_int_id: int = 1
    lora_name: str = "tuned"


def write_adapter(directory: Path, weights: bytes, alpha: int = 16) -> str:
    directory.mkdir(exist_ok=True)
    (directory / "adapter_model.safetensors").write_bytes(weights)
    (directory / "adapter_config.json").write_text(json.dumps({"lora_alpha": alpha}))
    return str(directory)


def request(path: str | None, name: str = "r") -> FakeRequest:
    lora = None if path is None else FakeLora(path)
    return FakeRequest(name, 64, hashes_of("p", 2), lora_request=lora)


def key_in_a_new_engine(path: str | None) -> bytes:
    adapters = Adapters()
    asked = request(path)
    try:
        wait_until(lambda: adapters.salt(asked) is not None, 10, "the adapter to be read")
        return Grid(32, 2, adapters).key(asked, 0)
    finally:
        adapters.close()


def test_without_an_adapter_the_key_is_the_engines_hash() -> None:
    assert key_in_a_new_engine(None) == hashes_of("p", 2)[1]


def test_engines_with_the_same_adapter_agree_wherever_it_lies(tmp_path: Path) -> None:
    here, there = write_adapter(tmp_path / "a", b"weights"), write_adapter(tmp_path / "b", b"weights")
    assert key_in_a_new_engine(here) == key_in_a_new_engine(there) != key_in_a_new_engine(None)


def test_other_weights_or_another_scale_under_the_same_path_are_another_key(tmp_path: Path) -> None:
    keys = [
        key_in_a_new_engine(write_adapter(tmp_path / "a", weights, alpha))
        for weights, alpha in ((b"old", 16), (b"new", 16), (b"new", 32))
    ]
    assert len(set(keys)) == 3


def test_an_adapter_that_changes_under_a_running_engine_is_not_shared_any_more(tmp_path: Path) -> None:
    adapters = Adapters()
    path = write_adapter(tmp_path / "a", b"old")
    before = request(path, "before")
    wait_until(lambda: adapters.salt(before) is not None, 10, "the adapter to be read")
    salt = adapters.salt(before)
    write_adapter(tmp_path / "a", b"new and longer")
    assert adapters.salt(request(path, "after")) is None
    assert adapters.salt(before) == salt
    adapters.close()


def test_an_adapter_that_cannot_be_read_is_not_shared(tmp_path: Path) -> None:
    adapters = Adapters()
    assert adapters.salt(request(str(tmp_path / "nowhere"))) is None
    assert adapters.salt(request("org/adapter-on-a-hub")) is None
    os.makedirs(tmp_path / "empty")
    assert adapters.salt(request(str(tmp_path / "empty"))) is None
    adapters.close()
