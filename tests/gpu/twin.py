"""The CUDA kernels as a host library: the same source through g++, with the block and thread indices as loops."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from kvd_client.kernels import SOURCE, THREADS, kernel_names

_PRELUDE = """
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct Index { unsigned x; };
static thread_local Index blockIdx, threadIdx, gridDim, blockDim;
#define __global__
"""
_LOOP = """
extern "C" void %(name)s_looped(unsigned blocks, unsigned threads,
    const long long* a, long long b, long long c, const long long* d, long long e, long long f, long long g,
    char* h, long long i, long long j, long long k)
{
    gridDim.x = blocks; blockDim.x = threads;
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++)
        for (threadIdx.x = 0; threadIdx.x < threads; threadIdx.x++)
            %(name)s(a, b, c, d, e, f, g, h, i, j, k);
}
"""


@functools.cache
def library() -> ctypes.CDLL:
    """The library, built once in a process: that takes seconds, so it is asked for before any deadline is set."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ here to build the kernels for the host")
    with tempfile.TemporaryDirectory() as directory:
        source, library = Path(directory, "twin.cpp"), Path(directory, "twin.so")
        source.write_text(_PRELUDE + SOURCE + "".join(_LOOP % {"name": name} for name in kernel_names()))
        command = [compiler, "-std=c++17", "-O2", "-Wno-unknown-pragmas", "-shared", "-fPIC", "-o", library, source]
        subprocess.run(command, check=True, timeout=120)
        return ctypes.CDLL(str(library))


def run(kernel: str, blocks: int, args: Sequence[int], threads: int = THREADS) -> None:
    """Runs ``kernel`` with ``blocks`` thread blocks to its end."""
    function = getattr(library(), f"{kernel}_looped")
    function(ctypes.c_uint(blocks), ctypes.c_uint(threads), *(ctypes.c_longlong(arg) for arg in args))
