"""Before the start: is there room for the pool and for the disk tier, and where does the pool lie?"""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from kvd import preflight
from kvd.config import BadSetting, Loaded, load
from kvd.memory.host import Available

GIB = 1 << 30


def loaded(**flags: str | bool | list[str]) -> Loaded:
    return load({"socket": "/tmp/kvd-preflight.sock", **flags}, {}, None)


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that stands for /dev/shm, with 1 GiB free."""
    directory = tmp_path / "shm"
    directory.mkdir()
    monkeypatch.setattr(preflight, "SHARED_MEMORY", str(directory))
    monkeypatch.setattr(preflight, "is_memory_filesystem", lambda path: path == str(directory))
    set_free(monkeypatch, GIB)
    return directory


def set_free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    """Every file system has this much free."""
    found = os.statvfs_result((4096, 4096, free >> 12, free >> 12, free >> 12, 1, 1, 1, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda path: found)


# ---------------------------------------------------------------- the pool


def test_a_pool_larger_than_memory_is_refused() -> None:
    with pytest.raises(
        BadSetting, match=r"pool = '1024TiB' \(flag --pool\): larger than the .*; give less, for example"
    ):
        preflight.check(loaded(pool="1024TiB"))


def test_a_pool_directory_on_a_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "is_memory_filesystem", lambda directory: False)
    with pytest.raises(BadSetting, match=r"pool_dir = .*lies on a disk"):
        preflight.check(loaded(pool_dir=str(tmp_path)))


def test_the_pool_lies_in_a_directory_of_this_user_and_this_socket(shared: Path) -> None:
    directory, note = preflight.pool_directory(loaded(pool="512MiB").settings)
    assert note == ""
    assert directory is not None
    assert Path(directory).parent == shared / f"kvd-{os.getuid()}"
    assert directory == preflight.pool_directory(loaded(pool="1000MiB").settings)[0]
    assert preflight.pool_directory(loaded(pool="1GiB").settings)[0] is None, "no room for its tables"
    other = loaded(pool="512MiB", socket="/tmp/kvd-preflight-other.sock").settings
    assert directory != preflight.pool_directory(other)[0]
    assert list(shared.iterdir()) == [], "asking makes nothing"


def test_a_named_directory_and_none_are_taken_as_they_are(shared: Path) -> None:
    assert preflight.pool_directory(loaded(pool_dir=str(shared)).settings) == (str(shared), "")
    directory, note = preflight.pool_directory(loaded(pool_dir="none").settings)
    assert directory is None
    assert "a restart starts cold" in note


@pytest.mark.parametrize(
    ("flags", "why"),
    [({"pool": "2GiB"}, "has room for 1GiB only"), ({"pool": "1MiB", "huge_pages": True}, "huge pages are asked for")],
)
def test_where_a_file_will_not_do_the_pool_is_anonymous_and_it_is_said(
    shared: Path, flags: dict[str, str | bool], why: str
) -> None:
    directory, note = preflight.pool_directory(loaded(**flags).settings)
    assert directory is None
    assert note.startswith("a restart starts cold")
    assert why in note


def test_without_a_tmpfs_the_pool_is_anonymous(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "is_memory_filesystem", lambda path: False)
    directory, note = preflight.pool_directory(loaded(pool="1MiB").settings)
    assert directory is None
    assert "is no tmpfs here" in note


def test_the_pool_of_a_former_life_counts_as_room(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = loaded(pool="2GiB").settings
    directory = Path(preflight.own_pool_directory(settings.socket))
    preflight.make_private(str(directory))
    set_free(monkeypatch, GIB)
    with (directory / "kvd-pool-1").open("wb") as pool:
        os.posix_fallocate(pool.fileno(), 0, 8 << 20)
    held = (directory / "kvd-pool-1").stat().st_blocks * 512
    assert held >= 8 << 20
    set_free(monkeypatch, 2 * GIB + 2 * GIB // 512 - held)
    assert preflight.pool_directory(settings) == (str(directory), "")
    monkeypatch.setattr(preflight, "available_bytes", lambda *_: Available(2 * GIB - held, "left"))
    preflight.check(loaded(pool="2GiB"))
    (directory / "kvd-pool-1").unlink()
    assert preflight.pool_directory(settings)[0] is None


def test_a_directory_that_others_could_have_made_is_not_used(shared: Path) -> None:
    settings = loaded(pool="1MiB").settings
    directory = Path(preflight.own_pool_directory(settings.socket))
    directory.parent.mkdir()
    directory.parent.chmod(0o777)
    found, note = preflight.pool_directory(settings)
    assert found is None
    assert "others can write to" in note
    with pytest.raises(PermissionError):
        preflight.make_private(str(directory))
    directory.parent.rmdir()
    directory.parent.symlink_to("/tmp")
    assert preflight.pool_directory(settings)[0] is None
    with pytest.raises(PermissionError):
        preflight.make_private(str(directory))


def test_the_directory_is_made_for_this_user_alone(shared: Path) -> None:
    directory = preflight.own_pool_directory("/tmp/kvd-preflight.sock")
    preflight.make_private(directory)
    preflight.make_private(directory)
    for path in (directory, os.path.dirname(directory)):
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o700


# ---------------------------------------------------------------- the disk tier


def spilling(directory: Path, size: str = "1GiB", **flags: str) -> Loaded:
    return loaded(pool="1MiB", pool_dir="none", spill_dir=[str(directory)], spill=size, **flags)


@pytest.fixture
def drive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory on a disk; memory is not looked at."""
    monkeypatch.setattr(preflight, "is_memory_filesystem", lambda path: False)
    monkeypatch.setattr(preflight, "available_bytes", lambda *_: Available(GIB, "left"))
    return tmp_path


def test_a_drive_with_room_needs_no_word(
    drive: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    set_free(monkeypatch, 2 * GIB)
    preflight.check(spilling(drive))
    assert caplog.text == ""


def test_a_drive_with_less_room_is_used_as_far_as_it_goes_and_it_is_said(
    drive: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    set_free(monkeypatch, 3 * GIB // 2)
    preflight.check(spilling(drive))
    assert "has room for 512MiB of its 1GiB" in caplog.text


def test_a_drive_that_is_full_up_to_its_floor_is_refused(drive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_free(monkeypatch, GIB)
    with pytest.raises(BadSetting, match=r"spill_dir = .*has 1GiB free, and spill_floor keeps 1GiB.*there is no room"):
        preflight.check(spilling(drive))
    preflight.check(spilling(drive, spill_floor="512MiB"))


def test_what_is_spilled_there_already_counts_as_room(
    drive: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    directory = drive / "kvd-spill"
    directory.mkdir()
    with (directory / "00000001.extent").open("wb") as extent:
        os.posix_fallocate(extent.fileno(), 0, 16 << 20)
    set_free(monkeypatch, GIB)
    preflight.check(spilling(drive, "16MiB"))
    assert caplog.text == ""


def test_a_drive_in_memory_is_warned_of(
    drive: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(preflight, "is_memory_filesystem", lambda path: True)
    set_free(monkeypatch, 4 * GIB)
    preflight.check(spilling(drive))
    assert f"spill_dir: {drive} lies in memory" in caplog.text
