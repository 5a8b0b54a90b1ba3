"""The daemon installed alone, as a user would: small, quick to start, and without an engine's libraries."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvd.wire.version import VERSION
from tests.wait import wait_until

ROOT = Path(__file__).resolve().parents[2]
MAX_INSTALLED_BYTES = 100_000_000
MAX_IDLE_BYTES = 100_000_000
INSTALL_TIMEOUT_S = 300
START_TIMEOUT_S = 30

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * INSTALL_TIMEOUT_S)]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a fresh environment that holds ``pip install .`` and nothing else, pip neither."""
    home = tmp_path_factory.mktemp("installed") / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True, timeout=INSTALL_TIMEOUT_S)
    install = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(home / "bin/python")]
    # From a copy of what belongs to the package: the build leaves files where it works.
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE", "kvd", "kvd_client"):
        subprocess.run(["cp", "-r", str(ROOT / name), str(source)], check=True, timeout=INSTALL_TIMEOUT_S)
    subprocess.run([*install, "install", "--quiet", str(source)], check=True, timeout=INSTALL_TIMEOUT_S)
    return home


def run(installed: Path, *command: str) -> str:
    """Output of a command of the environment, away from the repository."""
    result = subprocess.run(
        [str(installed / "bin" / command[0]), *command[1:]],
        cwd=installed,
        env=environment(installed),
        capture_output=True,
        text=True,
        timeout=START_TIMEOUT_S,
        check=True,
    )
    return result.stdout


def environment(installed: Path) -> dict[str, str]:
    """Nothing that would let the environment see the repository."""
    return {"PATH": f"{installed}/bin:/usr/bin:/bin", "HOME": str(installed)}


@contextmanager
def serving(installed: Path, directory: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The installed daemon, from the line that says that it serves."""
    output = directory / "output"
    with output.open("wb") as stdout:
        process = subprocess.Popen(
            [str(installed / "bin/kvd"), "serve", "--socket", str(directory / "kvd.sock"), "--pool", "64MiB"]
            + ["--pool-dir", "none"]
            + ["--listen", "127.0.0.1:0", "--http", "127.0.0.1:0"],
            cwd=installed,
            env=environment(installed),
            stdout=stdout,
        )
    try:
        wait_until(lambda: b"serving" in output.read_bytes(), START_TIMEOUT_S, "the installed daemon to serve")
        yield process
    finally:
        process.terminate()
        process.wait(START_TIMEOUT_S)


def installed_bytes(installed: Path) -> int:
    """What the environment takes on disk, the interpreter's own links aside."""
    return sum(
        os.lstat(os.path.join(directory, name)).st_size for directory, _, names in os.walk(installed) for name in names
    )


def test_daemon_installed_alone_is_small(installed: Path) -> None:
    assert installed_bytes(installed) < MAX_INSTALLED_BYTES


def test_installed_command_is_this_release(installed: Path) -> None:
    assert run(installed, "kvd", "version").split() == ["kvd", VERSION]


def test_installed_daemon_serves_idles_small_and_stops(installed: Path, tmp_path: Path) -> None:
    with serving(installed, tmp_path) as daemon:
        status = run(installed, "kvd", "status", "--endpoint", f"unix:{tmp_path}/kvd.sock")
        assert "serving" in status
        page = re.search(r"http://\S+", (tmp_path / "output").read_text())
        assert page is not None
        with urllib.request.urlopen(f"{page[0]}/readyz", timeout=START_TIMEOUT_S) as ready:
            assert ready.status == 200
        assert private_bytes(daemon.pid) < MAX_IDLE_BYTES
    assert daemon.returncode == 0


def private_bytes(pid: int) -> int:
    """Resident memory of a process beside the shared pool."""
    with open(f"/proc/{pid}/status") as lines:
        fields = dict(line.split(":", 1) for line in lines)
    return sum(int(fields[name].split()[0]) << 10 for name in ("RssAnon", "RssFile"))


def test_installed_daemon_needs_no_library_of_an_engine(installed: Path) -> None:
    code = "import kvd.cli, kvd.server, sys; print(*{'torch', 'cupy', 'numpy', 'vllm'} & set(sys.modules))"
    assert run(installed, "python", "-c", code).split() == []
