"""CPU time of this process and of others, while parts are measured."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence

from kvd_client.bench.figures import GIB, Figure, single

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def cpu_s(pids: Sequence[int]) -> float:
    """Seconds of CPU that processes have used so far, all together. Raises OSError when one is gone."""
    total = 0
    for pid in pids:
        with open(f"/proc/{pid}/stat") as stat:
            fields = stat.read().rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total / _TICKS_PER_S


class Meter:
    """What parts cost: CPU of this process and of ``pids``, per GiB that was moved."""

    def __init__(self, pids: Sequence[int]) -> None:
        self._pids = pids
        self._used: dict[str, list[float]] = {}

    def metered(self, name: str, part: Callable[[], float], moved_bytes: int) -> Callable[[], float]:
        """``part``, which moves ``moved_bytes``, with its cost added up under ``name``."""
        used = self._used.setdefault(name, [0.0, 0.0, 0.0])

        def run() -> float:
            own, theirs = time.process_time(), cpu_s(self._pids)
            sample = part()
            used[0] += time.process_time() - own
            used[1] += cpu_s(self._pids) - theirs
            used[2] += moved_bytes / GIB
            return sample

        return run

    def figures(self, other: str = "daemon") -> list[Figure]:
        """CPU seconds per GiB of every part, of this process (client) and of the other ones."""
        return [
            single(f"{name}: CPU of the {who}", "s/GiB", [used[place] / used[2]])
            for name, used in self._used.items()
            for place, who in enumerate(("client", other))
        ]
