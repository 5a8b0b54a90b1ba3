"""Settings: where they come from, and how they are refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from kvd.cli import _FLAGS
from kvd.config import KEYS, BadSetting, Loaded, load
from kvd.memory.host import available_memory
from kvd.types import Share
from kvd.values import Admit, Codec, HostPort, Populate, format_size, human_size, parse_size

NAMESPACE = "0123456789abcdef" * 4


def loaded(
    file: str | None = None, /, environ: dict[str, str] | None = None, **flags: str | bool | list[str]
) -> Loaded:
    return load(flags, environ or {}, file)


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    return tmp_path / "kvd.toml"


def test_without_any_setting_the_defaults_are_in_force() -> None:
    found = loaded()
    settings = found.settings
    assert settings.listen == HostPort("127.0.0.1", 7440)
    assert settings.http == HostPort("127.0.0.1", 7441)
    assert settings.data == HostPort("127.0.0.1", 7442)
    assert settings.pool_bytes == 1 << 30
    assert settings.populate is Populate.BACKGROUND
    assert set(found.sources.values()) <= {"default", "default: 2 above listen"}


def test_flags_win_over_the_environment_which_wins_over_the_file(toml: Path) -> None:
    toml.write_text('pool = "1GiB"\nquarantine = 1\nread_lease = 10\nhuge_pages = true\n')
    environ = {"KVD_POOL": "2GiB", "KVD_QUARANTINE": "2", "PATH": "/bin"}
    found = loaded(str(toml), environ, pool="3GiB")
    assert found.settings.pool_bytes == 3 << 30
    assert found.settings.quarantine_s == 2
    assert found.settings.read_lease_s == 10
    assert found.settings.huge_pages is True
    assert found.sources["pool"] == "flag --pool"
    assert found.sources["quarantine"] == "environment KVD_QUARANTINE"
    assert found.sources["read_lease"] == f"file {toml}"
    assert found.sources["listen"] == "default"


def test_the_file_can_be_named_by_the_environment(toml: Path) -> None:
    toml.write_text('pool = "2MiB"\n')
    assert loaded(environ={"KVD_CONFIG": str(toml)}).settings.pool_bytes == 2 << 20


def test_what_is_shown_can_be_typed_again(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    first = loaded(
        socket="/tmp/kvd.sock",
        pool="1536MiB",
        listen="[::1]:0",
        populate="start",
        drain_timeout="0.5",
        huge_pages=True,
        pool_dir="none",
        spill_dir=[str(tmp_path), str(tmp_path / "b")],
        spill="1.5GiB",
        spill_write_rate="100MiB",
        spill_floor="0",
        spill_admit="reused",
        spill_codec="auto",
        ttl="36h",
        shares=["tenant=a:soft=1GiB,hard=2GiB", f"namespace={NAMESPACE}:hard=3MiB"],
        recompute_weight="0.25",
        record_trace=str(tmp_path / "trace.jsonl"),
    )
    shown = {key: value for key, value, _ in first.describe() if value != "-"}
    assert shown["pool"] == "1536MiB"
    assert shown["listen"] == "[::1]:0"
    assert shown["spill_dir"] == f"{tmp_path},{tmp_path}/b"
    assert shown["ttl"] == "36h"
    assert shown["shares"] == f"tenant=a:soft=1GiB,hard=2GiB;namespace={NAMESPACE}:hard=3MiB"
    assert {*KEYS} - {*shown} == {"group"}
    assert load(shown, {}, None).settings == first.settings


def test_every_setting_has_a_flag_and_every_flag_a_setting() -> None:
    assert set(_FLAGS) == set(KEYS)


def test_without_any_setting_there_is_no_disk_and_the_pool_finds_its_place() -> None:
    settings = loaded().settings
    assert settings.pool_dir == "auto"
    assert settings.spill_dirs == ()
    assert settings.spill_bytes == settings.spill_write_rate_bytes == settings.spill_write_daily_bytes == 0
    assert settings.spill_floor_bytes == 1 << 30
    assert settings.spill_admit is Admit.ALWAYS
    assert settings.spill_codec is Codec.NONE
    assert settings.ttl_s == 0
    assert settings.shares == ()
    assert settings.record_trace is None


def test_lists_are_given_as_lists_as_texts_and_as_repeated_flags(toml: Path, tmp_path: Path) -> None:
    wanted = [str(tmp_path / name) for name in ("a", "b")]
    for directory in wanted:
        Path(directory).mkdir()
    toml.write_text(f'spill = "1GiB"\nspill_dir = ["{wanted[0]}", "{wanted[1]}"]\nshares = ["tenant=a:hard=1GiB"]\n')
    joined = ",".join(wanted)
    for found in (
        loaded(str(toml)),
        loaded(spill="1GiB", spill_dir=wanted),
        loaded(spill="1GiB", spill_dir=[joined]),
        loaded(environ={"KVD_SPILL": "1GiB", "KVD_SPILL_DIR": joined}),
    ):
        assert found.settings.spill_dirs == tuple(wanted)
    assert loaded(str(toml)).settings.shares == (Share("a", None, None, 1 << 30),)
    environ = {"KVD_SHARES": f"tenant=spiffe://a/b:soft=1MiB; namespace={NAMESPACE}:soft=1MiB,hard=2MiB"}
    assert loaded(environ=environ).settings.shares == (
        Share("spiffe://a/b", None, 1 << 20, None),
        Share(None, bytes.fromhex(NAMESPACE), 1 << 20, 2 << 20),
    )


@pytest.mark.parametrize("text", ["pool = [1]", 'pool = ["1GiB"]', "spill_dir = [1]", "spill_dir = []\nspill = '1GiB'"])
def test_a_list_of_the_wrong_things_is_refused(toml: Path, text: str) -> None:
    toml.write_text(text + "\n")
    with pytest.raises(BadSetting, match=r"needs one value|needs a text or a list of texts|it is not said where"):
        loaded(str(toml))


def test_a_disk_tier_without_size_or_place_says_what_to_add(tmp_path: Path) -> None:
    with pytest.raises(BadSetting, match=r"spill_dir = .*not said how much.*add --spill SIZE"):
        loaded(spill_dir=[str(tmp_path)])
    with pytest.raises(BadSetting, match=r"spill = '1GiB' \(flag --spill\): .*add --spill-dir DIR"):
        loaded(spill="1GiB")
    with pytest.raises(BadSetting, match=r"spill = '16MiB' .*each needs at least 16MiB"):
        (tmp_path / "b").mkdir()
        loaded(spill="16MiB", spill_dir=[str(tmp_path), str(tmp_path / "b")])
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(BadSetting, match="the same directory twice"):
        loaded(spill="1GiB", spill_dir=[str(tmp_path), str(tmp_path / "link")])


def test_a_share_is_given_once_to_each(tmp_path: Path) -> None:
    with pytest.raises(BadSetting, match="two for the same tenant"):
        loaded(shares=["tenant=a:hard=1GiB", "tenant=a:soft=1GiB"])


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0", 0), ("90", 90), ("90s", 90), ("30m", 1800), ("12h", 43200), ("7d", 604800), ("1.5d", 129600)],
)
def test_a_time_to_live_is_read(text: str, seconds: float) -> None:
    assert loaded(ttl=text).settings.ttl_s == seconds


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        loaded().settings.pool_bytes = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("key", "value", "right"),
    [
        ("pool", "8GB", "8GiB"),
        ("pool", "8", "8GiB"),
        ("pool", "-1GiB", "8GiB"),
        ("pool", "lots", "8GiB"),
        ("pool", "4KiB", "at least 1MiB"),
        ("pool_dir", "/no/such/directory", "no such directory"),
        ("socket", "/no/such/directory/kvd.sock", "no directory /no/such/directory"),
        ("socket", "/tmp", "is a directory"),
        ("socket", "/tmp/" + "x" * 200, "at most 103 bytes"),
        ("listen", "7440", "HOST:PORT"),
        ("listen", "::1:7440", "[IPV6]:PORT"),
        ("listen", "127.0.0.1:99999", "from 0 to 65535"),
        ("listen", "0.0.0.0:7440", "--allow-remote"),
        ("listen", "[::]:7440", "--allow-remote"),
        ("data", "10.0.0.1:7442", "--allow-remote"),
        ("data", "127.0.0.1:7440", "the same address as listen"),
        ("listen", "127.0.0.1:65535", "lower port"),
        ("populate", "never", "lazy, background, start"),
        ("group", "no-such-group", "no such group"),
        ("quarantine", "-1", "seconds"),
        ("quarantine", "nan", "seconds"),
        ("read_lease", "0", "0.1"),
        ("drain_timeout", "soon", "seconds"),
        ("log_level", "loud", "debug, info, warning, error"),
        ("spill_dir", "/no/such/directory", "no such directory"),
        ("spill_dir", "/tmp,", "missing"),
        ("spill_dir", "", "missing"),
        ("spill", "200GB", "8GiB"),
        ("spill_write_rate", "fast", "8GiB"),
        ("spill_write_daily", "-1B", "8GiB"),
        ("spill_floor", "1", "8GiB"),
        ("spill_admit", "sometimes", "always, reused"),
        ("spill_codec", "lz4", "none, auto"),
        ("ttl", "7 days", "12h or 7d"),
        ("ttl", "9999d", "3650d"),
        ("ttl", "-1", "12h or 7d"),
        ("shares", "a:1GiB", "tenant=NAME:soft=SIZE,hard=SIZE"),
        ("shares", "tenant=a", "tenant=NAME:soft=SIZE,hard=SIZE"),
        ("shares", "tenant=a:", "tenant=NAME:soft=SIZE,hard=SIZE"),
        ("shares", "tenant=:hard=1GiB", "tenant=NAME:soft=SIZE,hard=SIZE"),
        ("shares", "user=a:hard=1GiB", "tenant=NAME:soft=SIZE,hard=SIZE"),
        ("shares", "tenant=a:hard=1GiB,hard=2GiB", "tenant=NAME:soft=SIZE,hard=SIZE"),
        ("shares", "tenant=a:hard=1", "8GiB"),
        ("shares", "tenant=a:hard=0B", "give a size"),
        ("shares", "tenant=a:soft=2GiB,hard=1GiB", "soft is larger than hard"),
        ("shares", "namespace=beef:hard=1GiB", "64 hexadecimal digits"),
        ("recompute_weight", "inf", "from 0 to 1000"),
        ("recompute_weight", "-1", "from 0 to 1000"),
        ("record_trace", "/no/such/directory/trace", "cannot make a file in /no/such/directory"),
        ("record_trace", "/tmp", "is a directory"),
    ],
)
def test_a_bad_value_is_named_with_its_key_its_source_and_what_would_be_right(key: str, value: str, right: str) -> None:
    with pytest.raises(BadSetting) as caught:
        load({key: value}, {}, None)
    text = str(caught.value)
    assert right in text
    assert "--" + key.replace("_", "-") in text or "data = '127.0.0.1:65537'" in text
    assert f"{key} = " in text or "data = '127.0.0.1:65537'" in text


def test_an_unknown_key_of_the_file_is_named_with_the_one_that_was_meant(toml: Path) -> None:
    toml.write_text('poool = "1GiB"\n')
    with pytest.raises(BadSetting, match=r"poool = '1GiB' \(file .*kvd.toml\): unknown setting; did you mean pool\?"):
        loaded(str(toml))


def test_a_table_in_the_file_is_an_unknown_key(toml: Path) -> None:
    toml.write_text('[server]\npool = "1GiB"\n')
    with pytest.raises(BadSetting, match=r"^server = .*unknown setting"):
        loaded(str(toml))


def test_an_unknown_variable_is_named() -> None:
    with pytest.raises(BadSetting, match=r"pol = '1GiB' \(environment KVD_POL\): unknown setting; did you mean"):
        loaded(environ={"KVD_POL": "1GiB"})


def test_variables_that_kubernetes_sets_for_a_service_are_not_ours() -> None:
    environ = {
        "KVD_SERVICE_HOST": "10.0.0.1",
        "KVD_SERVICE_PORT_GRPC": "7440",
        "KVD_PORT": "tcp://10.0.0.1:7440",
        "KVD_PORT_7440_TCP_ADDR": "10.0.0.1",
    }
    assert loaded(environ=environ).settings.pool_bytes == 1 << 30


def test_a_file_that_is_missing_or_no_toml_is_named(toml: Path) -> None:
    with pytest.raises(BadSetting, match=r"config = .*flag --config.*No such file"):
        loaded(str(toml))
    toml.write_text("pool = = 1")
    with pytest.raises(BadSetting, match=r"config = .*environment KVD_CONFIG.*is not TOML"):
        loaded(environ={"KVD_CONFIG": str(toml)})


def test_a_switch_where_a_value_belongs_is_refused(toml: Path) -> None:
    toml.write_text("pool = true\n")
    with pytest.raises(BadSetting, match="needs a value"):
        loaded(str(toml))


def test_other_machines_are_let_in_only_when_asked_for() -> None:
    assert loaded(listen="0.0.0.0:7440", allow_remote=True).settings.data == HostPort("0.0.0.0", 7442)
    assert loaded(http="0.0.0.0:7441").settings.http.host == "0.0.0.0"  # holds no chunk and no secret


def test_the_data_plane_follows_the_control_plane() -> None:
    assert loaded(listen="[::1]:9000").settings.data == HostPort("::1", 9002)
    assert loaded(listen="127.0.0.1:0").settings.data == HostPort("127.0.0.1", 0)


def test_the_limit_of_a_container_counts_as_memory(tmp_path: Path) -> None:
    proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 64000000 kB\nMemAvailable: 32000000 kB\n")
    (proc / "self/cgroup").write_text("0::/box/inner\n")
    (cgroups / "box/inner").mkdir(parents=True)
    assert available_memory(str(proc), str(cgroups)).size == 32_000_000 * 1024
    (cgroups / "box/memory.max").write_text("1000000\n")
    (cgroups / "box/memory.current").write_text("700000\n")
    (cgroups / "box/memory.stat").write_text("anon 1\ninactive_file 200000\n")
    (cgroups / "box/inner/memory.max").write_text("max\n")
    (cgroups / "box/inner/memory.current").write_text("1\n")
    found = available_memory(str(proc), str(cgroups))
    assert found.size == 500_000
    assert "cgroup" in found.limit


@pytest.mark.parametrize(("text", "size"), [("1B", 1), ("512MiB", 512 << 20), ("1.5GiB", 3 << 29), ("2 TiB", 2 << 40)])
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size
    assert parse_size(format_size(size)) == size


@pytest.mark.parametrize("text", ["", "1", "1K", "1kb", "0.3B", "1e3MiB", "99999999TiB", "MiB", "nanMiB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="write a size"):
        parse_size(text)


def test_sizes_are_shown_short() -> None:
    assert [human_size(size) for size in (0, 1023, 1 << 20, 1_570_000_000)] == ["0B", "1023B", "1MiB", "1.46GiB"]
