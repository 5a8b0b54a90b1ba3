"""How much memory there is to be had: the smaller of what the system has free and what the cgroup allows."""

from __future__ import annotations

import os
from typing import NamedTuple


class Available(NamedTuple):
    """``size`` bytes can be had; ``limit`` says what sets that bound, for people."""

    size: int
    limit: str


def available_memory(proc: str = "/proc", cgroups: str = "/sys/fs/cgroup") -> Available:
    """What a new pool may take at most, bytes. The two paths are there for tests."""
    bounds = [Available(_meminfo(proc)["MemAvailable"], "of memory available on this machine")]
    bounds += _cgroup_bounds(proc, cgroups)
    return min(bounds)


def free_huge_pages(
    page_bytes: int | None = None, proc: str = "/proc", pools: str = "/sys/kernel/mm/hugepages"
) -> tuple[int, int]:
    """(number of huge pages that are free and not set aside, bytes of each); (0, 0) where there are none.

    Of the system's default size, or of ``page_bytes``.
    """
    page_bytes = page_bytes or _meminfo(proc).get("Hugepagesize", 0)
    pool = os.path.join(pools, f"hugepages-{page_bytes >> 10}kB")
    free, reserved = _number(os.path.join(pool, "free_hugepages")), _number(os.path.join(pool, "resv_hugepages"))
    return (0, 0) if free is None or reserved is None else (max(free - reserved, 0), page_bytes)


def shmem_huge_policy(path: str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled") -> str:
    """What the kernel does for huge pages in anonymous shared memory: ``never``, ``advise``, ``always``, ..."""
    try:
        with open(path) as file:
            policy = file.read().partition("[")[2].partition("]")[0] or "never"
    except OSError:
        return "never"
    return {"deny": "never", "force": "always"}.get(policy, policy)


def tmpfs_huge_policy(directory: str, proc: str = "/proc") -> str:
    """What the tmpfs that holds ``directory`` was mounted to do for huge pages, in the same words."""
    try:
        device = os.stat(directory).st_dev
        with open(os.path.join(proc, "self/mountinfo")) as file:
            mounts = [line.split() for line in file]
    except OSError:
        return "never"
    number = f"{os.major(device)}:{os.minor(device)}"
    options = [option for mount in mounts if mount[2] == number for option in mount[-1].split(",")]
    return next((option.removeprefix("huge=") for option in options if option.startswith("huge=")), "never")


def _meminfo(proc: str) -> dict[str, int]:
    values = {}
    with open(os.path.join(proc, "meminfo")) as file:
        for line in file:
            name, _, rest = line.partition(":")
            number, _, unit = rest.strip().partition(" ")
            values[name] = int(number) * (1024 if unit == "kB" else 1)
    return values


def _cgroup_bounds(proc: str, cgroups: str) -> list[Available]:
    """What is left under the memory limit of this process's cgroup and of all those above it."""
    bounds = []
    for directory, limit_file, used_file in _cgroup_directories(proc, cgroups):
        limit, used = _number(os.path.join(directory, limit_file)), _number(os.path.join(directory, used_file))
        if limit is not None and used is not None and limit < 1 << 60:
            # The page cache counts as used but gives way to a pool.
            cache = _stat(os.path.join(directory, "memory.stat")).get("inactive_file", 0)
            bounds.append(Available(max(limit - used + cache, 0), f"left under the memory limit of cgroup {directory}"))
    return bounds


def _cgroup_directories(proc: str, cgroups: str) -> list[tuple[str, str, str]]:
    directories = []
    try:
        with open(os.path.join(proc, "self/cgroup")) as file:
            lines = file.read().splitlines()
    except OSError:
        return []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, files = cgroups, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            root, files = os.path.join(cgroups, "memory"), ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        # Inside a container the path may name the host's tree: what is not there is skipped, the root is not.
        parts = [part for part in path.split("/") if part and part != ".."]
        directories += [(os.path.join(root, *parts[:depth]), *files) for depth in range(len(parts) + 1)]
    return directories


def _number(path: str) -> int | None:
    try:
        with open(path) as file:
            text = file.read().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _stat(path: str) -> dict[str, int]:
    try:
        with open(path) as file:
            pairs = [line.split() for line in file]
    except OSError:
        return {}
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}
