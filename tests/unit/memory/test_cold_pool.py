"""What a new daemon does not believe of a former one's pool: why it starts cold, and what damage costs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvd import names
from kvd.memory import files, pool, slot_format
from kvd.memory.pool import open_pool
from kvd.types import ROOT
from kvd.wire.lifeline import GRANULE_BYTES
from tests.unit.memory.lives import LARGE, POOL_BYTES, SMALL, Life, found, successor

# ---------------------------------------------------------------- cold, and why


def cold(life: Life, **options: Any) -> str:
    """Why the next daemon starts cold; what it makes works."""
    after = successor(life, **options)
    assert after.pool.former is None and found(after) == []
    reason = after.pool.cold
    assert after.grant() == 0
    warm = successor(after, 0xFA7, **options)
    assert warm.pool.former is not None and len(found(warm)) == 1
    warm.end()
    return reason


def test_another_size_of_the_pool_is_cold(life: Life) -> None:
    assert cold(life, size=2 * POOL_BYTES) == f"the pool had another size: {POOL_BYTES} bytes, not {2 * POOL_BYTES}"


def test_other_pages_are_cold(life: Life) -> None:
    assert cold(life, huge_pages=True) == "huge pages were asked for, or not"


def test_another_boot_is_cold(life: Life, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "boot_id").write_text("01234567-89ab-cdef-0123-456789abcdef\n")
    monkeypatch.setattr(pool, "_BOOT_ID", str(tmp_path / "boot_id"))
    assert cold(life) == "it was left before this machine was started"


def test_another_format_is_cold(life: Life, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slot_format, "FORMAT", 2)
    assert cold(life) == "the slot table has format 1, this daemon writes 2"


@pytest.mark.parametrize("which", ["pool", "generations", "holders"])
def test_a_file_that_is_missing_or_not_the_one_that_it_was_is_cold(life: Life, which: str) -> None:
    path = getattr(life.journal._files, which)
    keep = os.open(path, os.O_RDONLY)  # its inode's number is not given to the copy
    data = Path(path).read_bytes()
    os.unlink(path)
    other = Life(str(Path(path).parent / "other"), 9)
    other.end()
    Path(path).write_bytes(data)
    os.chmod(path, 0o600)
    assert cold(life) == f"kvd-{which} is not the file that it was"
    os.close(keep)


@pytest.mark.parametrize("which", ["pool", "generations", "holders", "slots"])
def test_files_that_others_could_have_changed_are_cold(life: Life, which: str) -> None:
    os.chmod(getattr(life.journal._files, which), 0o620)
    assert cold(life) == f"kvd-{which} has mode 620: others could have changed it"


@pytest.mark.parametrize("which", ["pool", "generations", "slots"])
def test_a_file_that_was_cut_short_is_cold(life: Life, which: str) -> None:
    path = getattr(life.journal._files, which)
    life.end()
    os.truncate(path, os.stat(path).st_size - 64)
    after = Life(str(Path(path).parent), 5)
    assert after.pool.former is None and ("bytes, not" in after.pool.cold or "another size" in after.pool.cold)
    after.end()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_file_of_another_user_is_cold(life: Life) -> None:
    os.chown(life.journal._files.pool, 1234, -1)
    assert cold(life) == "kvd-pool belongs to user 1234"


def test_a_directory_that_others_can_write_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    os.chmod(tmp_path / "open", 0o777)
    with pytest.raises(PermissionError, match="others can write"):
        open_pool(POOL_BYTES, daemon_id=1, directory=str(tmp_path / "open"))
    os.chmod(tmp_path / "open", 0o1777)
    open_pool(POOL_BYTES, daemon_id=1, directory=str(tmp_path / "open")).close()


def test_a_pool_that_cannot_be_made_leaves_nothing_behind(directory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(28, "no space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="no space"):
        open_pool(POOL_BYTES, daemon_id=1, directory=directory)
    assert os.listdir(directory) == []


def test_in_a_hugetlbfs_lie_the_bytes_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shm").mkdir()
    monkeypatch.setattr(files, "SHARED_MEMORY", str(tmp_path / "shm"))
    magic = {str(tmp_path / "huge"): files.HUGETLBFS_MAGIC, str(tmp_path / "shm"): files.TMPFS_MAGIC}
    monkeypatch.setattr(files, "filesystem_magic", lambda path: magic.get(path, 0))
    life = Life(str(tmp_path / "huge"), 1)
    life.grant()
    assert os.listdir(tmp_path / "huge") == ["kvd-pool"]
    assert str(tmp_path / "shm") in life.journal._files.slots
    life.end()
    after = Life(str(tmp_path / "huge"), 2)
    assert len(found(after)) == 1
    after.pool.remove()
    after.end()
    assert [name for _, _, names in os.walk(tmp_path) for name in names] == []
    assert after.pool.directory is not None and not os.path.exists(after.pool.directory)


# ---------------------------------------------------------------- damage


def test_a_table_that_cannot_grow_costs_chunks_and_never_a_wrong_slot(
    directory: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    life = Life(directory, 1)

    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(28, "no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        lost = [life.grant() for _ in range(3)]
        for at in lost[:2]:
            assert at is not None
            life.ready(at)
            life.seal(at)
            life.use(at)
        assert lost[1] is not None
        life.free(lost[1])
    assert len([record for record in caplog.records if "cannot grow" in record.message]) == 1
    life.grant()
    after = successor(life)
    assert after.pool.former is not None and after.pool.former.skipped == {"in use and unknown": 2}
    assert len(found(after)) == 1
    after.end()


@pytest.mark.parametrize("held", [False, True])
def test_damage_is_cold_as_long_as_somebody_may_be_writing(life: Life, held: bool) -> None:
    holder = life.holders.hand_out(life.id)
    at = max(life.slots)
    life.journal._words[life.journal._entries[at]] ^= 1 << 40
    if not held:
        os.close(holder)
    after = successor(life)
    if held:
        assert after.pool.former is None
        assert "may be writing" in after.pool.cold and "1 damaged" in after.pool.cold
        os.close(holder)
    else:
        assert after.pool.former is not None and after.pool.former.skipped == {"damaged": 1, "in use and unknown": 1}
        assert at not in after.slots
        assert after.pool.segment.word(0, at) == 0
        after = successor(after, 3)
        assert after.pool.former is not None and after.pool.former.skipped == {}, "it was cleared away"
    after.end()


def test_a_ready_chunk_of_an_unknown_namespace_is_dropped_whoever_is_there(life: Life) -> None:
    holder = life.holders.hand_out(life.id)
    names.remove(life.journal._files.namespaces, SMALL.id)
    after = successor(life)
    assert after.pool.former is not None and after.pool.former.skipped == {"of an unknown namespace": 2}
    assert [entry.namespace_id for entry in after.pool.former.entries] == [LARGE.id]
    os.close(holder)
    after.end()


def test_entries_that_overlap_are_not_believed_either_of_them(life: Life) -> None:
    at = min(life.slots)
    entry = life.slots[at].entry
    del life.journal._entries[at]
    life.journal.granted(at, life.generation + 1, SMALL.id, b"k" * 32, ROOT, SMALL.chunk_bytes)
    life.journal.granted(POOL_BYTES, life.generation + 2, SMALL.id, b"k" * 32, ROOT, SMALL.chunk_bytes)
    life.journal.granted(100, life.generation + 3, SMALL.id, b"k" * 32, ROOT, SMALL.chunk_bytes)
    after = successor(life)
    assert after.pool.former is not None
    assert entry.offset not in after.slots and len(after.slots) == 2
    assert after.pool.former.skipped == {"outside the pool": 2, "of another generation": 1, "overlapping": 1}
    after.end()


def test_an_entry_where_no_slot_of_its_size_can_lie_is_not_believed(life: Life) -> None:
    end = POOL_BYTES - GRANULE_BYTES
    life.journal.granted(end, life.generation + 1, LARGE.id, b"k" * 32, ROOT, GRANULE_BYTES)
    large = max(life.slots)
    beside = large // life.allocator.region_bytes * life.allocator.region_bytes
    beside += GRANULE_BYTES * (6 if large == beside else 0)
    life.journal.granted(beside, life.generation + 2, SMALL.id, b"k" * 32, ROOT, SMALL.chunk_bytes)
    after = successor(life)
    assert after.pool.former is not None and len(after.slots) == 3
    assert after.pool.former.skipped == {"of another size than their namespace": 1, "where no slot can lie": 1}
    after.end()


DAMAGE = st.one_of(
    st.tuples(st.just("flip"), st.integers(0, 1 << 40), st.integers(0, 7)),
    st.tuples(st.just("zero"), st.integers(0, 1 << 40), st.sampled_from([8, 192, 4096])),
    st.tuples(st.just("noise"), st.integers(0, 1 << 40), st.integers(1, 64)),
    st.tuples(st.just("cut"), st.integers(0, 1 << 40), st.just(0)),
)


@settings(max_examples=150, deadline=None)
@given(
    steps=st.integers(1, 60),
    seed=st.integers(0, 1000),
    which=st.sampled_from(["slots", "generations"]),
    damages=st.lists(DAMAGE, min_size=1, max_size=4),
    held=st.booleans(),
)
def test_damage_costs_entries_and_never_invents_one(
    steps: int,
    seed: int,
    which: str,
    damages: list[tuple[str, int, int]],
    held: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    directory = str(tmp_path_factory.mktemp("damage"))
    life = Life(directory, 1, seed=seed)
    for _ in range(steps):
        life.step()
    holder = life.holders.hand_out(1) if held else None
    left = {slot.entry.offset: slot for slot in life.slots.values()}
    path = getattr(life.journal._files, which)
    life.end()
    # Where there is something: the headers, and the entries and words of a small pool.
    size = os.stat(path).st_size
    places = [(0, 1024), (slot_format.HEADER_BYTES, 12000)] if which == "slots" else [(0, size)]
    for kind, at, extent in damages:
        begin, length = places[at % len(places)]
        with open(path, "r+b") as file:
            where = begin + (at >> 8) % length
            file.seek(where)
            if kind == "flip":
                byte = file.read(1) or b"\0"
                file.seek(where)
                file.write(bytes([byte[0] ^ 1 << extent]))
            elif kind == "cut":
                file.truncate(where)
            else:
                file.write(bytes(extent) if kind == "zero" else os.urandom(extent))
        if kind == "cut":
            break
    after = Life(directory, 2)
    for entry in found(after):
        slot = left[entry[0]]  # type: ignore[index]
        assert entry[:7] == slot.expected[:7] and entry[8] == slot.expected[8]
        assert entry[7] in (None, slot.checksum)
    if held and after.pool.former is not None:
        written = {offset for offset, slot in left.items() if slot.published and not slot.ready}
        assert written <= set(after.slots), "somebody may be writing there"
    assert after.allocator.audit() == []
    assert after.grant() is not None
    after.end()
    if holder is not None:
        os.close(holder)
