"""What a new daemon finds in the pool of a former one, whenever that one ended."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from kvd import failpoints, names
from kvd.memory import FAILPOINTS, generations, slot_format, slot_table
from kvd.memory.former import take_stock
from kvd.memory.pool import open_pool
from kvd.wire.lifeline import GRANULE_BYTES, TABLE_HEADER, TABLE_HEADER_BYTES
from tests.unit.memory.lives import LARGE, POOL_BYTES, SMALL, Life, expected, facts, found, namespace, successor

TRACED = {slot_table.__file__, generations.__file__, slot_format.__file__}


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
