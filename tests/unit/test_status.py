"""The page of ``kvd status``: what a person on call sees first, and what is not there when there is nothing to say."""

from __future__ import annotations

from google.protobuf import json_format

from kvd import convert, status
from kvd.ledger.terms import DiskFigures, NamespaceFigures, PoolFigures, TenantFigures
from kvd.memory.slabs import NodeFigures
from kvd.types import DriveFigures, Recovery
from kvd.wire.pb import kvd_pb2 as pb

GIB = 1 << 30
POOL = PoolFigures(GIB, GIB // 2, GIB // 4, GIB // 8, 0, GIB // 8, unverified_chunks=3)
COLD = Recovery(warm=False, reason="the pool is new")


def drive(directory: str = "/mnt/a", reason: str = "", scanned: int = 4) -> DriveFigures:
    """A drive of 10 GiB, 4 of its extents found at the start."""
    return DriveFigures(
        directory=directory,
        reason=reason,
        capacity_bytes=10 * GIB,
        live_bytes=4 * GIB,
        dead_bytes=GIB,
        free_bytes=5 * GIB,
        records=400,
        extents=5,
        read_bytes=2 * GIB,
        written_bytes=6 * GIB,
        queue=7,
        scanned_extents=scanned,
        found_extents=4,
    )


def answer(*drives: DriveFigures, recovery: Recovery = COLD, daily_bytes: int = 0, **counters: int) -> pb.StatsResponse:
    """What a daemon with these drives, none at all included, might answer."""
    return pb.StatsResponse(
        version="1",
        state="serving",
        uptime_s=5,
        endpoints=["unix:/run/kvd/kvd.sock"],
        pool=convert.pool_stats(POOL, "memfd", GIB, recovery),
        counters=counters,
        disk=convert.disk_stats(DiskFigures(400, 4 * GIB, 10 * GIB, 2, GIB, 1), drives, daily_bytes, GIB)
        if drives
        else None,
    )


def test_without_a_disk_nothing_is_said_of_one() -> None:
    text = status.as_text(answer())
    assert "disk  " not in text
    assert "DEGRADED" not in text
    assert "start    cold: the pool is new" in text
    assert status.as_json(answer())["disk"] is None


def test_degraded_drives_come_first_with_their_reason() -> None:
    text = status.as_text(answer(drive(), drive("/mnt/b", "Input/output error")))
    alarm = "DEGRADED /mnt/b: Input/output error; it is not written to, and what lies there is not found"
    assert alarm in text
    assert text.index(alarm) < text.index("start  ")
    assert "DEGRADED /mnt/a" not in text


def test_corruption_comes_first_too() -> None:
    text = status.as_text(answer(corrupt_chunks=2))
    assert "CORRUPT  2 chunks" in text
    assert text.index("CORRUPT") < text.index("start  ")


def test_a_warm_start_says_what_it_took_over_and_what_not() -> None:
    recovery = Recovery(True, "the daemon before was killed", 90, {"half-written": 4, "damaged": 1}, 0.25)
    text = status.as_text(answer(recovery=recovery))
    assert "start    warm: 90 chunks taken over in 0.25 s; the daemon before was killed" in text
    assert "slots not taken over: 1 damaged, 4 half-written" in text
    assert "3 chunks taken over are still to be checked" in text


def test_the_disk_is_told_of_with_its_wear() -> None:
    text = status.as_text(
        answer(drive(), daily_bytes=100 * GIB, spilled_chunks=300, spilled_bytes=5 * GIB, unspilled_budget=9)
    )
    assert "disk     4GiB of 10GiB in 400 records; 2 chunks (1GiB) wait to be written, 1 are being read" in text
    assert "6GiB written to the drives, 1.20 times what was spilled; 1GiB of 100GiB today" in text
    assert "not spilled: 9 over the budget" in text
    assert "/mnt/a  up     5GiB  10GiB  400" in text


def test_a_scan_shows_how_far_it_is() -> None:
    text = status.as_text(answer(drive(scanned=1)))
    assert "scanning, 1 of 4 extents" in text
    assert answer(drive(scanned=1)).disk.drives[0].state == "scanning"
    assert answer(drive(scanned=4)).disk.drives[0].state == "up"
    assert answer(drive(scanned=1, reason="gone")).disk.drives[0].state == "degraded"


def test_hits_are_told_by_tier() -> None:
    text = status.as_text(answer(lookups=2, asked_chunks=10, hit_chunks=4, disk_hit_chunks=3, miss_chunks=3))
    assert "lookups  2: 7 of 10 chunks found (70.0 %); 4 in the pool, 3 on disk" in text


def test_shares_and_pins_stand_beside_who_has_them() -> None:
    stats = answer()
    stats.tenants.append(convert.tenant_stats(TenantFigures("a", 5, GIB, 1, 6, 2 * GIB, 3, GIB, None)))
    stats.tenants.append(convert.tenant_stats(TenantFigures("b", 0, 0, 1)))
    figures = NamespaceFigures(b"\x01" * 32, "a", "m", 1 << 20, 5, GIB, 6, 2 * GIB, 3, None, 4 * GIB)
    stats.namespaces.append(convert.namespace_stats(figures))
    lines = [line.split() for line in status.as_text(stats).splitlines()]
    assert ["a", "5", "1GiB", "2GiB", "3", "soft", "1GiB", "1"] in lines
    assert ["b", "0", "0B", "0B", "0", "-", "1"] in lines
    assert ["010101010101", "a", "m", "1MiB", "5", "1GiB", "2GiB", "3", "hard", "4GiB"] in lines
    assert not stats.tenants[1].HasField("share")


def test_memory_nodes_are_shown_where_there_are_several() -> None:
    stats = answer()
    stats.sessions.add(client="near", numa_node=0)
    stats.sessions.add(client="far")
    text = status.as_text(stats)
    assert "node" not in text
    assert status.as_json(stats)["pool"]["nodes"] == []
    nodes = [NodeFigures(0, GIB, GIB // 2), NodeFigures(2, 3 * GIB, 0)]
    stats.pool.CopyFrom(convert.pool_stats(POOL, "memfd", GIB, COLD, nodes))
    text = status.as_text(stats)
    assert "         node 0: 512MiB of 1GiB in use, node 2: 0B of 3GiB in use\n" in text
    lines = [line.split() for line in text.splitlines()]
    assert [line[-1] for line in lines if line[:1] in (["session"], ["near"], ["far"])] == ["node", "0", "-"]
    assert [found["numa_node"] for found in status.as_json(stats)["sessions"]] == [0, None]


def test_pins_are_listed() -> None:
    assert status.pins_as_text(pb.ListPinsResponse()) == "nothing is pinned"
    pins = [
        pb.PinStats(namespace_id=b"\x01" * 32, key=b"\x02" * 32, chunks=3, bytes=3 << 20),
        pb.PinStats(namespace_id=b"\x01" * 32),
    ]
    lines = status.pins_as_text(pb.ListPinsResponse(pins=pins)).splitlines()
    assert lines[1].split() == ["01" * 32, "02" * 32, "3", "3MiB"]
    assert lines[2].split() == ["01" * 32, "(all)", "0", "0B"]


def test_json_has_every_field_of_a_full_answer() -> None:
    stats = answer(drive(), recovery=Recovery(True, "x", 1, {"y": 2}, 0.5))
    found = status.as_json(stats)
    assert found["disk"]["drives"][0]["directory"] == "/mnt/a"
    assert found["pool"]["recovery"]["skipped"] == {"y": 2}
    names = set(json_format.MessageToDict(stats.disk.drives[0], preserving_proto_field_name=True))
    assert names <= set(found["disk"]["drives"][0])
