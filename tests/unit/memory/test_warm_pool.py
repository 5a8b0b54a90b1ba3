"""What a new daemon finds in the pool of a former one, whenever that one ended and whatever was damaged since."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvd import failpoints, names
from kvd.memory import FAILPOINTS, files, generations, pool, slot_format, slot_table
from kvd.memory.former import take_stock
from kvd.memory.pool import open_pool
from kvd.types import ROOT
from kvd.wire.lifeline import GRANULE_BYTES, TABLE_HEADER, TABLE_HEADER_BYTES
from tests.unit.memory.lives import LARGE, POOL_BYTES, SMALL, Life, facts, namespace

TRACED = {slot_table.__file__, generations.__file__, slot_format.__file__}


@pytest.fixture
def directory(tmp_path: Path) -> str:
    return str(tmp_path / "pool")


@pytest.fixture
def life(directory: str) -> Iterator[Life]:
    """A daemon with a READY and sealed chunk, its READY child, and a slot that is being written."""
    life = Life(directory, daemon_id=0xA11CE)
    first = life.grant()
    assert first is not None
    second = life.grant(parent=life.slots[first].entry.key)
    assert second is not None
    life.grant(LARGE)
    for at in (first, second):
        life.ready(at)
    life.seal(first)
    yield life


def successor(life: Life, daemon_id: int = 0xB0B, **options: Any) -> Life:
    """The next daemon."""
    life.end()
    return Life(str(Path(life.journal._files.slots).parent), daemon_id, **options)


def found(life: Life) -> list[tuple[object, ...]]:
    """What a daemon was left."""
    return [] if life.pool.former is None else [facts(entry) for entry in life.pool.former.entries]


def expected(life: Life) -> list[tuple[object, ...]]:
    return [slot.expected for _, slot in sorted(life.slots.items())]


# ---------------------------------------------------------------- a new life


def test_a_new_life_finds_every_chunk_and_every_slot_that_was_being_written(life: Life) -> None:
    life.pool.segment.data[:5] = b"bytes"
    left, inode = expected(life), life.pool.segment.generations.inode
    last, populated = life.generation, life.pool.segment.populated_bytes
    after = successor(life)
    former = after.pool.former
    assert former is not None and after.pool.cold == ""
    assert found(after) == left and former.skipped == {} and former.life == 0xA11CE
    assert former.namespaces == {SMALL.id: SMALL, LARGE.id: LARGE}
    assert former.last_generation >= last
    assert bytes(after.pool.segment.data[:5]) == b"bytes"
    assert after.pool.segment.populated_bytes == populated
    assert after.pool.segment.generations.inode == inode
    assert after.allocator.audit() == []
    after.end()


def test_hints_come_back_too(life: Life) -> None:
    at = min(life.slots)
    life.journal.used(at, 12345, 67)
    after = successor(life)
    assert after.pool.former is not None
    assert (after.pool.former.entries[0].touched, after.pool.former.entries[0].uses) == (12345, 67)
    after.journal.used(at, 1 << 60, 1 << 40)
    again = successor(after, 0xCA7)
    assert again.pool.former is not None
    assert (again.pool.former.entries[0].touched, again.pool.former.entries[0].uses) == ((1 << 44) - 1, (1 << 20) - 1)
    again.end()


def test_lives_follow_each_other_and_nothing_gets_lost_or_repeated(directory: str) -> None:
    life = Life(directory, 1)
    seen: set[int] = set()
    for number in range(2, 12):
        for _ in range(40):
            life.step()
        granted = {slot.entry.generation for slot in life.slots.values() if slot.entry.life == life.id}
        assert not granted & seen
        seen |= granted
        left, last = expected(life), life.generation
        life = successor(life, number, seed=number)
        assert found(life) == left
        assert life.pool.former is not None and life.pool.former.last_generation >= last
        for offset, slot in life.slots.items():
            word = life.pool.segment.word(0, offset)
            assert word == (slot.entry.generation if slot.ready else 0)
    life.end()


def test_a_generation_is_never_given_twice_even_when_its_slot_was_freed(life: Life) -> None:
    for _ in range(3):
        at = life.grant()
        assert at is not None
        life.free(at)
    last = life.generation
    for at in list(life.slots):
        life.free(at)
    after = successor(life)
    assert after.pool.former is not None and after.pool.former.entries == []
    assert after.pool.former.last_generation >= last
    after.end()


def test_readers_of_the_former_life_see_what_the_new_one_retracts(life: Life) -> None:
    ready, writing = min(life.slots), max(life.slots)
    table = mmap.mmap(life.pool.segment.table_fd, life.pool.segment.info.table_bytes, prot=mmap.PROT_READ)

    def word(offset: int) -> int:
        at = TABLE_HEADER_BYTES + offset // GRANULE_BYTES * 8
        return int.from_bytes(table[at : at + 8], "little")

    generation = life.slots[ready].entry.generation
    assert word(ready) == generation and word(writing) != 0
    after = successor(life)
    assert word(ready) == generation and word(writing) == 0
    assert TABLE_HEADER.unpack_from(table)[4] == 0xB0B
    after.free(ready)
    assert word(ready) == 0
    table.close()
    after.end()


def test_a_slot_that_was_being_retracted_is_found_and_frees_like_any_other(life: Life) -> None:
    at = min(life.slots)
    life.retract(at)
    after = successor(life)
    assert at in after.slots and after.pool.former is not None and after.pool.former.skipped == {}
    after.free(at)
    again = successor(after, 3)
    assert at not in again.slots
    again.end()


def test_namespaces_of_which_nothing_is_left_are_forgotten(life: Life) -> None:
    life.free(max(life.slots))  # the only large one
    after = successor(life)
    assert after.pool.former is not None and list(after.pool.former.namespaces) == [SMALL.id]
    assert list(names.load(after.journal._files.namespaces)) == [SMALL.id]
    after.end()


def test_the_files_are_this_users_alone(life: Life) -> None:
    for path in life.journal._files:
        assert os.stat(path).st_mode & 0o077 == 0
    assert os.stat(Path(life.journal._files.slots).parent).st_mode & 0o777 == 0o700
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.pwrite(life.pool.segment.table_fd, b"x", 0)
    with pytest.raises(PermissionError):
        mmap.mmap(life.pool.segment.table_fd, 1024)
    life.end()


def test_removed_files_are_gone_and_the_memory_stays_with_its_users(life: Life, directory: str) -> None:
    life.pool.remove()
    assert os.listdir(directory) == []
    assert bytes(life.pool.segment.data[:1]) == b"\0"
    after = successor(life)
    assert after.pool.former is None and after.pool.cold == "there is no pool of a former daemon"
    after.end()


def test_an_anonymous_pool_has_no_journal() -> None:
    anonymous = open_pool(POOL_BYTES, daemon_id=1)
    assert (anonymous.journal, anonymous.holders, anonymous.former) == (None, None, None)
    anonymous.remove()
    anonymous.close()


# ---------------------------------------------------------------- killed at any instant


def check(life: Life) -> None:
    """What would be found now is what there is, but for the step that is under way."""
    table = life.pool.segment.generations
    stock = take_stock(life.journal.read(), table, names.load(life.journal._files.namespaces), POOL_BYTES)
    assert stock.skipped == {}
    published = [slot.entry.generation for slot in life.slots.values() if slot.published]
    assert max(published, default=-1) < life.journal._bound * slot_format.GENERATION_STEP
    known = {entry.offset: facts(entry) for entry in stock.entries.values()}
    assert len(known) == len(stock.entries)
    for offset, slot in life.slots.items():
        if offset not in life.doing:
            assert known.pop(offset) == slot.expected
            continue
        entry = known.pop(offset, None)
        assert entry is not None or not slot.published, "somebody may be using it"
        if entry is not None:
            assert entry[:6] == slot.expected[:6]
            assert entry[7] is None or entry[6], "only a READY chunk has a checksum"
    assert known == {}


def test_whenever_a_daemon_ends_between_two_stores_the_next_one_reads_the_table_rightly(directory: str) -> None:
    life = Life(directory, 1, seed=7)
    checks = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal checks
        if frame.f_code.co_filename not in TRACED:
            return None
        if event == "line":
            check(life)
            checks += 1
        return trace

    sys.settrace(trace)
    try:
        for _ in range(150):
            life.step()
    finally:
        sys.settrace(None)
    assert checks > 1000 and len(life.slots) > 10
    life.end()


def test_a_body_that_is_half_written_is_not_there(life: Life) -> None:
    at = min(life.slots)
    word = life.journal._entries[at]
    life.free(at)
    before = expected(life)
    begin = word * 8 + slot_format.BODY_BYTE
    for length in range(0, slot_format.ENTRY_BYTES - slot_format.BODY_BYTE, 3):
        life.journal._map[begin : begin + length] = os.urandom(length)
        stock = life.journal.read()
        assert stock.damaged == 0
        assert sorted(facts(entry) for entry in stock.intact.values()) == sorted(before)
    life.end()


@pytest.mark.parametrize("name", FAILPOINTS)
def test_a_daemon_killed_at_a_fail_point_leaves_a_pool_that_can_be_taken_over(name: str, directory: str) -> None:
    first = Life(directory, 1, seed=3)
    for _ in range(0 if name.startswith("pool.grow") else 30):
        first.step()
    left = expected(first)
    first.end()
    if name.startswith("pool.create"):
        os.unlink(first.journal._files.slots)
        left = []
    if name.startswith("pool.forget"):
        names.save(first.journal._files.namespaces, namespace("of nobody", 4096))
    child = os.fork()
    if child == 0:
        try:
            failpoints._name, failpoints._left = name, 1
            second = Life(directory, 2, seed=4)
            second.described.clear()
            for _ in range(60):
                second.step()
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, f"{name} was not reached"
    third = Life(directory, 3)
    former = third.pool.former
    if former is None:
        assert name in ("pool.create.before", "pool.create.named")
    else:
        assert former.skipped == {}
        kept = [entry for entry in found(third) if entry in left]
        if name.startswith(("pool.recovery", "pool.forget", "pool.create")):
            assert kept == left
        assert {entry[8] for entry in found(third)} <= {1, 2}
    third.end()


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


def test_the_pools_bytes_are_not_read(life: Life, monkeypatch: pytest.MonkeyPatch) -> None:
    life.end()
    fd = os.open(life.journal._files.pool, os.O_RDONLY)
    after = Life(str(Path(life.journal._files.pool).parent), 2)
    assert after.pool.segment.populated_bytes == 0 == os.fstat(fd).st_blocks
    vector = (ctypes.c_ubyte * (POOL_BYTES // mmap.PAGESIZE))()
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    assert libc.mincore(after.pool.segment.address, POOL_BYTES, vector) == 0
    assert not any(vector)
    os.close(fd)
    after.end()
