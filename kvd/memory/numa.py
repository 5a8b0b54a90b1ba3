"""Memory nodes: a pool on a machine with more than one lies on all of them, in one part for each.

What is said to the kernel is a preference: a node without room never fails an allocation. In a tmpfs or a memfd it is
kept with the file, so that whoever touches a page first, daemon or client, gets it from the right node; in a hugetlbfs
it holds for what the daemon touches. Pages that are there already, as after a warm restart, stay where they are.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import NamedTuple

from kvd.memory import syscalls
from kvd.memory.slabs import Part, region_bytes_for

log = logging.getLogger(__name__)


class Node(NamedTuple):
    """A memory node of the machine and the memory that it has, bytes."""

    number: int
    memory_bytes: int


def find_nodes(sysfs: str = "/sys/devices/system/node", proc: str = "/proc") -> list[Node]:
    """The memory nodes that a pool may lie on, by number; what the system does not tell is not there.

    Only nodes with CPUs: memory without any is a GPU's own, or slow. Only those that this process may use (cpusets).
    The two paths are there for tests.
    """
    usable = _listed(os.path.join(sysfs, "has_memory")) & _listed(os.path.join(sysfs, "has_cpu")) & _allowed(proc)
    nodes = [Node(number, _memory_bytes(os.path.join(sysfs, f"node{number}", "meminfo"))) for number in sorted(usable)]
    return [node for node in nodes if node.memory_bytes]


def divide(pool_bytes: int, nodes: Sequence[Node]) -> tuple[Part, ...]:
    """The parts of a pool, in whole regions of its allocator, as large as the nodes' memories are to each other.

    Nothing when there would be one part only. The last part has the rest that is smaller than a region.
    """
    region_bytes = region_bytes_for(pool_bytes)
    regions = pool_bytes // region_bytes
    total = sum(node.memory_bytes for node in nodes)
    parts = []
    begin = seen = 0
    for node in nodes:
        seen += node.memory_bytes
        end = pool_bytes if seen == total else round(regions * seen / total) * region_bytes
        if end > begin:
            parts.append(Part(node.number, begin, end))
        begin = end
    return tuple(parts) if len(parts) > 1 else ()


def place(address: int, page_bytes: int, parts: Sequence[Part]) -> bool:
    """Let the memory of a pool mapped at ``address`` come from the nodes of its parts; whether the kernel does that.

    Before the memory is taken. A page on the border of two parts goes to the latter.
    """
    for part in parts:
        begin, end = (offset // page_bytes * page_bytes for offset in (part.begin, part.end))
        try:
            syscalls.mbind_preferred(address + begin, end - begin, part.node)
        except OSError as error:
            log.warning("kvd cannot spread the pool over the memory nodes of this machine: %s", error.strerror)
            return False
    told = ", ".join(f"{part.end - part.begin >> 20} MiB on node {part.node}" for part in parts)
    log.info("the pool is spread over the memory nodes of this machine: %s", told)
    return True


def _listed(path: str) -> set[int]:
    """The numbers in a list of the kernel's: ``0-3,8``."""
    try:
        with open(path) as file:
            return _numbers(file.read())
    except OSError:
        return set()


def _allowed(proc: str) -> set[int]:
    try:
        with open(os.path.join(proc, "self/status")) as file:
            told = [line.partition(":")[2] for line in file if line.startswith("Mems_allowed_list:")]
    except OSError:
        return set()
    return _numbers(told[0]) if told else set()


def _numbers(text: str) -> set[int]:
    numbers: set[int] = set()
    for run in text.strip().split(","):
        first, _, last = run.partition("-")
        if first.isdigit():
            numbers.update(range(int(first), int(last or first) + 1))
    return numbers


def _memory_bytes(path: str) -> int:
    """``Node 0 MemTotal:       16314244 kB``; 0 when it is not told."""
    try:
        with open(path) as file:
            return next((int(line.split()[3]) * 1024 for line in file if " MemTotal:" in line), 0)
    except OSError:
        return 0
