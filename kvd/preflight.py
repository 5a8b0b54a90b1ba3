"""Checks of the settings against this machine, made before anything is started: pool and disk tier need their room."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import stat

from kvd.config import Loaded, Settings
from kvd.memory.backing import available_bytes, is_memory_filesystem
from kvd.memory.host import Available
from kvd.spill.directory import NAME as SPILL_NAME
from kvd.values import POOL_AUTO, POOL_NONE, format_size, human_size

log = logging.getLogger(__name__)

#: Where ``pool_dir = auto`` puts the pool.
SHARED_MEMORY = "/dev/shm"
#: Beside a pool in a directory lie its tables: at least this part of it.
_TABLES_PART = 512


def check(loaded: Loaded) -> None:
    """Raises ``BadSetting`` when the pool does not fit or lies on a disk, or when the disk tier has no room at all.

    What can be lived with is logged.
    """
    settings = loaded.settings
    if settings.pool_dir not in (POOL_AUTO, POOL_NONE) and not is_memory_filesystem(settings.pool_dir):
        raise loaded.reject("pool_dir", "lies on a disk; give a directory on a tmpfs or hugetlbfs mount, say /dev/shm")
    available = _room_for_pool(settings, pool_directory(settings)[0])
    if settings.pool_bytes > available.size:
        raise loaded.reject(
            "pool",
            f"larger than the {human_size(available.size)} {available.limit}; give less, "
            f"for example --pool {_suggestion(available.size)}",
        )
    for directory in settings.spill_dirs:
        _check_drive(loaded, directory)


# ---------------------------------------------------------------- the pool


def pool_directory(settings: Settings) -> tuple[str | None, str]:
    """The directory of the pool's files, None for an anonymous pool; and why a restart will start cold, if it will.

    With ``auto`` the directory is one of this user and this socket. It is not made here: ``make_private`` does.
    """
    if settings.pool_dir == POOL_NONE:
        return None, "a restart starts cold: the pool is anonymous memory (pool_dir = none)"
    if settings.pool_dir != POOL_AUTO:
        return settings.pool_dir, ""
    if settings.huge_pages:
        problem = "huge pages are asked for; a hugetlbfs mount in --pool-dir would give both"
    else:
        directory = own_pool_directory(settings.socket)
        problem = _problem_with(directory, settings.pool_bytes)
        if not problem:
            return directory, ""
    return None, f"a restart starts cold: the pool is anonymous memory, because {problem}"


def own_pool_directory(socket: str) -> str:
    """Where the pool of this user's daemon on ``socket`` lies with ``auto``."""
    name = hashlib.sha256(os.path.realpath(socket).encode()).hexdigest()[:16]
    return os.path.join(SHARED_MEMORY, f"kvd-{os.getuid()}", name)


def make_private(directory: str) -> None:
    """Makes ``directory`` and the one above it for this user alone. Raises OSError when somebody else could get in."""
    for path in (os.path.dirname(directory), directory):
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)
        if not _is_private(path):
            raise PermissionError(1, f"others can write to {path}, or it is not this user's", path)


def _is_private(path: str) -> bool:
    found = os.lstat(path)
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022


def _problem_with(directory: str, pool_bytes: int) -> str:
    """Why the pool cannot lie there; "" = it can."""
    if not os.path.isdir(SHARED_MEMORY) or not is_memory_filesystem(SHARED_MEMORY):
        return f"{SHARED_MEMORY} is no tmpfs here"
    existing = SHARED_MEMORY
    for path in (os.path.dirname(directory), directory):
        if os.path.lexists(path):
            if not _is_private(path):
                return f"others can write to {path}, or it is not this user's"
            existing = path
    if not os.access(existing, os.W_OK | os.X_OK):
        return f"this user cannot write to {existing}"
    found = os.statvfs(SHARED_MEMORY)
    room = found.f_bavail * found.f_frsize + _held_bytes(directory)
    if pool_bytes + pool_bytes // _TABLES_PART > room:
        return f"{SHARED_MEMORY} has room for {human_size(room)} only; make it larger, or name a tmpfs in --pool-dir"
    return ""


def _room_for_pool(settings: Settings, directory: str | None) -> Available:
    """What a pool in ``directory`` may take. The pool of a former life there is taken over, or removed first."""
    existing = directory if directory is None or os.path.isdir(directory) else SHARED_MEMORY
    available = available_bytes(existing, settings.huge_pages, settings.pool_bytes)
    held = 0 if directory is None else _held_bytes(directory)
    return available._replace(size=available.size + held)


def _held_bytes(directory: str) -> int:
    """Memory behind the pool's files in ``directory``."""
    held = 0
    with contextlib.suppress(FileNotFoundError), os.scandir(directory) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                if entry.is_file(follow_symlinks=False) and entry.name.startswith("kvd-"):
                    held += entry.stat(follow_symlinks=False).st_blocks * 512
    return held


def _suggestion(available: int) -> str:
    """About half, as a round number."""
    step = 1 << 30 if available >= 4 << 30 else 1 << 20
    return format_size(max(available // 2 // step * step, 1 << 20))


# ---------------------------------------------------------------- the disk tier


def _check_drive(loaded: Loaded, directory: str) -> None:
    settings = loaded.settings
    if is_memory_filesystem(directory):
        log.warning(
            "spill_dir: %s lies in memory: what is spilled there takes as much memory as in the pool, and counts "
            "against the same limit; this is for trying out only",
            directory,
        )
    part = settings.spill_bytes // len(settings.spill_dirs)
    found = os.statvfs(directory)
    free = found.f_bavail * found.f_frsize
    usable = max(free - settings.spill_floor_bytes, 0) + _spilled_bytes(os.path.join(directory, SPILL_NAME))
    if not usable:
        raise loaded.reject(
            "spill_dir",
            f"{directory} has {human_size(free)} free, and spill_floor keeps {human_size(settings.spill_floor_bytes)} "
            "of it free: there is no room; make some, or give a directory on another file system",
        )
    if usable < part:
        log.warning(
            "spill_dir: %s has room for %s of its %s: no more is used, %s stay free",
            directory,
            human_size(usable),
            human_size(part),
            human_size(settings.spill_floor_bytes),
        )


def _spilled_bytes(directory: str) -> int:
    """What an earlier daemon has written to ``directory``: it is taken over, or makes room."""
    spilled = 0
    for parent, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                spilled += os.lstat(os.path.join(parent, name)).st_blocks * 512
    return spilled
