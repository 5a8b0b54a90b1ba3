"""The demo is what strangers see first."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.daemon import ROOT, clean_environment

TIMEOUT_S = 500


@pytest.mark.engine
def test_demo_shows_another_replica_loading_what_the_first_has_computed() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "deploy.demo.run"],
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    rows = re.findall(r"^  ([AB]) (cold|warm).*? (\d+) +(\d+) \(.*?( yes| NO)?$", result.stdout, re.MULTILINE)
    assert [row[:2] for row in rows] == [("A", "cold"), ("A", "warm"), ("B", "warm")]
    assert [int(row[3]) > 0 for row in rows] == [False, True, True]
    assert [row[4].strip() for row in rows] == ["", "yes", "yes"]
