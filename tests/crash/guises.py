"""What can lie in the place of a file: each takes the path of a file, and puts something else there."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

Guise = Callable[[Path], None]


def symlink(path: Path) -> None:
    """The file lies elsewhere, a link leads to it."""
    elsewhere = path.parent / f"{path.name}.elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def directory(path: Path) -> None:
    """A directory in the place of the file, with something in it."""
    path.unlink()
    path.mkdir()
    (path / "something").write_text("of somebody")


def foreign_file(path: Path) -> None:
    """A file of somebody else's making."""
    path.unlink()
    path.write_text("not what you think")
    path.chmod(0o600)


def pipe(path: Path) -> None:
    """Opening it would hang."""
    path.unlink()
    os.mkfifo(path, 0o600)


def bound_socket(path: Path) -> None:
    """It cannot be opened at all."""
    path.unlink()
    here = os.open(path.parent, os.O_RDONLY)
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"/proc/self/fd/{here}/{path.name}")
    finally:
        os.close(here)


def open_to_all(path: Path) -> None:
    """Anybody could have changed it."""
    path.chmod(0o666)


def of_another_user(path: Path) -> None:
    """Its owner is somebody else."""
    if os.geteuid():
        pytest.skip("only root can give a file away")
    os.chown(path, 12345, 12345)


def two_names(path: Path) -> None:
    """Somebody holds on to it under another name."""
    os.link(path, path.parent / f"{path.name}.too")


GUISES: tuple[Guise, ...] = (
    symlink, directory, foreign_file, pipe, bound_socket, open_to_all, of_another_user, two_names
)  # fmt: skip
