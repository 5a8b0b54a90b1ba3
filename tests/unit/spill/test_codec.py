"""Compression keeps every byte, keeps out of the way where it does not pay, and is safe whatever it is given."""

from __future__ import annotations

import builtins
import gc
import random
from pathlib import Path
from typing import Any

import pytest

from kvd.spill import codec
from kvd.spill.codec import BLOCK_BYTES, Encoder, MissingLibrary, Undecodable, decode
from kvd.spill.transfer import checksum_of
from kvd.types import ROOT, Outcome, Result, Write
from tests.unit.spill.harness import KIB, MIB, PAGE, Rig, key, namespace

np = pytest.importorskip("numpy")
pytest.importorskip("zstandard")

ID = b"n" * 32


def floats(length: int, seed: int = 0) -> bytearray:
    """Normal numbers as bf16, as keys and values are."""
    numbers = np.random.default_rng(seed).standard_normal(length // 2 + 1).astype(np.float32)
    return bytearray((numbers.view(np.uint32) >> 16).astype(np.uint16).tobytes()[:length])


def encoder() -> Encoder:
    return Encoder(256 * MIB)


@pytest.mark.parametrize("length", [64 * KIB, BLOCK_BYTES, BLOCK_BYTES + 2, 3 * BLOCK_BYTES - 4097])
def test_floats_shrink_and_come_back(length: int) -> None:
    chunk = floats(length)
    encoded = encoder().encode(memoryview(chunk), ID)
    assert encoded is not None and len(encoded) % PAGE == 0
    assert len(encoded) < 0.8 * length
    out = bytearray(length)
    decode(encoded, memoryview(out))
    assert out == chunk


def test_bytes_shrink_as_bytes() -> None:
    chunk = bytearray(random.Random(1).choices(range(12), k=300_000))
    encoded = encoder().encode(memoryview(chunk), ID)
    assert encoded is not None and len(encoded) < 0.6 * len(chunk)
    out = bytearray(len(chunk))
    decode(encoded, memoryview(out))
    assert out == chunk


def test_what_does_not_shrink_is_left_as_it_is_and_tried_again_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    trials = []
    real = codec._try
    monkeypatch.setattr(codec, "_try", lambda chunk: trials.append(1) or real(chunk))
    made = encoder()
    noise = memoryview(bytearray(random.Random(1).randbytes(200_000)))
    for _ in range(300):
        assert made.encode(noise, ID) is None
    assert len(trials) == 2
    assert made.encode(memoryview(floats(200_000)), b"o" * 32) is not None  # another namespace


def test_a_namespace_that_disappoints_is_given_up_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    made = encoder()
    assert made.encode(memoryview(floats(100_000)), ID) is not None
    noise = memoryview(bytearray(random.Random(1).randbytes(100_000)))
    for _ in range(4):
        assert made.encode(noise, ID) is None
    assert made.encode(memoryview(floats(100_000)), ID) is None
    for _ in range(300):
        made.encode(noise, ID)
    results = [made.encode(memoryview(floats(100_000)), ID) for _ in range(300)]
    assert any(result is not None for result in results)


def test_no_more_is_held_than_allowed() -> None:
    made = Encoder(200_000)
    first = made.encode(memoryview(floats(120_000)), ID)
    second = made.encode(memoryview(floats(120_000)), ID)
    assert first is not None and second is None
    del first
    gc.collect()
    assert made.encode(memoryview(floats(120_000)), ID) is not None


def test_a_tiny_chunk_is_left_as_it_is() -> None:
    assert encoder().encode(memoryview(bytearray(100)), ID) is None


@pytest.mark.parametrize("seed", range(40))
def test_nothing_that_is_decoded_reaches_beyond_the_chunk(seed: int) -> None:
    chosen = random.Random(seed)
    chunk = floats(3 * 65_536 + 10)
    encoded = encoder().encode(memoryview(chunk), ID)
    assert encoded is not None
    stored = bytearray(encoded)
    for _ in range(chosen.randrange(1, 30)):
        # Half of it where the lengths are.
        at = chosen.randrange(60) if chosen.random() < 0.5 else chosen.randrange(len(stored))
        stored[at] = chosen.randrange(256)
    stored = stored[: chosen.choice([len(stored), chosen.randrange(len(stored))])]
    around = bytearray(len(chunk) + 2 * PAGE)
    inside = memoryview(around)[PAGE : PAGE + len(chunk)]
    try:
        decode(memoryview(stored), inside)
    except Undecodable:
        pass
    assert around[:PAGE] == bytes(PAGE) and around[PAGE + len(chunk) :] == bytes(PAGE)


def test_a_small_frame_that_claims_to_be_huge_takes_no_memory() -> None:
    zstandard = pytest.importorskip("zstandard")
    bomb = zstandard.ZstdCompressor(level=1).compress(bytes(64 * MIB))
    header = codec._HEADER.pack(codec._MAGIC, 1, 1, BLOCK_BYTES, 1000)
    stored = header + (len(bomb) | codec._COMPRESSED).to_bytes(4, "little") + bomb
    with pytest.raises(Undecodable):
        decode(memoryview(stored), memoryview(bytearray(1000)))


def test_a_missing_library_is_said_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "zstandard":
            raise ImportError("No module named 'zstandard'")
        return real(name, *rest)

    stored = encoder().encode(memoryview(floats(100_000)), ID)
    assert stored is not None
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingLibrary, match=r"kvd\[compress\]"):
        encoder()
    with pytest.raises(Undecodable, match=r"kvd\[compress\]"):
        decode(stored, memoryview(bytearray(100_000)))


def test_encoded_records_are_written_moved_and_read(tmp_path: Path) -> None:
    space = namespace("z", 500_000)
    chunk = floats(space.chunk_bytes)
    with Rig([tmp_path], encoder=encoder()) as rig:
        rig.fill(0, bytes(chunk))
        sealed: Result = rig.seal(space, 0, encode=True)
        assert sealed.encoded is not None and sealed.checksum == checksum_of(memoryview(chunk))
        place = rig.space.allocate(len(sealed.encoded))
        assert place is not None and place.record_bytes < 450_000
        checksum, encoded = sealed.checksum, sealed.encoded
        written = rig.do(lambda t: Write(t, space, key(1), ROOT, 0, checksum, encoded, place))
        assert written.outcome is Outcome.OK
        result = rig.read(space, key(1), place, offset=MIB)
        assert result.outcome is Outcome.OK and result.checksum == checksum
        assert rig.chunk(MIB, len(chunk)) == chunk
        target = rig.space.allocate(len(sealed.encoded), moving=True)
        assert target is not None
        assert rig.move(space, key(1), place, target).outcome is Outcome.OK
        rig.clear(MIB, len(chunk))
        assert rig.read(space, key(1), target, offset=MIB).outcome is Outcome.OK
        assert rig.chunk(MIB, len(chunk)) == chunk
        for at in range(0, 5000, 97):  # damage anywhere
            with rig.extent_path(target).open("r+b") as file:
                file.seek(target.offset + PAGE + at)
                file.write(b"\xa5")
        result = rig.read(space, key(1), target, offset=MIB)
        assert result.outcome is Outcome.CORRUPT
    with Rig([tmp_path]) as rig:
        found, _ = rig.scan()
        assert {record.chunk_bytes for record in found} == {500_000}
        assert rig.read(space, key(1), place, offset=MIB).outcome is Outcome.OK
        assert rig.chunk(MIB, len(chunk)) == chunk
