"""The presence table: what the daemon writes is what every reader reads, in C and in Python, and never a false miss."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import mmap
import os
import random
import shutil
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvd.memory import presence
from kvd.memory.presence import MAX_BUCKETS, MIN_BUCKETS, PresenceTable, buckets_for
from kvd.wire import presence as wire
from kvd.wire.presence import ASK_ALWAYS, HEADER, HEADER_WORDS, MAGIC, OVERFLOW, TAGS, VERSION, place, table_bytes

BUILT = importlib.util.find_spec("kvd_client._presence") is not None
needs_c = pytest.mark.skipif(not BUILT, reason="the client was installed without a compiler")

Reader = Callable[[memoryview, bytes, Sequence[bytes]], int]  # type: ignore[type-arg]


def in_c() -> Reader:
    from kvd_client._presence import may_hold

    return may_hold


READERS = [pytest.param(lambda: wire.may_hold, id="python"), pytest.param(in_c, id="c", marks=needs_c)]


@contextmanager
def table_of(expected_keys: int = 0, daemon_id: int = 7, *, ask_always: bool = False) -> Iterator[PresenceTable]:
    table = PresenceTable(expected_keys, daemon_id, ask_always=ask_always)
    try:
        yield table
    finally:
        table.close()


@contextmanager
def words_of(table: PresenceTable) -> Iterator[memoryview]:
    """What a client maps."""
    with (
        mmap.mmap(table.fd, table.size_bytes, prot=mmap.PROT_READ) as mapping,
        memoryview(mapping) as raw,
        raw.cast("Q") as words,
    ):
        yield words


def name(number: int) -> bytes:
    return number.to_bytes(32, "big")


def space(number: int) -> bytes:
    """A namespace id: a digest, as they all are."""
    return hashlib.sha256(name(number)).digest()


@functools.cache
def of_one_bucket(count: int, buckets: int = MIN_BUCKETS) -> list[bytes]:
    """Keys that fall into the bucket of the first of them."""
    dice = random.Random(1)
    found = [dice.randbytes(32)]
    while len(found) < count:
        key = dice.randbytes(32)
        if place(space(0), key, buckets)[0] == place(space(0), found[0], buckets)[0]:
            found.append(key)
    return found


# ---------------------------------------------------------------- format


def test_the_table_says_what_it_is() -> None:
    with table_of(daemon_id=99) as table, words_of(table) as words:
        assert HEADER.unpack_from(words.cast("B")) == (MAGIC, VERSION, 99, MIN_BUCKETS, 0)
        assert table.size_bytes == table_bytes(MIN_BUCKETS) == os.fstat(table.fd).st_size


def test_nobody_can_write_through_what_clients_get() -> None:
    with table_of() as table:
        with pytest.raises(OSError):
            os.write(table.fd, b"x")
        with pytest.raises(PermissionError):
            mmap.mmap(table.fd, table.size_bytes)
        with pytest.raises(PermissionError):
            os.close(os.open(f"/proc/self/fd/{table.fd}", os.O_RDWR | os.O_TRUNC))


def test_the_expected_keys_take_a_third_of_the_tags_at_most() -> None:
    for keys in (1, MIN_BUCKETS * TAGS // 3, MIN_BUCKETS * TAGS // 3 + 1, 10**5, 10**6, MAX_BUCKETS * TAGS // 3):
        buckets = buckets_for(keys)
        assert buckets & (buckets - 1) == 0
        assert keys * 3 <= buckets * TAGS
        assert buckets == MIN_BUCKETS or keys * 3 > buckets // 2 * TAGS
    assert (buckets_for(0), buckets_for(10**9)) == (MIN_BUCKETS, MAX_BUCKETS)


@pytest.mark.parametrize("shift", [0, 56, 64, 120, 184, 240])
def test_poor_keys_are_spread_over_the_buckets(shift: int) -> None:
    keys = [(number << shift).to_bytes(32, "little") for number in range(1 << 12)]
    places = [place(space(5), key, 1 << 10) for key in keys]
    assert max(Counter(first for first, _ in places).values()) < 24  # of 4 on the average
    assert len(set(places)) == len(keys)


# ---------------------------------------------------------------- readers


@pytest.mark.parametrize("reader", READERS)
def test_the_leading_keys_are_counted(reader: Callable[[], Reader]) -> None:
    may_hold = reader()
    here, gone = [name(number) for number in range(200)], name(1000)
    with table_of() as table, words_of(table) as words:
        for key in here:
            table.add(space(1), key)
        assert may_hold(words, space(1), here) == 200
        assert may_hold(words, space(1), tuple(here[:3])) == 3
        assert may_hold(words, space(1), [*here[:70], gone, *here[70:]]) == 70
        assert may_hold(words, space(1), [gone, *here]) == 0
        assert may_hold(words, space(2), here) == 0
        assert may_hold(words, space(1), []) == 0


@pytest.mark.parametrize("reader", READERS)
def test_a_key_of_the_wrong_length_is_the_daemons_to_judge(reader: Callable[[], Reader]) -> None:
    with table_of() as table, words_of(table) as words:
        assert reader()(words, space(1), [b"", bytes(31), bytes(33), name(3)]) == 3


@pytest.mark.parametrize("reader", READERS)
def test_a_table_that_does_not_count_says_maybe(reader: Callable[[], Reader]) -> None:
    with table_of(ask_always=True) as table, words_of(table) as words:
        assert reader()(words, space(1), [name(3), name(4)]) == 2
    table = PresenceTable(0, 1)
    with words_of(table) as words:
        assert reader()(words, space(1), [name(3)]) == 0
        table.close()
        assert reader()(words, space(1), [name(3)]) == 1
        table.add(space(1), name(3))  # what is still under way in the daemon
        table.remove(space(1), name(3))


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("size", [0, 4096, 4096 + 63, 4096 + 3 * 64])
def test_what_is_no_table_is_not_read(reader: Callable[[], Reader], size: int) -> None:
    whole = memoryview(bytearray(size - size % 8)).cast("Q")
    with pytest.raises(ValueError, match="no presence table"):
        reader()(whole, space(1), [name(2)])


@needs_c
def test_the_reader_in_c_takes_nothing_that_it_cannot_read() -> None:
    may_hold = in_c()
    with table_of() as table, words_of(table) as words:
        for wrong in (None, 3, [None], ["key"], [bytearray(32)], [3]):
            with pytest.raises(TypeError):
                may_hold(words, space(1), wrong)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="namespace id"):
            may_hold(words, bytes(31), [name(1)])
        for short in (bytes(100), memoryview(bytes(table.size_bytes + 1))[1:-64]):
            with pytest.raises(ValueError, match="no presence table"):
                may_hold(short, space(1), [name(1)])  # type: ignore[arg-type]


@pytest.mark.skipif(
    not (shutil.which("cc") and Path(sysconfig.get_path("include"), "Python.h").exists()), reason="no compiler here"
)
def test_the_reader_in_c_is_built_where_there_is_a_compiler() -> None:
    assert BUILT, f"{sys.executable} -m pip install -e . builds it"
    from kvd_client import presence as client

    assert client.may_hold is in_c()


# ---------------------------------------------------------------- what stays true


@pytest.mark.parametrize("reader", READERS)
def test_a_full_bucket_says_maybe_until_the_last_key_without_a_tag_has_gone(reader: Callable[[], Reader]) -> None:
    may_hold = reader()
    *keys, stranger = of_one_bucket(TAGS + 3)
    with table_of() as table, words_of(table) as words:
        for key in keys[:TAGS]:
            table.add(space(0), key)
        assert may_hold(words, space(0), [stranger]) == 0
        for key in keys[TAGS:]:
            table.add(space(0), key)
        assert may_hold(words, space(0), [*keys, stranger]) == len(keys) + 1
        for key in keys[:TAGS]:
            table.remove(space(0), key)
        assert may_hold(words, space(0), keys[TAGS:]) == 2
        for key in keys[TAGS:]:
            table.remove(space(0), key)
        assert len(table) == 0
        assert [may_hold(words, space(0), [key]) for key in [*keys, stranger]] == [0] * (len(keys) + 1)


def test_of_two_keys_with_one_tag_the_other_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(presence, "place", lambda namespace_id, key, buckets: (HEADER_WORDS, 5))
        with table_of() as table, words_of(table) as words:
            table.add(space(0), name(1))
            table.add(space(0), name(2))
            table.remove(space(0), name(1))
            assert 5 in words[HEADER_WORDS : HEADER_WORDS + TAGS].tolist()
            table.remove(space(0), name(2))
            assert not any(words[HEADER_WORDS:])


def test_what_was_never_added_is_not_counted_out() -> None:
    with table_of() as table:
        table.add(space(1), name(2))
        table.remove(space(1), name(3))
        assert len(table) == 1
        assert table.may_hold(space(1), name(2))


Steps = st.lists(st.tuples(st.booleans(), st.integers(0, 1), st.integers(0, 60)), max_size=300)


@settings(max_examples=60, deadline=None)
@given(steps=Steps, crowd=st.integers(0, 12), asked=st.lists(st.integers(0, 80), max_size=40))
def test_every_reader_says_what_a_set_would_or_maybe(
    steps: list[tuple[bool, int, int]], crowd: int, asked: list[int]
) -> None:
    crowded = of_one_bucket(13)[:crowd]
    keys = [*crowded, *(name(number) for number in range(len(crowded), 81))]
    held: set[tuple[bytes, bytes]] = set()
    with table_of() as table, words_of(table) as words:
        for key in crowded[: TAGS + 1]:  # from here on keys without a tag come and go
            held.add((space(0), key))
            table.add(space(0), key)
        for add, owner, number in steps:
            one = (space(owner), keys[number])
            if add and one not in held:
                held.add(one)
                table.add(*one)
            elif not add and one in held:
                held.remove(one)
                table.remove(*one)
        assert len(table) == len(held) == tags_and_overflow(words)
        readers = [wire.may_hold, *([in_c()] if BUILT else [])]
        for number in (0, 1):
            wanted = [keys[one] for one in asked]
            leading = next((i for i, key in enumerate(wanted) if (space(number), key) not in held), len(wanted))
            answers = {reader(words, space(number), wanted) for reader in readers}
            assert len(answers) == 1 and min(answers) >= leading
            for key in keys:
                answers = {reader(words, space(number), [key]) for reader in readers}
                full = words[place(space(number), key, MIN_BUCKETS)[0] + OVERFLOW] > 0
                assert answers == {int(full or (space(number), key) in held)}


def tags_and_overflow(words: memoryview) -> int:
    """Keys in the table, counted in the table itself."""
    counted, buckets = 0, words[HEADER_WORDS:].tolist()
    for first in range(0, len(buckets), TAGS + 1):
        bucket = buckets[first : first + TAGS + 1]
        counted += sum(map(bool, bucket[:TAGS])) + bucket[OVERFLOW]
    return counted


def test_the_flag_is_a_bit_of_its_word() -> None:
    with table_of(ask_always=True) as table, words_of(table) as words:
        assert words[wire.FLAGS_WORD] == ASK_ALWAYS
