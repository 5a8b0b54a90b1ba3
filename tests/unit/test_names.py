"""The files that say what a namespace id means: whole or not there, and never believed on their word."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import MappingProxyType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvd import names
from kvd.types import Namespace
from kvd.wire.identity import MAX_EXTRA, MAX_FIELD_CHARS, Identity


def namespace(model: str = "a model", tenant: str = "default", chunk_bytes: int = 8192, **more: str) -> Namespace:
    identity = Identity(model=model, weights_revision="7", num_layers=4, extra=MappingProxyType(more))
    return Namespace(identity.namespace_id(tenant), tenant, identity, chunk_bytes)


def file_of(directory: Path, one: Namespace) -> Path:
    return directory / (one.id.hex() + ".json")


def test_what_was_saved_is_loaded_and_what_was_removed_is_not(tmp_path: Path) -> None:
    directory = str(tmp_path / "namespaces")
    assert names.load(directory) == {}
    kept, gone = namespace("kept", lora="x"), namespace("gone")
    for one in (kept, gone, kept):
        names.save(directory, one)
    assert names.load(directory) == {kept.id: kept, gone.id: gone}
    names.remove(directory, gone.id)
    names.remove(directory, gone.id)
    assert names.load(directory) == {kept.id: kept}
    assert os.stat(directory).st_mode & 0o777 == 0o700
    assert os.stat(file_of(Path(directory), kept)).st_mode & 0o777 == 0o600


def test_the_longest_identity_that_is_accepted_fits(tmp_path: Path) -> None:
    long = "\U0001f600" * MAX_FIELD_CHARS
    texts = dict.fromkeys(
        ("model", "weights_revision", "kv_dtype", "attention_backend", "platform", "head_sizes", "page_layout"), long
    )
    extra = {long[:-3] + f"{i:03}": long for i in range(MAX_EXTRA)}
    identity = Identity(**texts, hash_algorithm=long, extra=MappingProxyType(extra))
    largest = Namespace(identity.namespace_id("tenant"), "tenant", identity, (1 << 63) - 1)
    names.save(str(tmp_path), largest)
    assert file_of(tmp_path, largest).stat().st_size <= names.MAX_FILE_BYTES
    assert names.load(str(tmp_path)) == {largest.id: largest}


def test_an_interrupted_save_leaves_the_file_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = namespace()
    names.save(str(tmp_path), one)

    def fail(fd: int) -> None:
        raise OSError(5, "input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="input/output"):
        names.save(str(tmp_path), one)
    assert names.load(str(tmp_path)) == {one.id: one}


@pytest.mark.parametrize(
    "change",
    [
        {"chunk_bytes": 4096},
        {"chunk_bytes": "8192"},
        {"chunk_bytes": -1},
        {"format": 2},
        {"checksum": "00"},
        {"namespace": {"tenant": "another", "identity": {}, "extra": {}}},
        {"namespace": []},
    ],
)
def test_content_that_does_not_make_the_id_is_not_believed(tmp_path: Path, change: dict[str, object]) -> None:
    one = namespace()
    names.save(str(tmp_path), one)
    file = file_of(tmp_path, one)
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    assert names.load(str(tmp_path)) == {}


def test_another_tenants_file_is_not_taken_for_this_ones(tmp_path: Path) -> None:
    mine, other = namespace(tenant="mine"), namespace(tenant="other")
    names.save(str(tmp_path), mine)
    file_of(tmp_path, mine).rename(file_of(tmp_path, other))
    assert names.load(str(tmp_path)) == {}


def test_foreign_files_are_left_out_and_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one = namespace()
    names.save(str(tmp_path), one)
    (tmp_path / "README").write_text("hello")
    (tmp_path / ("0" * 64 + ".json")).symlink_to("/etc/passwd")
    (tmp_path / ("1" * 64 + ".json")).mkdir()
    os.mkfifo(tmp_path / ("2" * 64 + ".json"))
    (tmp_path / ("3" * 64 + ".json")).write_bytes(b" " * (names.MAX_FILE_BYTES + 1))
    (tmp_path / ("4" * 64 + ".json")).write_bytes(b"[" * 100_000)
    (tmp_path / (one.id.hex() + ".json.new")).write_bytes(b"half")
    before = sorted(os.listdir(tmp_path))
    assert names.load(str(tmp_path)) == {one.id: one}
    assert len(caplog.records) == 6
    assert sorted(os.listdir(tmp_path)) == before


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_damage_is_noticed_whatever_it_is(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("names")
    one = namespace(lora="adapter")
    names.save(str(directory), one)
    file = file_of(directory, one)
    content = bytearray(file.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[at] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del content[at:]
    file.write_bytes(content)
    assert names.load(str(directory)) in ({}, {one.id: one})
