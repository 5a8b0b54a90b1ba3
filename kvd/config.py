"""The daemon's settings: one frozen, validated object, and where each value came from.

A flag wins over an environment variable (``KVD_...``), which wins over the TOML file (``--config``), which wins over
the default. The three spell one name: ``--pool-dir``, ``KVD_POOL_DIR``, ``pool_dir``. Whatever is unknown or bad
stops the start with a ``BadSetting`` that names the key, the value, where it came from and what would be right.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any

from kvd import values
from kvd.types import Share
from kvd.values import Admit, Codec, HostPort, Populate
from kvd.wire.endpoints import default_socket_path

ENV_PREFIX = "KVD_"
#: The environment's way to say ``--config``.
CONFIG_VARIABLE = "KVD_CONFIG"
#: The data plane listens this many ports above the control plane unless told otherwise.
DATA_PORT_STEP = 2
#: Smallest part of the disk tier in one directory that is any use, bytes.
MIN_DRIVE_BYTES = 16 << 20
#: Settings of which there may be several, and what stands between them in one text.
LISTS = {"spill_dir": ",", "shares": ";"}

# A Kubernetes service named "kvd" puts these into the environment of every pod of its namespace; they are not ours.
_KUBERNETES = re.compile(r"KVD_(SERVICE_.*|PORT|PORT_.*)")


class BadSetting(Exception):
    """A setting that stops the start. The text names the key, the value, its source and what would be right."""

    def __init__(self, key: str, value: object, source: str, problem: str) -> None:
        super().__init__(f"{key} = {str(value)!r} ({source}): {problem}")
        self.key = key


DEFAULT_LISTEN = HostPort("127.0.0.1", 7440)
DEFAULT_HTTP = HostPort("127.0.0.1", 7441)
DEFAULT_DATA = HostPort("127.0.0.1", DEFAULT_LISTEN.port + DATA_PORT_STEP)


@dataclass(frozen=True)
class Settings:
    """What a daemon runs on. Sizes in bytes, times in seconds."""

    socket: str
    listen: HostPort = DEFAULT_LISTEN
    data: HostPort = DEFAULT_DATA
    http: HostPort = DEFAULT_HTTP
    pool_bytes: int = 1 << 30
    pool_dir: str = values.POOL_AUTO
    huge_pages: bool = False
    populate: Populate = Populate.BACKGROUND
    group: str | None = None
    allow_remote: bool = False
    drain_timeout_s: float = 5.0
    quarantine_s: float = 5.0
    read_lease_s: float = 30.0
    spill_dirs: tuple[str, ...] = ()
    spill_bytes: int = 0
    spill_write_rate_bytes: int = 0
    spill_write_daily_bytes: int = 0
    spill_floor_bytes: int = 1 << 30
    spill_admit: Admit = Admit.ALWAYS
    spill_codec: Codec = Codec.NONE
    ttl_s: float = 0.0
    shares: tuple[Share, ...] = ()
    recompute_weight: float = 0.0
    record_trace: str | None = None
    log_level: str = "info"


def _key_of(field_name: str) -> str:
    return "spill_dir" if field_name == "spill_dirs" else field_name.removesuffix("_bytes").removesuffix("_s")


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
        return _show(key, getattr(self.settings, _FIELDS[key]))


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


def load(
    flags: Mapping[str, str | bool | Sequence[str] | None], environ: Mapping[str, str], config_file: str | None
) -> Loaded:
    """Puts the settings together. ``flags``: key to text or texts, None = not given. Raises ``BadSetting``."""
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
    read = {key: _read(key, value, raw.sources[key]) for key, value in raw.values.items()}
    sources = {key: raw.sources.get(key, "default") for key in KEYS}
    if "socket" not in read:
        read["socket"] = default_socket_path({k: v for k, v in environ.items() if k != "KVD_SOCKET"})
    if "data" not in read:
        listen: HostPort = read.get("listen", Settings.listen)
        read["data"] = HostPort(listen.host, listen.port + DATA_PORT_STEP if listen.port else 0)
        sources["data"] = f"default: {DATA_PORT_STEP} above listen"
    loaded = Loaded(Settings(**{_FIELDS[key]: value for key, value in read.items()}), sources)
    _check_together(loaded)
    return loaded


def _check_together(loaded: Loaded) -> None:
    _check_addresses(loaded)
    _check_spill(loaded)
    _check_shares(loaded)


def _check_addresses(loaded: Loaded) -> None:
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


def _check_spill(loaded: Loaded) -> None:
    settings = loaded.settings
    directories = settings.spill_dirs
    if directories and not settings.spill_bytes:
        raise loaded.reject("spill_dir", "it is not said how much may be written there; add --spill SIZE, say 200GiB")
    if settings.spill_bytes and not directories:
        raise loaded.reject("spill", "it is not said where; add --spill-dir DIR on the file system of an NVMe drive")
    if len({os.path.realpath(directory) for directory in directories}) < len(directories):
        raise loaded.reject("spill_dir", "the same directory twice; name each once")
    if directories and settings.spill_bytes < len(directories) * MIN_DRIVE_BYTES:
        least = values.format_size(MIN_DRIVE_BYTES)
        raise loaded.reject("spill", f"too small: it is split over the directories, and each needs at least {least}")


def _check_shares(loaded: Loaded) -> None:
    whose = [(share.tenant, share.namespace_id) for share in loaded.settings.shares]
    if len(set(whose)) < len(whose):
        raise loaded.reject("shares", "two for the same tenant or namespace; give each one")


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
        if key in LISTS:
            return tuple(_READERS[key](one) for one in _several(value, LISTS[key]))
        if isinstance(value, list | dict):
            raise ValueError("needs one value")
        return _READERS[key](value if isinstance(value, bool) else str(value))
    except ValueError as error:
        raise BadSetting(key, value, source, str(error)) from error


def _several(value: object, separator: str) -> list[str]:
    found = []
    for text in value if isinstance(value, list | tuple) else [value]:
        if not isinstance(text, str):
            raise ValueError("needs a text or a list of texts")
        found += [part.strip() for part in text.split(separator)]
    if not all(found):
        raise ValueError("something is missing in it")
    return found


_READERS: dict[str, Callable[[Any], Any]] = {
    "socket": values.read_socket,
    "listen": values.read_address,
    "data": values.read_address,
    "http": values.read_address,
    "pool": values.read_pool,
    "pool_dir": values.read_pool_dir,
    "huge_pages": values.read_switch,
    "populate": values.read_choice(Populate),
    "group": values.read_group,
    "allow_remote": values.read_switch,
    "drain_timeout": values.read_seconds(0, 3600),
    "quarantine": values.read_seconds(0, 3600),
    "read_lease": values.read_seconds(0.1, 86400),
    "spill_dir": values.read_spill_dir,
    "spill": values.read_size_or_zero,
    "spill_write_rate": values.read_size_or_zero,
    "spill_write_daily": values.read_size_or_zero,
    "spill_floor": values.read_size_or_zero,
    "spill_admit": values.read_choice(Admit),
    "spill_codec": values.read_choice(Codec),
    "ttl": values.read_period,
    "shares": values.read_share,
    "recompute_weight": values.read_weight,
    "record_trace": values.read_new_file,
    "log_level": values.read_log_level,
}


def _show(key: str, value: object) -> str:
    if value is None or value == ():
        return "-"
    if key == "ttl" and isinstance(value, float):
        return values.format_period(value)
    if isinstance(value, tuple) and key in LISTS:
        return LISTS[key].join(values.format_share(one) if isinstance(one, Share) else one for one in value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, int):
        return values.format_size(value) if value else "0"
    return str(value)
