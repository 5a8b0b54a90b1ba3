"""Values of settings: how each kind is read from text and shown as text that can be read again.

Every reader raises ValueError, whose text says what would be right.
"""

from __future__ import annotations

import grp
import ipaddress
import math
import os
import re
from collections.abc import Callable
from enum import Enum
from typing import NamedTuple, TypeVar

from kvd.types import Share
from kvd.wire.endpoints import check_socket_path, format_host_port, parse_host_port

#: Smallest pool that is any use, bytes.
MIN_POOL_BYTES = 1 << 20
LOG_LEVELS = ("debug", "info", "warning", "error")
#: What ``pool_dir`` may say instead of a directory. Directories are absolute once they are read.
POOL_AUTO, POOL_NONE = "auto", "none"

_UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_PERIODS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_MAX_PERIOD_S = 3650 * 86400

E = TypeVar("E", bound=Enum)


class HostPort(NamedTuple):
    """A listening address; ``host`` carries no brackets."""

    host: str
    port: int

    def __str__(self) -> str:
        return format_host_port(self.host, self.port)

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


class Populate(Enum):
    """When the pool's memory is taken from the system."""

    LAZY = "lazy"  # page by page, as it is used
    BACKGROUND = "background"  # by a thread, while the daemon serves already
    START = "start"  # all of it, before the daemon serves


class Admit(Enum):
    """Which chunks are written to disk."""

    ALWAYS = "always"  # all, as soon as they are stored
    REUSED = "reused"  # those that a lookup has found again


class Codec(Enum):
    """Whether records are made smaller."""

    NONE = "none"
    AUTO = "auto"  # where it is seen to be worth its time


# ---------------------------------------------------------------- sizes and times


def parse_size(text: str) -> int:
    """``512MiB``, ``8GiB``, ``1.5TiB`` or a number of bytes with ``B``, as bytes. Raises ValueError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(B|KiB|MiB|GiB|TiB)", text.strip())
    if not found:
        raise ValueError("write a size as a number and a unit, for example 512MiB or 8GiB")
    size = float(found[1]) * _UNITS[found[2]]
    if not size.is_integer() or size >= 1 << 60:
        raise ValueError("write a size that is a whole number of bytes and less than 1048576TiB")
    return int(size)


def format_size(size: int) -> str:
    """The shortest exact text that ``parse_size`` reads; for people, ``human_size`` is nicer."""
    for unit, factor in reversed(_UNITS.items()):
        if size % factor == 0 and size:
            return f"{size // factor}{unit}"
    return f"{size}B"


def human_size(size: int) -> str:
    """A size with three digits that count: ``1.46GiB``."""
    for unit, factor in reversed(_UNITS.items()):
        if size >= factor:
            return f"{size / factor:.3g}{unit}" if size / factor < 1000 else f"{size / factor:.0f}{unit}"
    return f"{size}B"


def read_pool(text: str) -> int:
    """The size of the pool, bytes."""
    size = parse_size(text)
    if size < MIN_POOL_BYTES:
        raise ValueError(f"too small, at least {format_size(MIN_POOL_BYTES)}")
    return size


def read_size_or_zero(text: str) -> int:
    """A size, or 0 without a unit."""
    return 0 if text.strip() == "0" else parse_size(text)


def read_seconds(least: float, most: float) -> Callable[[str], float]:
    """A reader of seconds in these bounds."""

    def read(text: str) -> float:
        wanted = f"write seconds from {least:g} to {most:g}, for example 5 or 0.5"
        seconds = _number(text.strip().removesuffix("s"), wanted)
        if not least <= seconds <= most:
            raise ValueError(wanted)
        return seconds

    return read


def read_period(text: str) -> float:
    """``90``, ``90s``, ``30m``, ``12h`` or ``7d``, as seconds."""
    wanted = "write a time such as 12h or 7d (s, m, h, d; at most 3650d), or 0 for never"
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd]?)", text.strip())
    seconds = float(found[1]) * _PERIODS[found[2] or "s"] if found else math.inf
    if seconds > _MAX_PERIOD_S:
        raise ValueError(wanted)
    return seconds


def format_period(seconds: float) -> str:
    """The shortest text that ``read_period`` reads."""
    for unit, factor in reversed(_PERIODS.items()):
        if seconds and seconds % factor == 0:
            return f"{seconds // factor:.0f}{unit}"
    return f"{seconds:g}"


def read_weight(text: str) -> float:
    """A number from 0 to 1000."""
    wanted = "write a number from 0 to 1000"
    weight = _number(text, wanted)
    if not 0 <= weight <= 1000:
        raise ValueError(wanted)
    return weight


def _number(text: str, wanted: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise ValueError(wanted) from None
    if not math.isfinite(number):
        raise ValueError(wanted)
    return number


# ---------------------------------------------------------------- places


def read_pool_dir(text: str) -> str:
    """``auto``, ``none`` or a directory, absolute."""
    if text in (POOL_AUTO, POOL_NONE):
        return text
    return _directory(text, "on a tmpfs or hugetlbfs mount such as /dev/shm, or write auto or none")


def read_spill_dir(text: str) -> str:
    """A directory, absolute."""
    if "," in text or ";" in text:
        raise ValueError("a directory with a comma or a semicolon in its name cannot be used")
    return _directory(text, "on a file system of an NVMe drive")


def _directory(text: str, where: str) -> str:
    if not os.path.isdir(text):
        raise ValueError(f"no such directory; make it first, {where}")
    if not os.access(text, os.W_OK | os.X_OK):
        raise ValueError("this user cannot write there; give a directory that it can write to")
    return os.path.abspath(text)


def read_socket(text: str) -> str:
    """The path of a Unix socket, absolute."""
    path = check_socket_path(os.path.abspath(text.removeprefix("unix:")))
    if os.path.isdir(path):
        raise ValueError(f"is a directory; give the path of a socket in it, for example {path}/kvd.sock")
    directory = os.path.dirname(path)
    if not os.path.isdir(directory):
        raise ValueError(f"there is no directory {directory}; make it first, or give another path")
    return path


def read_new_file(text: str) -> str:
    """The path of a file to be made, absolute."""
    path = os.path.abspath(text)
    directory = os.path.dirname(path)
    if os.path.isdir(path):
        raise ValueError(f"is a directory; give the name of a file in it, for example {path}/trace.jsonl")
    if not os.path.isdir(directory) or not os.access(directory, os.W_OK | os.X_OK):
        raise ValueError(f"this user cannot make a file in {directory}; give a file in a directory it can write to")
    return path


def read_address(text: str) -> HostPort:
    """``HOST:PORT``."""
    return HostPort(*parse_host_port(text))


# ---------------------------------------------------------------- words


def read_switch(value: str | bool) -> bool:
    """Yes or no, in the usual words."""
    if isinstance(value, bool):
        return value
    words = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    if value.lower() not in words:
        raise ValueError("write true or false")
    return words[value.lower()]


def read_choice(choices: type[E]) -> Callable[[str], E]:
    """A reader of one of the words of an enumeration."""

    def read(text: str) -> E:
        try:
            return choices(text)
        except ValueError:
            raise ValueError(f"write one of {', '.join(choice.value for choice in choices)}") from None

    return read


def read_group(text: str) -> str:
    """A group of this system."""
    try:
        grp.getgrnam(text)
    except KeyError:
        raise ValueError("no such group on this system; create it, or name one that exists") from None
    return text


def read_log_level(text: str) -> str:
    """One of ``LOG_LEVELS``."""
    if text.lower() not in LOG_LEVELS:
        raise ValueError(f"write one of {', '.join(LOG_LEVELS)}")
    return text.lower()


def read_share(text: str) -> Share:
    """``tenant=NAME:soft=SIZE,hard=SIZE`` or ``namespace=HEX:...``; one of the two sizes may be missing."""
    wanted = "write shares as tenant=NAME:soft=SIZE,hard=SIZE or namespace=ID:hard=SIZE"
    whose, _, bounds = text.strip().rpartition(":")
    kind, _, name = whose.partition("=")
    if kind not in ("tenant", "namespace") or not name:
        raise ValueError(wanted)
    sizes: dict[str, int] = {}
    for bound in bounds.split(","):
        which, _, size = bound.strip().partition("=")
        if which not in ("soft", "hard") or which in sizes:
            raise ValueError(wanted)
        sizes[which] = parse_size(size)
        if not sizes[which]:
            raise ValueError(f"a {which} share of nothing is none; leave it out, or give a size")
    soft, hard = sizes.get("soft"), sizes.get("hard")
    if soft is not None and hard is not None and soft > hard:
        raise ValueError("soft is larger than hard; soft is what is kept for it, hard what it never exceeds")
    if kind == "tenant":
        return Share(name, None, soft, hard)
    if not re.fullmatch(r"[0-9a-f]{64}", name):
        raise ValueError("a namespace id is 64 hexadecimal digits, see `kvd status --json`")
    return Share(None, bytes.fromhex(name), soft, hard)


def format_share(share: Share) -> str:
    """The text that ``read_share`` reads."""
    whose = f"tenant={share.tenant}" if share.namespace_id is None else f"namespace={share.namespace_id.hex()}"
    sizes = (("soft", share.soft_bytes), ("hard", share.hard_bytes))
    return whose + ":" + ",".join(f"{name}={format_size(size)}" for name, size in sizes if size is not None)
