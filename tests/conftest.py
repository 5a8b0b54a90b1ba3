"""For every test: deadlines, and a last look at what the run leaves behind."""

from __future__ import annotations

import pytest
from hypothesis import Phase, settings

from tests.leftovers import Leftovers

#: A real engine takes long to start; tests that need more say so themselves.
ENGINE_DEADLINE_S = 600

#: How long processes that were told to end may take for it when the last test is over.
GRACE_S = 10.0

# A failure says at once what it is: looking for a smaller one can take minutes, and then only the deadline is seen.
settings.register_profile("kvd", phases=(Phase.explicit, Phase.reuse, Phase.generate), print_blob=True)
# For whoever hunts one: --hypothesis-profile=shrink --timeout=0.
settings.register_profile("shrink", print_blob=True)
settings.load_profile("kvd")

_LEFTOVERS = pytest.StashKey[Leftovers]()
_COMPLAINTS = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    """Begins to watch before anything is started."""
    config.stash[_LEFTOVERS] = Leftovers()
    config.stash[_COMPLAINTS] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Gives tests with engines their deadline."""
    for item in items:
        if item.get_closest_marker("engine") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(ENGINE_DEADLINE_S))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fails a run that leaves processes or directories behind; the processes are ended all the same."""
    leftovers, complaints = session.config.stash[_LEFTOVERS], session.config.stash[_COMPLAINTS]
    processes = leftovers.after(GRACE_S)
    complaints += [f"process {process.pid} is left: {process.command}" for process in processes]
    complaints += [f"directory {directory} is left" for directory in leftovers.directories()]
    if not hasattr(session.config, "workerinput"):  # workers of a parallel run end while others still run
        complaints += [f"pool {pool} is left" for pool in leftovers.pools()]
    leftovers.end(processes)
    if complaints and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Says what was left."""
    if complaints := config.stash[_COMPLAINTS]:
        terminalreporter.section("left behind by the tests", sep="=", red=True, bold=True)
        for complaint in complaints:
            terminalreporter.line(complaint, red=True)
