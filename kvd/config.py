"""The daemon's settings: one frozen, validated object, and where each value came from.

A flag wins over an environment variable (``KVD_...``), which wins over the TOML file (``--config``), which wins over
the default. The three spell one name: ``--pool-dir``, ``KVD_POOL_DIR``, ``pool_dir``. Whatever is unknown or bad
stops the start with a ``BadSetting`` that names the key, the value, where it came from and what would be right.
"""

from __future__ import annotations

import difflib
import grp
import ipaddress
import math
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any, NamedTuple

from kvd.wire.endpoints import check_socket_path, default_socket_path, format_host_port, parse_host_port

ENV_PREFIX = "KVD_"
#: The environment's way to say ``--config``.
CONFIG_VARIABLE = "KVD_CONFIG"
#: Smallest pool that is any use, bytes.
MIN_POOL_BYTES = 1 << 20
#: The data plane listens this many ports above the control plane unless told otherwise.
DATA_PORT_STEP = 2
LOG_LEVELS = ("debug", "info", "warning", "error")

# A Kubernetes service named "kvd" puts these into the environment of every pod of its namespace; they are not ours.
_KUBERNETES = re.compile(r"KVD_(SERVICE_.*|PORT|PORT_.*)")
_UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


class BadSetting(Exception):
    """A setting that stops the start. The text names the key, the value, its source and what would be right."""

    def __init__(self, key: str, value: object, source: str, problem: str) -> None:
        super().__init__(f"{key} = {str(value)!r} ({source}): {problem}")
        self.key = key


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


DEFAULT_LISTEN = HostPort("127.0.0.1", 7440)
DEFAULT_HTTP = HostPort("127.0.0.1", 7441)
DEFAULT_DATA = HostPort("127.0.0.1", DEFAULT_LISTEN.port + DATA_PORT_STEP)


class Populate(Enum):
    """When the pool's memory is taken from the system."""

    LAZY = "lazy"  # page by page, as it is used
    BACKGROUND = "background"  # by a thread, while the daemon serves already
    START = "start"  # all of it, before the daemon serves


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


@dataclass(frozen=True)
class Settings:
    """What a daemon runs on. Sizes in bytes, times in seconds."""

    socket: str
    listen: HostPort = DEFAULT_LISTEN
    data: HostPort = DEFAULT_DATA
    http: HostPort = DEFAULT_HTTP
    pool_bytes: int = 1 << 30
    pool_dir: str | None = None
    huge_pages: bool = False
    populate: Populate = Populate.BACKGROUND
    group: str | None = None
    allow_remote: bool = False
    drain_timeout_s: float = 5.0
    quarantine_s: float = 5.0
    read_lease_s: float = 30.0
    log_level: str = "info"


def _key_of(field_name: str) -> str:
    return field_name.removesuffix("_bytes").removesuffix("_s")


_FIELDS = {_key_of(f.name): f.name for f in fields(Settings)}
#: Every setting by the name people type, in the order in which ``kvd config --show`` prints them.
KEYS = tuple(_FIELDS)


@dataclass(frozen=True)
class Loaded:
    """Settings, and for each of them the place that decided it."""

    settings: Settings
    sources: Mapping[str, str]

    def describe(self) -> list[tuple[str, str, str]]:
        """(key, value as it would be typed, source) of every setting, in order."""
        return [(key, self._shown(key), self.sources[key]) for key in KEYS]

    def reject(self, key: str, problem: str) -> BadSetting:
        """The error that says that the value of ``key`` will not do."""
        return BadSetting(key, self._shown(key), self.sources[key], problem)

    def _shown(self, key: str) -> str:
        return _show(getattr(self.settings, _FIELDS[key]))


@dataclass
class _Raw:
    """Values as found, before they are read, with where each was found. A later ``take`` wins."""

    values: dict[str, object] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)

    def take(self, key: str, value: object, source: str) -> None:
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise BadSetting(key, value, source, f"unknown setting; {hint}known are: {', '.join(KEYS)}")
        self.values[key] = value
        self.sources[key] = source


def load(flags: Mapping[str, str | bool | None], environ: Mapping[str, str], config_file: str | None) -> Loaded:
    """Puts the settings together. ``flags``: key to text, None = not given. Raises ``BadSetting``."""
    raw = _Raw()
    config_source = "flag --config" if config_file else f"environment {CONFIG_VARIABLE}"
    config_file = config_file or environ.get(CONFIG_VARIABLE)
    if config_file:
        for key, value in _read_file(config_file, config_source).items():
            raw.take(key, value, f"file {config_file}")
    for name, text in environ.items():
        if name.startswith(ENV_PREFIX) and name != CONFIG_VARIABLE and not _KUBERNETES.fullmatch(name) and text:
            raw.take(name.removeprefix(ENV_PREFIX).lower(), text, f"environment {name}")
    for key, flag in flags.items():
        if flag is not None:
            raw.take(key, flag, f"flag --{key.replace('_', '-')}")
    return _settle(raw, environ)


def _settle(raw: _Raw, environ: Mapping[str, str]) -> Loaded:
    values = {key: _read(key, value, raw.sources[key]) for key, value in raw.values.items()}
    sources = {key: raw.sources.get(key, "default") for key in KEYS}
    if "socket" not in values:
        values["socket"] = default_socket_path({k: v for k, v in environ.items() if k != "KVD_SOCKET"})
    if "data" not in values:
        listen: HostPort = values.get("listen", Settings.listen)
        values["data"] = HostPort(listen.host, listen.port + DATA_PORT_STEP if listen.port else 0)
        sources["data"] = f"default: {DATA_PORT_STEP} above listen"
    loaded = Loaded(Settings(**{_FIELDS[key]: value for key, value in values.items()}), sources)
    _check_together(loaded)
    return loaded


def _check_together(loaded: Loaded) -> None:
    settings = loaded.settings
    for key in ("listen", "data"):
        address: HostPort = getattr(settings, key)
        if not address.is_loopback and not settings.allow_remote:
            raise loaded.reject(
                key,
                "not a loopback address, and peers from other machines are not authenticated yet; "
                "use 127.0.0.1 or [::1], or say --allow-remote on a network where every host is trusted",
            )
    used: dict[HostPort, str] = {}
    for key in ("listen", "data", "http"):
        address = getattr(settings, key)
        if address.port > 65535:
            raise loaded.reject(key, "no such port; give --data HOST:PORT, or a lower port to --listen")
        if address.port and address in used:
            raise loaded.reject(key, f"the same address as {used[address]}; give each its own port")
        used[address] = key


# ---------------------------------------------------------------- reading one value


def _read_file(path: str, source: str) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise BadSetting("config", path, source, f"cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadSetting("config", path, source, f"is not TOML: {error}") from error


def _read(key: str, value: object, source: str) -> Any:
    if isinstance(value, bool) and key not in ("huge_pages", "allow_remote"):
        raise BadSetting(key, value, source, "needs a value, not true or false")
    try:
        return _READERS[key](value if isinstance(value, bool) else str(value))
    except ValueError as error:
        raise BadSetting(key, value, source, str(error)) from error


def _read_pool(text: str) -> int:
    size = parse_size(text)
    if size < MIN_POOL_BYTES:
        raise ValueError(f"too small, at least {format_size(MIN_POOL_BYTES)}")
    return size


def _read_directory(text: str) -> str:
    if not os.path.isdir(text):
        raise ValueError("no such directory; make it first, on a tmpfs or hugetlbfs mount such as /dev/shm")
    if not os.access(text, os.W_OK | os.X_OK):
        raise ValueError("this user cannot write there; give a directory that it can write to")
    return os.path.abspath(text)


def _read_socket(text: str) -> str:
    path = check_socket_path(os.path.abspath(text.removeprefix("unix:")))
    if os.path.isdir(path):
        raise ValueError(f"is a directory; give the path of a socket in it, for example {path}/kvd.sock")
    directory = os.path.dirname(path)
    if not os.path.isdir(directory):
        raise ValueError(f"there is no directory {directory}; make it first, or give another path")
    return path


def _read_switch(value: str | bool) -> bool:
    if isinstance(value, bool):
        return value
    words = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    if value.lower() not in words:
        raise ValueError("write true or false")
    return words[value.lower()]


def _read_seconds(least: float, most: float) -> Callable[[str], float]:
    def read(text: str) -> float:
        wanted = f"write seconds from {least:g} to {most:g}, for example 5 or 0.5"
        try:
            seconds = float(text.strip().removesuffix("s"))
        except ValueError:
            raise ValueError(wanted) from None
        if not math.isfinite(seconds) or not least <= seconds <= most:
            raise ValueError(wanted)
        return seconds

    return read


def _read_populate(text: str) -> Populate:
    try:
        return Populate(text)
    except ValueError:
        raise ValueError(f"write one of {', '.join(p.value for p in Populate)}") from None


def _read_group(text: str) -> str:
    try:
        grp.getgrnam(text)
    except KeyError:
        raise ValueError("no such group on this system; create it, or name one that exists") from None
    return text


def _read_log_level(text: str) -> str:
    if text.lower() not in LOG_LEVELS:
        raise ValueError(f"write one of {', '.join(LOG_LEVELS)}")
    return text.lower()


def _read_address(text: str) -> HostPort:
    return HostPort(*parse_host_port(text))


_READERS: dict[str, Callable[[Any], Any]] = {
    "socket": _read_socket,
    "listen": _read_address,
    "data": _read_address,
    "http": _read_address,
    "pool": _read_pool,
    "pool_dir": _read_directory,
    "huge_pages": _read_switch,
    "populate": _read_populate,
    "group": _read_group,
    "allow_remote": _read_switch,
    "drain_timeout": _read_seconds(0, 3600),
    "quarantine": _read_seconds(0, 3600),
    "read_lease": _read_seconds(0.1, 86400),
    "log_level": _read_log_level,
}


def _show(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Populate):
        return value.value
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, int):
        return format_size(value)
    return str(value)
