"""Checks of the settings against this machine, made before anything is started: there must be room for the pool."""

from __future__ import annotations

from kvd.config import Loaded, format_size, human_size
from kvd.memory.backing import available_bytes, is_memory_filesystem


def check(loaded: Loaded) -> None:
    """Raises ``BadSetting`` when the pool does not fit, or its directory is not in memory."""
    settings = loaded.settings
    if settings.pool_dir is not None and not is_memory_filesystem(settings.pool_dir):
        raise loaded.reject("pool_dir", "lies on a disk; give a directory on a tmpfs or hugetlbfs mount, say /dev/shm")
    available = available_bytes(settings.pool_dir, settings.huge_pages, settings.pool_bytes)
    if settings.pool_bytes > available.size:
        raise loaded.reject(
            "pool",
            f"larger than the {human_size(available.size)} {available.limit}; give less, "
            f"for example --pool {_suggestion(available.size)}",
        )


def _suggestion(available: int) -> str:
    """About half, as a round number."""
    step = 1 << 30 if available >= 4 << 30 else 1 << 20
    return format_size(max(available // 2 // step * step, 1 << 20))
