"""Checks of the settings against this machine, made before anything is started: there must be room for the pool."""

from __future__ import annotations

from kvd.config import Loaded, format_size, human_size
from kvd.memory.backing import free_bytes, is_memory_filesystem
from kvd.memory.host import Available, available_memory, free_huge_pages


def check(loaded: Loaded) -> None:
    """Raises ``BadSetting`` when the pool does not fit, or its directory is not in memory."""
    settings = loaded.settings
    if settings.pool_dir is not None and not is_memory_filesystem(settings.pool_dir):
        raise loaded.reject("pool_dir", "lies on a disk; give a directory on a tmpfs or hugetlbfs mount, say /dev/shm")
    available = _available(settings.pool_dir, settings.huge_pages, settings.pool_bytes)
    if settings.pool_bytes > available.size:
        raise loaded.reject(
            "pool",
            f"larger than the {human_size(available.size)} {available.limit}; give less, "
            f"for example --pool {_suggestion(available.size)}",
        )


def _available(pool_dir: str | None, huge_pages: bool, wanted: int) -> Available:
    memory = available_memory()
    if pool_dir is not None:
        return min(memory, Available(free_bytes(pool_dir), f"free in {pool_dir}"))
    pages, page_bytes = free_huge_pages()
    if huge_pages and pages * page_bytes >= wanted:
        return Available(pages * page_bytes, "free in the hugetlb pool")  # set aside: not counted as available
    return memory


def _suggestion(available: int) -> str:
    """About half, as a round number."""
    step = 1 << 30 if available >= 4 << 30 else 1 << 20
    return format_size(max(available // 2 // step * step, 1 << 20))
