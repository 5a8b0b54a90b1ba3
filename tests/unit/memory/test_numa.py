"""A pool on a machine with several memory nodes: which are used, how it is divided, and what the kernel is told."""

from __future__ import annotations

import ctypes
import errno
import logging
import mmap
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvd.memory import numa, syscalls
from kvd.memory.numa import Node, divide, find_nodes
from kvd.memory.pool import Pool, open_pool
from kvd.memory.segment import _huge_bytes_mapped
from kvd.memory.slabs import NodeFigures, Part, SlabAllocator, region_bytes_for

MIB = 1 << 20
GIB = 1 << 30
#: Two nodes for which the only one of any machine will do.
TWICE = [Node(0, 3 * GIB), Node(0, GIB)]
_GET_MEMPOLICY = {"x86_64": 239, "aarch64": 236}[platform.machine()]
_MPOL_F_ADDR = 2
_MPOL_PREFERRED = 1


def machine(
    root: Path, *, memory: str = "0-1", cpus: str = "0-1", allowed: str = "0-1", gib: tuple[int, ...] = (8, 8, 8)
) -> tuple[str, str]:
    """A sysfs and a proc that tell of nodes with so much memory."""
    sysfs, proc = root / "node", root / "proc"
    (proc / "self").mkdir(parents=True)
    (proc / "self" / "status").write_text(f"Name:\tkvd\nMems_allowed:\t3\nMems_allowed_list:\t{allowed}\n")
    for number, size in enumerate(gib):
        (sysfs / f"node{number}").mkdir(parents=True)
        (sysfs / f"node{number}" / "meminfo").write_text(
            f"Node {number} MemTotal:       {size << 20} kB\nNode {number} MemFree:        1 kB\n"
        )
    (sysfs / "has_memory").write_text(memory + "\n")
    (sysfs / "has_cpu").write_text(cpus + "\n")
    return str(sysfs), str(proc)


def policy_at(address: int) -> tuple[int, int]:
    """What the kernel has for the page at ``address``: the mode, and the nodes as bits."""
    mode, nodes = ctypes.c_int(-1), (ctypes.c_ulong * 16)()
    libc = ctypes.CDLL(None, use_errno=True)
    bits, flags = ctypes.c_ulong(16 * 64), ctypes.c_ulong(_MPOL_F_ADDR)
    number, where = ctypes.c_long(_GET_MEMPOLICY), ctypes.c_void_p(address)
    assert libc.syscall(number, ctypes.byref(mode), nodes, bits, where, flags) == 0, os.strerror(ctypes.get_errno())
    return mode.value, sum(word << 64 * at for at, word in enumerate(nodes))


@contextmanager
def mapped(fd: int, size: int) -> Iterator[int]:
    """The address of another mapping of a file, as a client makes one."""
    with mmap.mmap(fd, size) as mapping:
        yield ctypes.addressof(ctypes.c_char.from_buffer(mapping))


@pytest.fixture
def pools() -> Iterator[list[Pool]]:
    """What is in it is closed when the test is over."""
    made: list[Pool] = []
    yield made
    for pool in made:
        pool.close()


@pytest.fixture
def kernel() -> None:
    """A kernel that lets this process choose; the usual seccomp profile of a container does not."""
    with mmap.mmap(-1, mmap.PAGESIZE) as mapping:
        try:
            syscalls.mbind_preferred(ctypes.addressof(ctypes.c_char.from_buffer(mapping)), mmap.PAGESIZE, 0)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOSYS):
                raise
            pytest.skip(f"mbind: {error.strerror}")


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """What the kernel would have been told."""
    heard: list[tuple[int, int, int]] = []
    monkeypatch.setattr(syscalls, "mbind_preferred", lambda *what: heard.append(what))
    return heard


# ---------------------------------------------------------------- which nodes


def test_nodes_with_memory_are_found_with_its_size(tmp_path: Path) -> None:
    assert find_nodes(*machine(tmp_path, gib=(8, 4))) == [Node(0, 8 * GIB), Node(1, 4 * GIB)]


@pytest.mark.parametrize(
    ("lists", "found"),
    [
        ({"memory": "0,2", "cpus": "0-2", "allowed": "0-2"}, [0, 2]),  # node 1 has no memory
        ({"memory": "0-2", "cpus": "0-1", "allowed": "0-2"}, [0, 1]),  # node 2 is a GPU's own memory
        ({"memory": "0-2", "cpus": "0-2", "allowed": "1-2"}, [1, 2]),  # a container that may not use node 0
        ({"memory": "0", "cpus": "0", "allowed": "0"}, [0]),
        ({"memory": "", "cpus": "0-2", "allowed": "0-2"}, []),
    ],
)
def test_only_nodes_that_a_pool_should_lie_on_count(tmp_path: Path, lists: dict[str, str], found: list[int]) -> None:
    assert [node.number for node in find_nodes(*machine(tmp_path, **lists))] == found  # type: ignore[arg-type]


def test_a_machine_that_says_nothing_has_no_nodes(tmp_path: Path) -> None:
    sysfs, proc = machine(tmp_path)
    assert find_nodes(str(tmp_path / "absent"), proc) == []
    assert find_nodes(sysfs, str(tmp_path / "absent")) == []
    os.unlink(os.path.join(sysfs, "node1", "meminfo"))
    assert [node.number for node in find_nodes(sysfs, proc)] == [0]


def test_this_machine_is_understood() -> None:
    nodes = find_nodes()
    assert nodes
    assert sum(node.memory_bytes for node in nodes) <= os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE * 1.1


# ---------------------------------------------------------------- the division


@pytest.mark.parametrize("size", [MIB, 100 * MIB, GIB + 4096, 10 * GIB, 1000 * GIB])
@pytest.mark.parametrize("memory", [(8, 8), (8, 4), (1, 1, 1), (7, 7, 8, 7)])
def test_parts_are_whole_regions_and_as_large_as_the_memories_to_each_other(size: int, memory: tuple[int, ...]) -> None:
    parts = divide(size, [Node(5 + number, gib * GIB) for number, gib in enumerate(memory)])
    region = region_bytes_for(size)
    assert [part.node for part in parts] == [5 + number for number in range(len(memory))]
    assert parts[0].begin == 0
    assert [part.end for part in parts] == [*(part.begin for part in parts[1:]), size]
    assert all(part.begin % region == 0 for part in parts)
    for part, gib in zip(parts, memory, strict=True):
        assert abs((part.end - part.begin) - size * gib / sum(memory)) <= 2 * region


def test_one_node_is_no_division() -> None:
    assert divide(GIB, []) == ()
    assert divide(GIB, [Node(0, GIB)]) == ()
    assert divide(GIB, [Node(0, GIB), Node(1, 1)]) == ()  # not a region for the second


# ---------------------------------------------------------------- the kernel


@pytest.mark.usefixtures("kernel")
def test_another_mapping_of_the_pool_has_the_policy(pools: list[Pool]) -> None:
    pool = open_pool(32 * MIB, daemon_id=1, nodes=TWICE)
    pools.append(pool)
    assert [(part.begin, part.end) for part in pool.parts] == [(0, 24 * MIB), (24 * MIB, 32 * MIB)]
    with mapped(pool.segment.data_fd, pool.segment.size) as address:
        for offset in (0, 24 * MIB - 4096, 24 * MIB, 32 * MIB - 4096):
            assert policy_at(address + offset) == (_MPOL_PREFERRED, 1 << 0)


def test_a_pool_on_one_node_is_left_alone(pools: list[Pool], told: list[tuple[int, int, int]]) -> None:
    pools += [open_pool(MIB, daemon_id=1), open_pool(MIB, daemon_id=1, nodes=[Node(0, GIB)])]
    assert [pool.parts for pool in pools] == [(), ()]
    assert told == []
    assert SlabAllocator(MIB, pools[1].parts).nodes() == []


def test_each_part_is_told_of_with_its_node(pools: list[Pool], told: list[tuple[int, int, int]]) -> None:
    pool = open_pool(64 * MIB, daemon_id=1, nodes=[Node(0, GIB), Node(3, GIB)])
    pools.append(pool)
    address = pool.segment.address
    assert told == [(address, 32 * MIB, 0), (address + 32 * MIB, 32 * MIB, 3)]
    assert SlabAllocator(64 * MIB, pool.parts).nodes() == [NodeFigures(0, 32 * MIB, 0), NodeFigures(3, 32 * MIB, 0)]


def test_the_kernel_hears_of_whole_pages(told: list[tuple[int, int, int]]) -> None:
    assert numa.place(GIB, 2 * MIB, [Part(0, 0, 5 * MIB), Part(1, 5 * MIB, 8 * MIB)])
    assert told == [(GIB, 4 * MIB, 0), (GIB + 4 * MIB, 4 * MIB, 1)]


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOSYS, errno.EINVAL])
def test_a_kernel_that_refuses_costs_a_line_in_the_log_and_nothing_else(
    pools: list[Pool], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    def refuse(*what: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(syscalls, "mbind_preferred", refuse)
    with caplog.at_level(logging.WARNING):
        pools.append(open_pool(MIB, daemon_id=1, nodes=TWICE))
    assert pools[0].parts == ()
    assert os.strerror(number) in caplog.text


def test_a_node_that_is_not_there_is_refused(pools: list[Pool]) -> None:
    pools.append(open_pool(MIB, daemon_id=1, nodes=[Node(0, GIB), Node(1000, GIB)]))
    assert pools[0].parts == ()


def test_a_kind_of_machine_without_a_number_for_the_call_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(syscalls, "_MBIND", None)
    with pytest.raises(OSError, match="not known") as caught:
        syscalls.mbind_preferred(0, 0, 0)
    assert caught.value.errno == errno.ENOSYS


@pytest.mark.usefixtures("kernel")
def test_a_divided_pool_is_populated_like_any_other(pools: list[Pool]) -> None:
    pool = open_pool(8 * MIB, daemon_id=1, nodes=TWICE)
    pools.append(pool)
    assert len(pool.parts) == 2
    pool.segment.populate()
    assert pool.segment.populated_bytes == 8 * MIB


def test_a_pool_that_is_taken_over_is_divided_again(
    tmp_path: Path, pools: list[Pool], told: list[tuple[int, int, int]]
) -> None:
    before = open_pool(8 * MIB, daemon_id=1, directory=str(tmp_path))
    before.close()
    pools.append(open_pool(8 * MIB, daemon_id=2, directory=str(tmp_path), nodes=[Node(0, GIB), Node(1, GIB)]))
    assert pools[0].cold == ""
    assert [part.node for part in pools[0].parts] == [0, 1]
    assert len(told) == 2


def test_huge_pages_of_all_parts_are_counted(tmp_path: Path) -> None:
    smaps = tmp_path / "smaps"
    smaps.write_text(
        "".join(
            f"{begin:x}-{end:x} rw-s 00000000 00:01 7 /memfd:kvd-pool (deleted)\nRss: 4 kB\nShmemPmdMapped: {kib} kB\n"
            for begin, end, kib in (
                (0x1000, 0x2000, 7),
                (0x4000, 0x6000, 2048),
                (0x6000, 0x9000, 4096),
                (0x9000, 0xA000, 9),
            )
        )
    )
    assert _huge_bytes_mapped(0x4000, 0x5000, str(smaps)) == 6 * MIB
