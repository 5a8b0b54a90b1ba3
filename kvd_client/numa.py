"""Which memory node of this machine a process or its GPU is near: there the daemon gives it slots if it can.

None everywhere: it cannot be told, or it is near several.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def node_of_process(sysfs: str = "/sys") -> int | None:
    """The node of the CPUs that this process may run on."""
    return node_of_cpus(os.sched_getaffinity(os.getpid()), sysfs)


def node_of_cpus(cpus: Iterable[int], sysfs: str = "/sys") -> int | None:
    """The node that has all of ``cpus``. The path is there for tests."""
    nodes: set[str] = set()
    for cpu in cpus:
        try:
            names = os.listdir(os.path.join(sysfs, f"devices/system/cpu/cpu{cpu}"))
        except OSError:
            return None
        nodes.update(name for name in names if name.startswith("node"))
        if len(nodes) != 1:  # most processes may run anywhere: that is seen soon
            return None
    return _number(nodes.pop().removeprefix("node")) if nodes else None


def node_of_pci(bus_id: str, sysfs: str = "/sys") -> int | None:
    """The node that the device at ``bus_id`` (``0000:3b:00.0``) is plugged into. The path is there for tests."""
    try:
        with open(os.path.join(sysfs, "bus/pci/devices", bus_id.lower(), "numa_node")) as file:
            return _number(file.read().strip())
    except OSError:
        return None


def node_of_device(device: torch.device) -> int | None:
    """The node of a GPU; for a CPU, that of the process."""
    if device.type == "cpu":
        return node_of_process()
    from kvd_client.cuda import pci_bus_id

    try:
        return node_of_pci(pci_bus_id(device))
    except (ImportError, RuntimeError):
        return None


def _number(text: str) -> int | None:
    return int(text) if text.isdigit() else None  # a device whose node the firmware has not told says -1
