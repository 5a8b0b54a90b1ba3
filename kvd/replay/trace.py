"""Reads traces of requests into compact arrays.

A trace has one JSON object a line: ``timestamp`` (ms), ``input_length`` (tokens), ``hash_ids`` (one per block, chained:
an id always has the same predecessors) and, if blocks do not have 512 tokens, ``block_tokens``.
"""

from __future__ import annotations

import io
import json
import lzma
import math
from array import array
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import IO, Any, cast

DEFAULT_BLOCK_TOKENS = 512

_XZ_MAGIC = b"\xfd7zXZ\x00"
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
#: Longest line that is read, bytes.
MAX_LINE_BYTES = 1 << 28
_REPORT_EVERY = 1000


class TraceError(Exception):
    """The trace cannot be read; the text says where and why."""


class Trace:
    """All requests. Blocks are numbered from 0 in the order in which they come first; 4 bytes an access."""

    def __init__(self) -> None:
        self.blocks = array("I")  # of all requests, one after the other
        self.ends = array("Q")  # where in ``blocks`` each request ends
        self.times = array("d")  # seconds, never falling
        self.tails = bytearray()  # 1: the request's last block is not full
        self.parents = array("q")  # by block; -1 = none
        self.block_tokens = DEFAULT_BLOCK_TOKENS

    @property
    def unique(self) -> int:
        """How many different blocks there are."""
        return len(self.parents)

    def __len__(self) -> int:
        return len(self.ends)

    def requests(self) -> Iterator[tuple[float, array[int], bool]]:
        """Time in seconds, blocks, and whether the last one is not full."""
        begin = 0
        for time, end, tail in zip(self.times, self.ends, self.tails, strict=True):
            yield time, self.blocks[begin:end], bool(tail)
            begin = end


def read(path: str, progress: Callable[[float], None]) -> Trace:
    """The trace at ``path``: plain, xz or zstd. ``progress`` hears which share of the file was read.

    Raises ``TraceError``.
    """
    trace = Trace()
    numbers: dict[Any, int] = {}
    line_number = 0
    try:
        with ExitStack() as stack:
            raw = stack.enter_context(open(path, "rb"))
            size = max(1, raw.seek(0, io.SEEK_END))
            raw.seek(0)
            lines = stack.enter_context(_unpacked(raw, path))
            while line := lines.readline(MAX_LINE_BYTES):
                line_number += 1
                if len(line) == MAX_LINE_BYTES:
                    raise TraceError(f"longer than {MAX_LINE_BYTES} bytes")
                if line.strip():
                    _add(trace, numbers, line)
                if line_number % _REPORT_EVERY == 0:
                    progress(min(1.0, raw.tell() / size))
    except TraceError as error:
        raise TraceError(f"{path}: line {line_number}: {error}" if line_number else f"{path}: {error}") from error
    except OSError as error:
        raise TraceError(f"{path}: {error.strerror or error}") from error
    except Exception as error:
        if not _is_damage(error):
            raise
        raise TraceError(f"{path}: after line {line_number}: the compressed data is damaged: {error}") from error
    if not trace.unique:
        raise TraceError(f"{path}: there is no block in it")
    return trace


def _is_damage(error: Exception) -> bool:
    """Whether a decompressor has raised it. The type of zstandard's is known only where that is installed."""
    return isinstance(error, (lzma.LZMAError, EOFError)) or type(error).__module__.startswith(("zstd", "zstandard"))


def _unpacked(raw: IO[bytes], path: str) -> IO[bytes]:
    magic = raw.read(len(_XZ_MAGIC))
    raw.seek(0)
    if magic == _XZ_MAGIC:
        return lzma.open(raw)
    if magic.startswith(_ZSTD_MAGIC):
        try:
            import zstandard
        except ImportError:
            raise TraceError("it is compressed by zstd; to read that, install kvd[compress]") from None
        reader = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
        return io.BufferedReader(cast(io.RawIOBase, reader))
    for suffix, name in ((".xz", "xz"), (".zst", "zstd")):
        if path.endswith(suffix):
            raise TraceError(f"its name ends in {suffix}, its content is not {name}")
    return raw


def _add(trace: Trace, numbers: dict[Any, int], line: bytes) -> None:
    """One request. Raises ``TraceError`` without a word about where."""
    try:
        request = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TraceError(f"no JSON: {error}") from error
    if not isinstance(request, dict):
        raise TraceError("not a JSON object")
    time = _number(request, "timestamp") / 1000
    tokens = _number(request, "input_length")
    block_tokens = _number(request, "block_tokens") if "block_tokens" in request else DEFAULT_BLOCK_TOKENS
    if block_tokens < 1 or tokens < 0:
        raise TraceError("input_length or block_tokens is too small")
    ids = request.get("hash_ids")
    if not isinstance(ids, list):
        raise TraceError("hash_ids is missing, or not a list")
    above = -1
    parents = trace.parents
    for name in ids:
        if type(name) is not int and type(name) is not str:
            raise TraceError(f"{str(name)[:40]!r} among the hash_ids is neither a number nor a text")
        number = numbers.setdefault(name, len(parents))
        if number == len(parents):
            parents.append(above)
        elif parents[number] != above:
            raise TraceError(f"the ids are not chained: block {str(name)[:40]} had other predecessors before")
        trace.blocks.append(number)
        above = number
    trace.block_tokens = int(block_tokens)
    trace.ends.append(len(trace.blocks))
    trace.times.append(max(time, trace.times[-1]) if trace.times else time)
    trace.tails.append((len(ids) - 1) * block_tokens < tokens < len(ids) * block_tokens)


def _number(request: dict[str, Any], name: str) -> float:
    value = request.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TraceError(f"{name} is missing, or not a number")
    if (isinstance(value, float) and not math.isfinite(value)) or abs(value) > 1 << 62:
        raise TraceError(f"{name} is out of range")
    return value
