"""Fewer bytes for a chunk, where that pays: bytes sorted by their place in an element, and zstd on what shrinks then.

Of 16-bit floats the exponents compress and the mantissas do not. A chunk is cut in blocks; of each block every plane
(the bytes of one place) is stored as it is or compressed, whichever is shorter:

    [header][length of each plane of each block, u32, highest bit: compressed][planes][zeros to a multiple of 4 KiB]

What is decoded is bounded by the chunk whatever the input says, and the caller checks the chunk's own checksum.
NumPy and zstandard come with ``kvd[compress]`` and are loaded by the first use.
"""

from __future__ import annotations

import mmap
import struct
import threading
import weakref
from typing import Any, NamedTuple

from kvd.spill.record import padded

BLOCK_BYTES = 1 << 20
#: An encoding that saves less is not worth the time to undo it.
MIN_SAVED = 0.1
_LEVEL = 1
_MAGIC = b"kvd:pla\x01"
_HEADER = struct.Struct("<8sBBxxIQ")
_COMPRESSED = 1 << 31
#: Pieces of a chunk that are tried before a kind of chunk is encoded, and their size.
_SAMPLES = 8
_SAMPLE_BYTES = 32 << 10
#: Chunks of a kind that are left as they are until it is tried again; bad ones in a row until it is given up.
_SKIPPED = 256
_DISAPPOINTMENTS = 4
#: Kinds that are remembered.
_KINDS = 1024


class Undecodable(Exception):
    """The stored bytes are not an encoding of such a chunk, or the libraries to decode them are missing."""


class MissingLibrary(Exception):
    """A codec was asked for and its libraries are not installed."""


class _Layout(NamedTuple):
    """How a kind of chunk is taken apart. ``mask``: the planes that are compressed."""

    element_bytes: int
    mask: int


class _Kind:
    """What is known of the chunks of one namespace."""

    __slots__ = ("disappointments", "layout", "skip")

    def __init__(self) -> None:
        self.layout: _Layout | None = None
        self.skip = 0
        self.disappointments = 0


class Encoder:
    """Encodes chunks of the namespaces whose bytes are found to shrink; the others it looks at now and then.

    At most ``scratch_bytes`` of encoded chunks exist at a time; beyond that chunks stay as they are. Thread-safe.
    """

    def __init__(self, scratch_bytes: int) -> None:
        """Raises MissingLibrary."""
        try:
            _libraries()
        except ImportError as error:
            raise MissingLibrary(f"compression needs the extra kvd[compress]: {error}") from error
        self._scratch_bytes = scratch_bytes
        self._lock = threading.Lock()
        self._used_bytes = 0
        self._kinds: dict[bytes, _Kind] = {}

    def encode(self, chunk: memoryview, namespace_id: bytes) -> memoryview | None:
        """The encoded chunk, a multiple of 4 KiB and page-aligned; None when it stays as it is."""
        layout = self._layout_for(chunk, namespace_id)
        if layout is None:
            return None
        limit = int(len(chunk) * (1 - MIN_SAVED)) & ~(padded(1) - 1)
        with self._lock:
            if limit == 0 or self._used_bytes + limit > self._scratch_bytes:
                return None
            self._used_bytes += limit
        memory = mmap.mmap(-1, limit)
        weakref.finalize(memory, self._give, limit)
        length = _encode(chunk, memoryview(memory), layout)
        self._learn(namespace_id, bool(length))
        return memoryview(memory)[:length] if length else None

    def _give(self, length: int) -> None:
        with self._lock:
            self._used_bytes -= length

    def _layout_for(self, chunk: memoryview, namespace_id: bytes) -> _Layout | None:
        with self._lock:
            kind = self._kinds.get(namespace_id)
            if kind is None:
                if len(self._kinds) == _KINDS:
                    self._kinds.clear()
                kind = self._kinds[namespace_id] = _Kind()
            if kind.layout is not None:
                return kind.layout
            if kind.skip:
                kind.skip -= 1
                return None
            kind.skip = _SKIPPED  # the others do not wait for the trial
        layout = _try(chunk)
        with self._lock:
            kind.layout, kind.disappointments = layout, 0
        return layout

    def _learn(self, namespace_id: bytes, shrunk: bool) -> None:
        with self._lock:
            kind = self._kinds.get(namespace_id)
            if kind is None:
                return
            kind.disappointments = 0 if shrunk else kind.disappointments + 1
            if kind.disappointments == _DISAPPOINTMENTS:
                kind.layout, kind.skip = None, _SKIPPED


def decode(stored: memoryview, chunk: memoryview) -> None:
    """Decodes ``stored`` into ``chunk``. Raises Undecodable; ``chunk`` may then hold anything."""
    try:
        np, _ = _libraries()
    except ImportError as error:
        raise Undecodable(f"it is compressed, which needs the extra kvd[compress]: {error}") from error
    if len(stored) < _HEADER.size:
        raise Undecodable("it is too short")
    magic, element_bytes, _, block_bytes, chunk_bytes = _HEADER.unpack_from(stored)
    if magic != _MAGIC or element_bytes not in (1, 2) or block_bytes != BLOCK_BYTES or chunk_bytes != len(chunk):
        raise Undecodable("it is no encoding of this chunk")
    at = _HEADER.size + 4 * element_bytes * _blocks(chunk_bytes)
    if at > len(stored):
        raise Undecodable("it is too short")
    lengths = struct.unpack_from(f"<{element_bytes * _blocks(chunk_bytes)}I", stored, _HEADER.size)
    source = np.frombuffer(stored, np.uint8)
    target = np.frombuffer(chunk, np.uint8)
    for index, entry in enumerate(lengths):
        block, place = divmod(index, element_bytes)
        plane = target[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES][place::element_bytes]
        length = entry & ~_COMPRESSED
        if length > len(source) - at:
            raise Undecodable("it is too short")
        if entry & _COMPRESSED:
            _decompress(stored[at : at + length], plane, np)
        elif length == len(plane):
            np.copyto(plane, source[at : at + length])
        else:
            raise Undecodable("a plane has the wrong length")
        at += length


def _encode(chunk: memoryview, target: memoryview, layout: _Layout) -> int:
    """Encodes into ``target``; the length, a multiple of 4 KiB, or 0 when it does not fit."""
    np, _ = _libraries()
    element_bytes, mask = layout
    source = np.frombuffer(chunk, np.uint8)
    out = np.frombuffer(target, np.uint8)
    at = _HEADER.size + 4 * element_bytes * _blocks(len(chunk))
    lengths = []
    for block in range(_blocks(len(chunk))):
        elements = source[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]
        for place in range(element_bytes):
            plane = elements[place::element_bytes]
            compressed = _compress(plane, np) if mask >> place & 1 else None
            data = plane if compressed is None else np.frombuffer(compressed, np.uint8)
            if len(data) > len(out) - at:
                return 0
            np.copyto(out[at : at + len(data)], data)
            lengths.append(len(data) | (0 if compressed is None else _COMPRESSED))
            at += len(data)
    _HEADER.pack_into(target, 0, _MAGIC, element_bytes, mask, BLOCK_BYTES, len(chunk))
    struct.pack_into(f"<{len(lengths)}I", target, _HEADER.size, *lengths)
    return padded(at)


def _try(chunk: memoryview) -> _Layout | None:
    """The layout that saves most on samples of ``chunk``; None when none saves enough."""
    np, _ = _libraries()
    source = np.frombuffer(chunk, np.uint8)
    step = max(_SAMPLE_BYTES, len(chunk) // _SAMPLES) & ~1
    samples = [source[at : at + _SAMPLE_BYTES] for at in range(0, len(chunk), step)]
    best, best_saved = None, MIN_SAVED * sum(len(sample) for sample in samples)
    for element_bytes in (1, 2):
        mask = saved = 0
        for place in range(element_bytes):
            planes = [sample[place::element_bytes] for sample in samples]
            before = sum(len(plane) for plane in planes)
            after = sum(len(_compress(plane, np) or plane) for plane in planes)
            if after < before * (1 - MIN_SAVED):
                mask |= 1 << place
                saved += before - after
        if saved > best_saved:
            best, best_saved = _Layout(element_bytes, mask), saved
    return best


_local = threading.local()


def _compress(plane: Any, np: Any) -> bytes | None:
    """The plane compressed, None when that makes it no shorter."""
    _, zstandard = _libraries()
    if not hasattr(_local, "compressor"):
        _local.compressor = zstandard.ZstdCompressor(level=_LEVEL)
    compressed: bytes = _local.compressor.compress(np.ascontiguousarray(plane))
    return compressed if len(compressed) < len(plane) else None


def _decompress(stored: memoryview, plane: Any, np: Any) -> None:
    _, zstandard = _libraries()
    if not hasattr(_local, "decompressor"):
        _local.decompressor = zstandard.ZstdDecompressor(max_window_size=2 * BLOCK_BYTES)
        _local.scratch = np.empty(BLOCK_BYTES, np.uint8)
    scratch = _local.scratch[: len(plane)]
    done = 0
    try:
        with _local.decompressor.stream_reader(stored) as reader:
            while done < len(plane):
                more = reader.readinto(scratch[done:])
                if more == 0:
                    raise Undecodable("a plane is too short")
                done += more
            if reader.readinto(bytearray(1)):
                raise Undecodable("a plane is too long")
    except zstandard.ZstdError as error:
        raise Undecodable(f"a plane cannot be decompressed: {error}") from error
    np.copyto(plane, scratch)


def _blocks(chunk_bytes: int) -> int:
    return -(-chunk_bytes // BLOCK_BYTES)


def _libraries() -> tuple[Any, Any]:
    import numpy
    import zstandard

    return numpy, zstandard
