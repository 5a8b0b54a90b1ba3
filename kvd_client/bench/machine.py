"""What figures were measured on: the facts that they depend on."""

from __future__ import annotations

import os
import platform


def machine() -> list[str]:
    """One fact a line: processor, cores, memory, kernel, Python, and how busy it was when this was asked."""
    cpu = _field("/proc/cpuinfo", "model name") or platform.machine()
    memory_kib = _field("/proc/meminfo", "MemTotal").split()
    busy = ", ".join(f"{load:.1f}" for load in os.getloadavg())
    return [
        f"{os.cpu_count()} x {cpu}, {int(memory_kib[0]) >> 20} GiB" if memory_kib else f"{os.cpu_count()} x {cpu}",
        f"Linux {platform.release()}, Python {platform.python_version()}",
        f"load average at the end {busy}",
    ]


def _field(path: str, name: str) -> str:
    with open(path) as file:
        return next((line.partition(":")[2].strip() for line in file if line.startswith(name)), "")
