"""Frames of the local plane: what goes in comes out, and what is no frame is refused, whatever it is."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvd import store
from kvd.wire import calls as wire
from kvd.wire import errors
from kvd.wire.chunks import ROOT, Location, Stripe

KEYS = [bytes([number]) * 32 for number in range(1, 5)]
NAMESPACE = bytes(range(32))

u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
keys = st.binary(min_size=32, max_size=32)
key_lists = st.lists(keys, max_size=20)
slots = st.lists(st.builds(Location, u32, u64, u64), max_size=20)
requests = st.one_of(
    st.builds(wire.Lookup, keys, u64, key_lists, u32, st.booleans()),
    st.builds(wire.Reserve, keys, u64, st.lists(st.tuples(keys, st.one_of(st.just(ROOT), keys)), max_size=20)),
    st.builds(
        lambda name, lease, path, first: wire.Reserve(name, lease, list(zip(path, [first, *path], strict=False))),
        keys,
        u64,
        key_lists,
        st.one_of(st.just(ROOT), keys),
    ),
    st.builds(wire.Commit, keys, u64, key_lists, st.lists(st.builds(Stripe, u32, u32, u32, u32), max_size=20)),
    st.builds(wire.Abort, keys, u64, key_lists),
    st.builds(wire.Release, st.lists(u64, max_size=20)),
    st.builds(wire.Renew, st.lists(u64, max_size=20)),
)


@given(requests, u64, st.tuples(u32, u32), st.lists(u64, max_size=5))
def test_a_request_comes_out_as_it_went_in(
    request: wire.Request, number: int, missed: tuple[int, int], released: list[int]
) -> None:
    frame = wire.pack_request(request, number, missed, released)
    assert wire.frame_length(frame) == len(frame)
    head, found = wire.unpack_request(frame)
    assert head == (wire.op_of(request), number, *missed, tuple(released))
    assert type(found) is type(request)
    assert found == request


def test_a_chain_of_chunks_is_said_with_its_first_parent_only() -> None:
    chain = wire.Reserve(NAMESPACE, 1, list(zip(KEYS, [ROOT, *KEYS], strict=False)))
    branches = wire.Reserve(NAMESPACE, 1, [(key, KEYS[0]) for key in KEYS])
    chained, explicit = wire.pack_request(chain, 1), wire.pack_request(branches, 1)
    assert len(explicit) - len(chained) == 3 * 33
    assert wire.unpack_request(chained)[1] == chain
    assert wire.unpack_request(explicit)[1] == branches


@given(slots, u32, u32)
def test_what_a_lookup_found_comes_out_as_it_went_in(found: list[Location], promoting: int, writing: int) -> None:
    frame = wire.pack_answer(wire.Op.LOOKUP, 7, wire.pack_found(found, promoting, writing))
    number, op, body = wire.unpack_answer(frame)
    assert (number, op) == (7, wire.Op.LOOKUP)
    assert isinstance(body, memoryview)
    assert wire.unpack_found(body) == (found, promoting, writing)


@given(st.lists(st.integers(0, 255), max_size=20), slots)
def test_what_a_reserve_granted_comes_out_as_it_went_in(statuses: list[int], granted: list[Location]) -> None:
    said, where = wire.unpack_reserved(memoryview(wire.pack_reserved(statuses, granted)))
    assert (list(said), where) == (statuses, granted)


def test_every_error_of_the_daemon_comes_out_as_itself() -> None:
    ours = {errors.Unavailable, errors.DeadlineExceeded}  # the client says these
    for kind in set(errors.BY_REASON.values()) - ours:
        number, op, error = wire.unpack_answer(wire.pack_failure(wire.Op.ABORT, 3, kind("so it is")))
        assert (number, op) == (3, wire.Op.ABORT)
        assert type(error) is kind
        assert str(error) == "so it is"
    for kind in ours:
        assert type(wire.unpack_answer(wire.pack_failure(wire.Op.ABORT, 3, kind()))[2]) is errors.KvdError
    frame = bytearray(wire.pack_failure(wire.Op.ABORT, 3, errors.Draining("later")))
    frame[5] = 250  # a reason that a later daemon has
    assert type(wire.unpack_answer(frame)[2]) is errors.KvdError
    long = wire.pack_failure(wire.Op.ABORT, 3, errors.Draining("ä" * 5000))
    assert len(long) <= wire.ANSWER.size + wire.MAX_TEXT_BYTES
    assert isinstance(wire.unpack_answer(long)[2], errors.Draining)


@given(st.binary(max_size=300))
def test_garbage_is_refused_and_nothing_worse(garbage: bytes) -> None:
    for unpack in (wire.unpack_request, wire.unpack_answer):
        with pytest.raises(wire.BadFrame):
            unpack(struct.pack("<I", len(garbage) + 5) + garbage)  # whose length is not its own
    for read in (wire.unpack_found, wire.unpack_reserved, wire.unpack_bytes, wire.unpack_count):
        try:
            read(memoryview(garbage))
        except wire.BadFrame:
            pass


@given(requests, st.data())
def test_a_frame_that_was_tampered_with_is_refused_or_another_request(
    request: wire.Request, data: st.DataObject
) -> None:
    frame = bytearray(wire.pack_request(request, 1))
    at = data.draw(st.integers(4, len(frame) - 1))
    frame[at] ^= data.draw(st.integers(1, 255))
    try:
        head, found = wire.unpack_request(frame)
    except wire.BadFrame:
        return
    assert wire.unpack_request(wire.pack_request(found, head.request_id, head[2:4], head.released))[1] == found


@given(requests, st.data())
def test_a_frame_that_was_cut_is_refused(request: wire.Request, data: st.DataObject) -> None:
    frame = wire.pack_request(request, 1)
    short = frame[: data.draw(st.integers(0, len(frame) - 1))]
    with pytest.raises(wire.BadFrame):
        wire.unpack_request(short)
    with pytest.raises(wire.BadFrame):
        wire.unpack_request(struct.pack("<I", len(short)) + short[4:])


@pytest.mark.parametrize("released", [wire.MAX_RELEASED + 1, 0xFFFF])
def test_more_releases_than_a_request_takes_along_are_refused(released: int) -> None:
    wire.unpack_request(wire.pack_request(wire.Renew(), 1, released=[1] * wire.MAX_RELEASED))
    with pytest.raises(wire.BadFrame):
        wire.unpack_request(wire.pack_request(wire.Renew(), 1, released=[1] * released))


def test_flags_that_an_operation_does_not_have_are_refused() -> None:
    for request in (wire.Renew(), wire.Abort(NAMESPACE, 1), wire.Lookup(NAMESPACE, 1, KEYS)):
        frame = bytearray(wire.pack_request(request, 1))
        frame[5] |= 0x80
        with pytest.raises(wire.BadFrame, match="flags"):
            wire.unpack_request(frame)


@pytest.mark.parametrize("most", [1, 16, 4096])
def test_whatever_the_daemon_takes_fits_the_bounds(most: int) -> None:
    chunks = [bytes(32)] * most
    stripes = [Stripe(0, 1, 0, 1)] * wire.MAX_STRIPES
    for request in (
        wire.Lookup(NAMESPACE, 1, chunks),
        wire.Reserve(NAMESPACE, 1, [(key, bytes([1]) * 32) for key in chunks]),
        wire.Commit(NAMESPACE, 1, chunks, stripes),
        wire.Abort(NAMESPACE, 1, chunks),
        wire.Release([1] * store.Limits().max_leases_per_session),
    ):
        frame = wire.pack_request(request, 1, released=[1] * wire.MAX_RELEASED)
        assert len(frame) <= wire.max_request_bytes(most)
    places = [Location(0, 0, 1)] * most
    for body in (
        wire.pack_found(places, 0, 0),
        wire.pack_reserved([1] * most, places),
        wire.pack_bytes([1] * max(most, store.Limits().max_leases_per_session)),
        b"e" * wire.MAX_TEXT_BYTES,
    ):
        assert len(wire.pack_answer(wire.Op.LOOKUP, 1, body)) <= wire.max_answer_bytes(most)


@pytest.mark.parametrize(
    "request_", [wire.Renew([-1]), wire.Lookup(NAMESPACE, 1 << 64, []), wire.Lookup(NAMESPACE, 1, [], -1)]
)
def test_what_does_not_fit_a_field_is_never_sent(request_: wire.Request) -> None:
    with pytest.raises(struct.error):
        wire.pack_request(request_, 1)
