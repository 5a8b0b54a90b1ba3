"""A daemon that has left something for the next one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.memory.lives import LARGE, Life


@pytest.fixture
def directory(tmp_path: Path) -> str:
    return str(tmp_path / "pool")


@pytest.fixture
def life(directory: str) -> Iterator[Life]:
    """A daemon with a READY and sealed chunk, its READY child, and a slot that is being written."""
    life = Life(directory, daemon_id=0xA11CE)
    first = life.grant()
    assert first is not None
    second = life.grant(parent=life.slots[first].entry.key)
    assert second is not None
    life.grant(LARGE)
    for at in (first, second):
        life.ready(at)
    life.seal(first)
    yield life
