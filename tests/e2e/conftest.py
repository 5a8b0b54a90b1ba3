"""Models for the engine tests, made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from deploy.demo.models import make_model


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``model(kind, seed=0)``: the directory of a tiny model, always called ``tiny``."""
    root = tmp_path_factory.mktemp("models")

    def make(kind: str, seed: int = 0) -> Path:
        return make_model(kind, root / f"{kind}-{seed}" / "tiny", seed=seed)

    return make
