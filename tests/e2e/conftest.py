"""Models for the engine tests, made once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deploy.demo.models import make_model
from tests.e2e.engine import Engine


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``model(kind, seed=0)``: the directory of a tiny model, always called ``tiny``."""
    root = tmp_path_factory.mktemp("models")

    def make(kind: str, seed: int = 0) -> Path:
        return make_model(kind, root / f"{kind}-{seed}" / "tiny", seed=seed)

    return make


@pytest.fixture(scope="session")
def expected(model: Callable[..., Path]) -> Iterator[Callable[..., list[list[int]]]]:
    """``expected(prompts, max_tokens)``: what the llama answers, in float32, when there is no connector at all."""
    with Engine(model("llama"), without=True, dtype="float32") as plain:
        yield lambda prompts, max_tokens=8: [a.tokens for a in plain.generate(prompts, max_tokens=max_tokens)]
