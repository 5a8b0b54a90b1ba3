"""The pool that most tests of the books use; each test that does ends in an audit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvd.types import Namespace
from tests.unit.ledger.harness import Pool


@pytest.fixture
def pool() -> Iterator[Pool]:
    """Room for 16 chunks of 4 KiB."""
    made = Pool(16)
    yield made
    made.audited()


@pytest.fixture
def session(pool: Pool) -> int:
    """A session of the tenant "default"."""
    return pool.session()


@pytest.fixture
def namespace(pool: Pool, session: int) -> Namespace:
    """A namespace with chunks of 4 KiB, open in ``session``."""
    return pool.namespace(session)
