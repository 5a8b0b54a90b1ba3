"""The locks that prove, across the daemon's lives, that a process may still be writing. The kernel is the witness."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvd.memory.files import Unusable
from kvd.memory.holders import Holders
from kvd.wire.lifeline import lock_offset
from tests.wait import wait_until

FIRST, SECOND = (1 << 64) - 1, 4  # the ends of what a daemon id can be


@pytest.fixture
def holders(tmp_path: Path) -> Iterator[Holders]:
    holders = Holders.create(str(tmp_path / "holders"))
    yield holders
    holders.close()


IDLE = "import sys; print(flush=True); sys.stdin.read()"


def process(*descriptors: int, script: str = IDLE) -> subprocess.Popen[str]:
    """A process that has the descriptors and does nothing with them."""
    child = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=descriptors, text=True
    )
    assert child.stdout is not None
    child.stdout.readline()
    return child


def end(child: subprocess.Popen[str]) -> None:
    child.kill()
    child.communicate(timeout=10)


def test_a_life_is_gone_when_the_last_process_is_that_has_its_descriptor(holders: Holders, tmp_path: Path) -> None:
    assert holders.gone(FIRST) and not holders.anybody()
    descriptor = holders.hand_out(FIRST)
    children = [process(descriptor), process(descriptor)]
    try:
        os.close(descriptor)
        later = Holders.open(str(tmp_path / "holders"))
        for one in (holders, later):
            assert not one.gone(FIRST) and one.anybody() and one.gone(SECOND)
        end(children[0])
        assert not later.gone(FIRST)
        end(children[1])
        wait_until(lambda: later.gone(FIRST), what="the kernel to drop the lock")
        assert not holders.anybody()
        later.close()
    finally:
        for child in children:
            end(child)


def test_what_a_process_has_forked_holds_as_well(holders: Holders) -> None:
    descriptor = holders.hand_out(FIRST)
    script = "import os, sys\nif os.fork() == 0:\n    sys.stdin.read()\n    os._exit(0)\nprint(flush=True); os._exit(0)"
    child = process(descriptor, script=script)
    os.close(descriptor)
    assert child.wait(10) == 0
    assert not holders.gone(FIRST)
    child.communicate("", timeout=10)
    wait_until(lambda: holders.gone(FIRST), what="the grandchild to end")


def test_lives_are_told_apart_and_the_daemon_itself_holds_nothing(holders: Holders) -> None:
    first, second = holders.hand_out(FIRST), holders.hand_out(SECOND)
    os.close(first)
    assert holders.gone(FIRST) and not holders.gone(SECOND) and holders.anybody()
    another = holders.hand_out(SECOND)
    os.close(second)
    assert not holders.gone(SECOND)
    os.close(another)
    assert not holders.anybody()
    assert lock_offset(FIRST) != lock_offset(SECOND) and lock_offset(FIRST) < 1 << 62


def test_a_descriptor_cannot_be_used_to_change_anything(holders: Holders) -> None:
    descriptor = holders.hand_out(FIRST)
    assert not os.get_inheritable(descriptor)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.write(descriptor, b"x")
    os.close(descriptor)


def test_a_file_that_was_replaced_proves_nothing(holders: Holders, tmp_path: Path) -> None:
    os.rename(tmp_path / "holders", tmp_path / "old")
    other = Holders.create(str(tmp_path / "holders"))
    with pytest.raises(FileNotFoundError):
        holders.hand_out(FIRST)
    other.close()
    with pytest.raises(Unusable, match="cannot be opened"):
        Holders.open(str(tmp_path / "nowhere"))
