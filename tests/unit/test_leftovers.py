"""The watch over what tests leave behind, itself watched: a run of one careless test, in a process of its own."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.daemon import clean_environment

CARELESS = """
import os, subprocess, sys, tempfile

def test_that_tidies_nothing(tmp_path):
    os.mkdir(f"/dev/shm/kvd-careless-{os.getpid()}")
    # The middle process ends at once, so that its child has no parent any more.
    sleeper = f"import subprocess, sys; subprocess.Popen([{sys.executable!r}, '-c', 'import time; time.sleep(600)'])"
    subprocess.run([sys.executable, "-c", sleeper], check=True)
    tempfile.mkdtemp(prefix="kvd-careless-")
"""

TIDY = """
import shutil, subprocess, sys, tempfile

def test_that_tidies():
    subprocess.run([sys.executable, "-c", ""], check=True)
    shutil.rmtree(tempfile.mkdtemp(prefix="kvd-tidy-"))
"""

# The watch is the one of this repository, with less patience.
CONFTEST = "from tests.conftest import *\nimport tests.conftest\ntests.conftest.GRACE_S = 0.2\n"


def run(test: str, directory: Path) -> tuple[int, str]:
    """Exit status and output of pytest with ``test`` alone."""
    (directory / "conftest.py").write_text(CONFTEST)
    (directory / "test_it.py").write_text(test)
    (directory / "pytest.ini").write_text("[pytest]\n")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib", str(directory)],
        env=clean_environment(),
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=50,
    )
    return result.returncode, result.stdout + result.stderr


def test_a_run_that_leaves_something_behind_fails_and_says_what(tmp_path: Path) -> None:
    code, output = run(CARELESS, tmp_path)
    directory = re.search(r"directory (\S*kvd-careless-\S+) is left", output)
    process = re.search(r"process (\d+) is left: .*time.sleep", output)
    pool = re.search(r"pool (/dev/shm/kvd-careless-\S+) is left", output)
    assert directory and process and pool, output
    shutil.rmtree(directory[1])
    shutil.rmtree(pool[1])
    assert "1 passed" in output
    assert code == 1
    assert not _lives(int(process[1]))


def test_a_run_that_leaves_nothing_behind_passes(tmp_path: Path) -> None:
    code, output = run(TIDY, tmp_path)
    assert code == 0, output
    assert "left behind" not in output


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
