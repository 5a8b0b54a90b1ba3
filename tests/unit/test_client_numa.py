"""Which memory node a process or its GPU is near, by what the system says."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvd_client import Client
from kvd_client.numa import node_of_cpus, node_of_device, node_of_pci, node_of_process


@pytest.fixture
def sysfs(tmp_path: Path) -> str:
    """CPUs 0 and 1 on node 0, CPUs 2 and 3 on node 12, CPU 4 on none; a GPU on node 12 and one on who knows which."""
    for cpu, node in ((0, "node0"), (1, "node0"), (2, "node12"), (3, "node12"), (4, "topology")):
        (tmp_path / f"devices/system/cpu/cpu{cpu}" / node).mkdir(parents=True)
        (tmp_path / f"devices/system/cpu/cpu{cpu}" / "cache").mkdir()
    for bus_id, node in (("0000:3b:00.0", "12\n"), ("0000:5e:00.0", "-1\n")):
        (tmp_path / "bus/pci/devices" / bus_id).mkdir(parents=True)
        (tmp_path / "bus/pci/devices" / bus_id / "numa_node").write_text(node)
    return str(tmp_path)


@pytest.mark.parametrize(
    ("cpus", "node"),
    [
        ({0}, 0),
        ({0, 1}, 0),
        ({2, 3}, 12),
        ({1, 2}, None),
        ({0, 1, 2, 3}, None),
        ({4}, None),
        ({9}, None),
        (set(), None),
    ],
)
def test_cpus_have_a_node_when_all_are_on_one(sysfs: str, cpus: set[int], node: int | None) -> None:
    assert node_of_cpus(cpus, sysfs) == node


@pytest.mark.parametrize(("bus_id", "node"), [("0000:3B:00.0", 12), ("0000:5E:00.0", None), ("0000:00:00.0", None)])
def test_a_device_has_the_node_that_it_is_plugged_into(sysfs: str, bus_id: str, node: int | None) -> None:
    assert node_of_pci(bus_id, sysfs) == node


def test_a_process_is_where_it_may_run(sysfs: str) -> None:
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert node_of_process(sysfs) == node_of_cpus({min(allowed)}, sysfs)
    finally:
        os.sched_setaffinity(0, allowed)


def test_a_gpu_counts_and_not_where_the_process_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    asked: list[str] = []
    monkeypatch.setattr("kvd_client.cuda.pci_bus_id", lambda device: f"0000:{device.index:02X}:00.0")
    monkeypatch.setattr("kvd_client.numa.node_of_pci", lambda bus_id: asked.append(bus_id) or 7)
    assert node_of_device(torch.device("cuda", 0x3B)) == 7
    assert asked == ["0000:3B:00.0"]
    assert node_of_device(torch.device("cpu")) == node_of_process()


@pytest.mark.parametrize("error", [ImportError("no cupy"), RuntimeError("no driver")])
def test_a_gpu_that_cannot_be_asked_is_near_nothing(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    torch = pytest.importorskip("torch")

    def fail(device: object) -> str:
        raise error

    monkeypatch.setattr("kvd_client.cuda.pci_bus_id", fail)
    assert node_of_device(torch.device("cuda", 0)) is None


@pytest.mark.parametrize("node", [-1, 1 << 32])
def test_what_is_no_node_is_refused(node: int) -> None:
    with pytest.raises(ValueError, match="numa_node"):
        Client("tcp://127.0.0.1:1", numa_node=node)
