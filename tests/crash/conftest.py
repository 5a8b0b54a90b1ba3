"""A house for all the tests of a file: to build and fill one for each would take longer than the tests themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.crash.crew import Crew, furnished
from tests.crash.house import House


class Estate:
    """The house, and the people in it, made anew when a test has not ended well."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._stack = ExitStack()
        self._parts: tuple[House, Crew] | None = None
        #: Whether the house can be used by the next test. Each begins with False, and sets it at its end.
        self.sound = False

    def parts(self) -> tuple[House, Crew]:
        """The house, its daemon not running and everything that is kept on the disk as well."""
        if not self.sound or self._parts is None:
            self.close()
            house, crew = self._parts = self._stack.enter_context(furnished(self._name))
            house.check(crew.client)
            assert house.daemon.stop() == 0
        self.sound = False
        return self._parts

    def close(self) -> None:
        """Leaves nothing behind."""
        self._stack.close()


@pytest.fixture(scope="module")
def estate(request: pytest.FixtureRequest) -> Iterator[Estate]:
    """Closed at the end, whatever happens."""
    found = Estate(str(request.module.__name__))
    try:
        yield found
    finally:
        found.close()
