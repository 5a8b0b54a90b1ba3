"""Options, identity, and the messages between the halves."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from kvd_client.adapters.vllm import weights
from kvd_client.adapters.vllm.identity import build_identity, check_cacheable, choose_chunk_blocks, weights_revision
from kvd_client.adapters.vllm.meta import Geometry, LoadReport, StoreReport, WorkerNews
from kvd_client.adapters.vllm.options import Options, parse_options
from kvd_client.adapters.vllm.stats import KvdStats, Tally
from kvd_client.adapters.vllm.weights import Unidentified

GEOMETRY = Geometry("CPU_ATTN", "cpu", "bfloat16", 4, 2, "32+32", "1x32x64", 4096, 32, 8)


def test_no_option_is_needed() -> None:
    assert parse_options({}) == (Options(), [])


def test_good_options_are_taken() -> None:
    given = {"endpoint": "tcp://h:1", "load_async": False, "chunk_tokens": 512, "promote_timeout_s": 0}
    options, problems = parse_options(given)
    assert options == Options(endpoint="tcp://h:1", load_async=False, chunk_tokens=512, promote_timeout_s=0)
    assert problems == []


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"endpont": "x"}, "endpont"),
        ({"load_async": 1}, "load_async"),
        ({"load_timeout_s": -1}, "load_timeout_s"),
        ({"lookup_timeout_s": True}, "lookup_timeout_s"),
        ({"lookup_timeout_s": 0}, "lookup_timeout_s"),
        ({"promote_timeout_s": -0.5}, "promote_timeout_s"),
        ({"chunk_tokens": 0}, "chunk_tokens"),
        ({"endpoint": 5}, "endpoint"),
    ],
)
def test_a_mistake_is_named_and_left_out(extra: dict[str, Any], named: str) -> None:
    options, problems = parse_options(extra)
    assert options == Options()
    assert len(problems) == 1 and named in problems[0]


def test_a_chunk_is_the_largest_power_of_two_of_blocks_within_the_bounds() -> None:
    assert choose_chunk_blocks(16, 1 << 20, None) == 16
    assert choose_chunk_blocks(32, 1 << 20, None) == 8
    assert choose_chunk_blocks(16, 5 << 20, None) == 4
    assert choose_chunk_blocks(16, 100 << 20, None) == 1
    assert choose_chunk_blocks(512, 1 << 20, None) == 1
    assert choose_chunk_blocks(32, 1 << 20, 96) == 3
    with pytest.raises(Unidentified, match="multiple"):
        choose_chunk_blocks(32, 1 << 20, 100)


def test_the_digest_follows_the_bytes_of_the_weights_and_nothing_else(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"x" * 100_000)
    (tmp_path / "b" / "README.md").write_text("no weights")
    (tmp_path / "c" / "model.safetensors").write_bytes(b"x" * 99_999 + b"y")
    a, b, c = (weights.digest(str(tmp_path / name)) for name in ("a", "b", "c"))
    assert a == b != c


def test_a_directory_without_weights_is_not_identified(tmp_path: Path) -> None:
    with pytest.raises(Unidentified, match="no weights"):
        weights.digest(str(tmp_path))


def config(tmp_path: Path, **changes: Any) -> Any:
    """As much of a VllmConfig as is looked at."""
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    fields = {
        "load_format": "auto",
        "model": str(tmp_path),
        "hash": "sha256",
        "prefix_caching": True,
        "rope": 10000.0,
        "dtype": "bfloat16",
        "commit": None,
        "revision": None,
        **changes,
    }
    hf = SimpleNamespace(
        _commit_hash=fields["commit"],
        to_dict=lambda: {
            "rope_theta": fields["rope"],
            "_name_or_path": str(tmp_path),
            "nested": {"_commit_hash": "x"},
        },
    )
    return SimpleNamespace(
        load_config=SimpleNamespace(load_format=fields["load_format"]),
        model_config=SimpleNamespace(
            model=fields["model"],
            hf_config=hf,
            revision=fields["revision"],
            dtype=fields["dtype"],
            quantization=None,
        ),
        cache_config=SimpleNamespace(
            cache_dtype="auto",
            prefix_caching_hash_algo=fields["hash"],
            enable_prefix_caching=fields["prefix_caching"],
            calculate_kv_scales=False,
        ),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1, prefill_context_parallel_size=1),
        speculative_config=None,
    )


@pytest.fixture
def seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.core import kv_cache_utils

    monkeypatch.setattr(kv_cache_utils, "NONE_HASH", b"seed", raising=False)


@pytest.mark.usefixtures("seeded")
def test_replicas_of_one_model_agree_wherever_they_keep_it(tmp_path: Path) -> None:
    (tmp_path / "x" / "m").mkdir(parents=True)
    (tmp_path / "y" / "m").mkdir(parents=True)
    one, two = config(tmp_path / "x" / "m"), config(tmp_path / "y" / "m")
    identities = [build_identity(c, GEOMETRY, weights_revision(c)) for c in (one, two)]
    assert identities[0].canonical("t") == identities[1].canonical("t")


@pytest.mark.usefixtures("seeded")
def test_whatever_decides_the_bytes_makes_another_namespace(tmp_path: Path) -> None:
    base = config(tmp_path)
    ids = {
        build_identity(base, GEOMETRY, "1").namespace_id("t"),
        build_identity(base, GEOMETRY, "2").namespace_id("t"),
        build_identity(base, GEOMETRY, "1", {"reset": "x"}).namespace_id("t"),
        build_identity(config(tmp_path, rope=5.0), GEOMETRY, "1").namespace_id("t"),
        build_identity(config(tmp_path, dtype="float16"), GEOMETRY, "1").namespace_id("t"),
        build_identity(config(tmp_path, hash="sha256_cbor"), GEOMETRY, "1").namespace_id("t"),
    }
    assert len(ids) == 6


def test_a_seed_of_its_own_makes_another_namespace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.core import kv_cache_utils

    ids = set()
    for seed in (b"one", b"two"):
        monkeypatch.setattr(kv_cache_utils, "NONE_HASH", seed, raising=False)
        ids.add(build_identity(config(tmp_path), GEOMETRY, "1").namespace_id("t"))
    assert len(ids) == 2


def test_a_downloaded_model_is_known_by_its_commit(tmp_path: Path) -> None:
    commit = "0123456789" * 4
    assert weights_revision(config(tmp_path, model="org/model", commit=commit)) == commit
    with pytest.raises(Unidentified, match="commit"):
        weights_revision(config(tmp_path, model="org/model"))
    with pytest.raises(Unidentified, match="commit"):
        weights_revision(config(tmp_path, model="org/model", commit="main"))


def test_weights_that_are_made_up_are_not_shared(tmp_path: Path) -> None:
    with pytest.raises(Unidentified, match="dummy"):
        weights_revision(config(tmp_path, load_format="dummy"))


def full_attention(**changes: Any) -> Any:
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    torch = pytest.importorskip("torch")
    return FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=64, dtype=torch.bfloat16, **changes)


def test_one_group_of_full_attention_is_cached(tmp_path: Path) -> None:
    groups = SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=full_attention())])
    check_cacheable(config(tmp_path), groups)


@pytest.mark.parametrize(
    ("changes", "spec", "reason"),
    [
        ({"hash": "xxhash"}, {}, "xxhash"),
        ({"prefix_caching": False}, {}, "prefix caching is off"),
        ({}, {"non_causal": True}, "FullAttentionSpec"),
    ],
)
def test_what_is_not_sound_is_not_cached_and_the_reason_named(
    tmp_path: Path, changes: dict[str, Any], spec: dict[str, Any], reason: str
) -> None:
    groups = SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=full_attention(**spec))])
    with pytest.raises(Unidentified, match=reason):
        check_cacheable(config(tmp_path, **changes), groups)


def test_several_groups_are_not_cached(tmp_path: Path) -> None:
    group = SimpleNamespace(kv_cache_spec=full_attention())
    with pytest.raises(Unidentified, match="hybrid"):
        check_cacheable(config(tmp_path), SimpleNamespace(kv_cache_groups=[group, group]))


def test_the_news_of_ranks_add_up() -> None:
    one = WorkerNews({1: StoreReport(1, {2})}, {"r": LoadReport(1, None)}, {5: 1})
    two = WorkerNews({1: StoreReport(1, {3}), 2: StoreReport(1, set())}, {"r": LoadReport(1, 4)}, {5: 1, 6: 1})
    three = WorkerNews(loaded={"r": LoadReport(1, 1)})
    total = one.aggregate(two).aggregate(three)
    assert total.stored == {1: StoreReport(2, {2, 3}), 2: StoreReport(1, set())}
    assert total.loaded == {"r": LoadReport(3, 1)}
    assert total.attached == {5: 2, 6: 1}
    assert not WorkerNews()


def test_statistics_add_up_and_start_again() -> None:
    tally = Tally()
    tally.loaded(3, 100, 0.5)
    tally.add(lookups=1)
    first = tally.take()
    assert first is not None and first.data == {
        "loaded_chunks": 3,
        "loaded_bytes": 300,
        "load_seconds": 0.5,
        "lookups": 1,
    }
    assert tally.take() is None
    total = first.aggregate(KvdStats(data={"lookups": 2}))
    assert total.reduce()["lookups"] == 3
    assert not total.is_empty()
    total.reset()
    assert total.is_empty()


def test_a_pipeline_rank_knows_which_of_the_models_layers_it_has() -> None:
    from kvd_client.adapters.vllm.worker import _layers

    def of(ranks: int) -> Any:
        return SimpleNamespace(
            parallel_config=SimpleNamespace(pipeline_parallel_size=ranks),
            model_config=SimpleNamespace(get_total_num_hidden_layers=lambda: 12),
        )

    names = [f"model.layers.{i}.self_attn.attn" for i in (11, 9, 10)]
    assert _layers(of(1), names) == (names, 0, 3)
    assert _layers(of(2), names) == ([names[1], names[2], names[0]], 9, 12)
    with pytest.raises(Unidentified, match="pipeline"):
        _layers(of(2), [names[0], names[1]])
