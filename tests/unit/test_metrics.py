"""/metrics: what the tiers show there."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

from kvd.ledger.terms import Counters
from kvd.metrics import Figures, Metrics
from kvd.types import DriveFigures, Recovery
from tests.unit.test_status import drive


def page(*drives: DriveFigures, counters: dict[str, int] | None = None, **more: Any) -> dict[str, float]:
    """The samples that a daemon with these figures shows."""
    figures = Figures(
        pool_bytes=1 << 30,
        populated_bytes=0,
        locked=False,
        pool_states={},
        tenant_bytes={},
        tenant_chunks={},
        namespaces=0,
        sessions={},
        lifelines=0,
        read_leases=0,
        writing_chunks=0,
        uptime_s=1.0,
        draining=False,
        counters=asdict(Counters()) | (counters or {}),
        **{
            "node_bytes": {},
            "node_used": {},
            "recovery": Recovery(warm=False, reason=""),
            "unverified_chunks": 0,
            "tenant_pinned": {},
            "share_used": {},
            "share_limits": {},
            "drives": drives,
            "queue_chunks": 0,
            "queue_bytes": 0,
            "promoting_chunks": 0,
            "trace": {},
            **more,
        },
    )
    metrics = Metrics()
    metrics.watch(lambda: figures, "1")
    metrics.promoted(0.02)
    lines = [line.rpartition(" ") for line in metrics.render("")[0].decode().splitlines() if line[0] != "#"]
    return {name: float(value) for name, _, value in lines}


def test_every_total_of_the_books_is_shown_under_one_name() -> None:
    numbers = {field.name: number for number, field in enumerate(fields(Counters), 1000)}
    shown = {value for value in page(counters=numbers).values() if value >= 1000}
    # Lookups are counted by their method; what was taken over is in kvd_recovery_chunks.
    missing = {name for name, number in numbers.items() if number not in shown}
    assert missing == {"lookups", "recovered_chunks"}


def test_hits_are_told_by_tier() -> None:
    found = page(counters={"hit_chunks": 3, "disk_hit_chunks": 2})
    assert found['kvd_lookup_hit_chunks_total{tier="host"}'] == 3
    assert found['kvd_lookup_hit_chunks_total{tier="disk"}'] == 2


def test_a_drive_shows_whether_it_works_and_what_is_on_it() -> None:
    found = page(drive(), drive("/mnt/b", "Input/output error", scanned=1))
    assert found['kvd_spill_drive_up{drive="/mnt/a"}'] == 1
    assert found['kvd_spill_drive_up{drive="/mnt/b"}'] == 0
    states = {state: found[f'kvd_spill_bytes{{drive="/mnt/a",state="{state}"}}'] for state in ("live", "dead", "free")}
    assert sum(states.values()) == drive().capacity_bytes
    assert found['kvd_spill_unscanned_extents{drive="/mnt/b"}'] == 3
    assert found['kvd_spill_drive_written_bytes_total{drive="/mnt/a"}'] == drive().written_bytes


def test_a_start_shows_what_it_took_over() -> None:
    recovery = Recovery(True, "", 90, {"half-written": 4}, 0.25)
    found = page(recovery=recovery, unverified_chunks=12)
    assert found["kvd_recovery_warm"] == 1
    assert found["kvd_recovery_chunks"] == 90
    assert found['kvd_recovery_skipped_slots{reason="half-written"}'] == 4
    assert found["kvd_recovery_seconds"] == 0.25
    assert found["kvd_unverified_chunks"] == 12


def test_each_of_several_memory_nodes_shows_what_lies_on_it_and_what_of_it_is_in_use() -> None:
    found = page(node_bytes={"0": 6, "2": 4}, node_used={"0": 5, "2": 1})
    assert [found[f'kvd_pool_node_bytes{{node="{node}"}}'] for node in (0, 2)] == [6, 4]
    assert [found[f'kvd_pool_node_used_bytes{{node="{node}"}}'] for node in (0, 2)] == [5, 1]
    assert not any("kvd_pool_node" in name for name in page())


def test_shares_and_pins_are_shown_beside_what_is_held() -> None:
    found = page(
        tenant_pinned={"a": 3},
        share_used={"tenant:a": 7},
        share_limits={("tenant:a", "soft"): 5, ("tenant:a", "hard"): 9},
    )
    assert found['kvd_pinned_chunks{tenant="a"}'] == 3
    assert found['kvd_share_used_bytes{share="tenant:a"}'] == 7
    assert found['kvd_share_limit_bytes{bound="soft",share="tenant:a"}'] == 5
    assert found['kvd_share_limit_bytes{bound="hard",share="tenant:a"}'] == 9


def test_a_promotion_is_timed_and_a_trace_is_counted() -> None:
    found = page(trace={"recorded": 5, "dropped": 1})
    assert found["kvd_promote_seconds_count"] == 1
    assert found['kvd_promote_seconds_bucket{le="0.025"}'] == 1
    assert found['kvd_trace_requests_total{outcome="recorded"}'] == 5
