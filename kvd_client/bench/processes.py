"""Servers of peers: started with a log, waited for, ended by their process ids."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 30.0
LOOK_S = 0.05
#: Lines of a log that are shown when its process has failed.
LOG_LINES = 3


class Process:
    """``command``, its output in a file of ``directory``, in which it runs. ``environment`` is added to this process's.
    Raises OSError."""

    def __init__(self, command: Sequence[str], directory: str, environment: Mapping[str, str] | None = None) -> None:
        self._name = Path(command[0]).name
        self._log = Path(directory) / f"{self._name}.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=directory,
                env={**os.environ, **(environment or {})},
            )
        self.pid = self._process.pid

    def wait(self, ready: Callable[[], bool]) -> None:
        """Waits until it is ready. Raises RuntimeError, with the end of its log, when it is not going to be."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while not ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                said = " | ".join(self._log.read_text(errors="replace").strip().splitlines()[-LOG_LINES:])
                raise RuntimeError(f"{self._name} did not start: {said}")
            time.sleep(LOOK_S)

    def close(self) -> None:
        """Ends it."""
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def listens(port: int) -> bool:
    """Whether somebody listens on that port of 127.0.0.1."""
    try:
        socket.create_connection(("127.0.0.1", port), 1.0).close()
    except OSError:
        return False
    return True


def python_of(root: Path, name: str) -> str:
    """The Python of a peer's own environment. Raises RuntimeError when it is not installed."""
    path = root / ".venv-peers" / name / "bin" / "python"
    if not path.exists():
        raise RuntimeError(f"not installed: run bench/install.sh {name}")
    return str(path)
