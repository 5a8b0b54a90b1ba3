"""What a daemon remembers beside the chunks themselves: pins, what was dropped, times of use, what was written today.

A small file in every place that outlives the daemon: the directory of a named pool, and every spill directory. The
youngest that can be read counts.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvd.failpoints import reach

log = logging.getLogger(__name__)

#: Of the file's format; another one is not read.
VERSION = 1
#: A longer file is not ours.
_MAX_BYTES = 4 << 20


@dataclass
class State:
    """``pins`` and ``uses`` are what the store saves (``on_pins``, ``save_times``); ``dropped``: by namespace, the
    sequence up to which its records do not count; ``day``: the account of what was written today; ``wall``: when all
    that was so, by the wall clock."""

    pins: list[Any] = field(default_factory=list)
    uses: list[Any] = field(default_factory=list)
    dropped: Mapping[bytes, int] = field(default_factory=dict)
    day: str = ""
    wall: float = 0.0


class StateFiles:
    """The files of the state at ``paths``. Each is read and written by a thread of its own: a disk may hang.

    Made and called from one thread at a time.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = tuple(paths)
        self._busy: dict[str, threading.Thread] = {}

    def load(self, timeout_s: float) -> State:
        """The youngest state that can be read in time; an empty one when there is none. What cannot is logged."""
        found: list[State] = []

        def read(path: str) -> None:
            state = _load(path)
            if state is not None:
                found.append(state)

        self._each(read, timeout_s)
        return max(list(found), key=lambda state: state.wall, default=State())

    def save(self, state: State, timeout_s: float) -> bool:
        """Writes ``state`` to every path whose directory exists, each at once or not at all; whether none failed."""
        text = json.dumps(
            {
                "version": VERSION,
                "wall": state.wall,
                "pins": state.pins,
                "uses": state.uses,
                "dropped": {namespace.hex(): sequence for namespace, sequence in state.dropped.items()},
                "day": state.day,
            }
        )
        content = f"{_checksum(text)}\n{text}\n".encode()
        failed: list[str] = []

        def write(path: str) -> None:
            try:
                if os.path.isdir(os.path.dirname(path)):
                    _replace(path, content)
            except OSError as error:
                failed.append(path)
                log.warning("%s cannot be written: %s", path, error.strerror)

        return self._each(write, timeout_s) and not failed

    def _each(self, work: Callable[[str], None], timeout_s: float) -> bool:
        """Does ``work`` for every path but those where the last one has not ended yet; whether all ended in time."""
        deadline = time.monotonic() + timeout_s
        late = {path for path, thread in self._busy.items() if thread.is_alive()}
        for path in self._paths:
            if path not in late:
                self._busy[path] = thread = threading.Thread(target=work, args=(path,), name="kvd-state", daemon=True)
                thread.start()
        for path, thread in self._busy.items():
            if path not in late:
                thread.join(max(0.0, deadline - time.monotonic()))
                if thread.is_alive():
                    late.add(path)
                    log.warning("%s does not answer", path)
        return not late


def _replace(path: str, content: bytes) -> None:
    new = f"{path}.new"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(new)
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with open(fd, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    reach("state.replace.before")
    os.replace(new, path)
    reach("state.replace.after")


def _load(path: str) -> State | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as error:
        log.warning("%s cannot be read: %s", path, error.strerror)
        return None
    with open(fd, "rb") as file:
        content = file.read(_MAX_BYTES)
    try:
        checksum, text = content.decode().split("\n")[:2]
        if checksum != _checksum(text):
            raise ValueError("its checksum is wrong")
        return _parse(json.loads(text))
    except (ValueError, RecursionError) as error:
        log.warning("%s is not used: %s", path, error)
        return None


def _parse(said: Any) -> State:
    match said:
        case {
            "version": int(version),
            "wall": int() | float() as wall,
            "pins": list(pins),
            "uses": list(uses),
            "dropped": dict(dropped),
            "day": str(day),
        } if version == VERSION:
            sequences = {bytes.fromhex(key): value for key, value in dropped.items() if isinstance(value, int)}
            return State(pins, uses, sequences, day, float(wall))
    raise ValueError("it is of another version")


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
