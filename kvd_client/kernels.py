"""The CUDA kernels that gather pages into staging memory and scatter them back, and the arithmetic of their arguments.

One launch copies a whole batch. A thread block takes one page at a time; its threads move vectors of 16, 8, 4, 2 or 1
bytes, the widest that every address of the batch is aligned to. All geometry comes from a table of one row per layer,
uploaded once; the blocks come from a table of one row per chunk. The source is plain C++ but for the CUDA built-ins.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvd_client.layout import PageGeometry

#: Options of the compiler.
OPTIONS = ("-std=c++17",)
#: Words (int64) of one row of the layer table.
LAYER_WORDS = 9
#: Threads of a thread block.
THREADS = 256
#: Thread blocks of a gather: it stands in the engine's stream, so it may fill the device and be over.
GATHER_BLOCKS = 1024
#: Thread blocks of a scatter: it runs beside the engine's decode steps, so it leaves most of the device to them.
SCATTER_BLOCKS = 64

_BODY = """
extern "C" __global__ void kvd_%(name)s_%(width)d(
    const long long* __restrict__ layers, long long layer_begin, long long layer_count,
    const long long* __restrict__ blocks, long long chunks, long long chunk_blocks, long long heads,
    char* __restrict__ staging, long long slot_stride, long long first, long long ring)
{
    const long long units = chunks * layer_count * chunk_blocks * heads;
    const long long origin = layers[layer_begin * KVD_LAYER_WORDS + 8];
    for (long long unit = blockIdx.x; unit < units; unit += gridDim.x) {
        const long long head = unit %% heads;
        const long long block = unit / heads %% chunk_blocks;
        const long long layer = unit / (heads * chunk_blocks) %% layer_count;
        const long long slot = (first + unit / (heads * chunk_blocks * layer_count)) %% ring;
        const long long* row = layers + (layer_begin + layer) * KVD_LAYER_WORDS;
        char* page = (char*)row[0] + blocks[slot * chunk_blocks + block] * row[1] + head * row[2];
        %(type)s* packed = (%(type)s*)(staging + slot * slot_stride + (row[8] - origin)
                                       + (block * heads + head) * row[7]);
        const long long inner_stride = row[3], outer_stride = row[4];
        const unsigned run = (unsigned)(row[5] / %(width)d), inner = (unsigned)row[6];
        const unsigned vectors = (unsigned)(row[7] / %(width)d);
        #pragma unroll 4
        for (unsigned v = threadIdx.x; v < vectors; v += blockDim.x) {
            const unsigned line = v / run;
            const unsigned outer = line / inner;
            %(type)s* cell = (%(type)s*)(page + outer * outer_stride + (line - outer * inner) * inner_stride)
                             + (v - line * run);
            %(move)s
        }
    }
}
"""

_TYPES = {16: "uint4", 8: "uint2", 4: "unsigned int", 2: "unsigned short", 1: "unsigned char"}
_MOVES = {"gather": "packed[v] = *cell;", "scatter": "*cell = packed[v];"}

#: The source of all kernels: ``kvd_gather_16`` ... ``kvd_gather_1`` and ``kvd_scatter_16`` ... ``kvd_scatter_1``.
SOURCE = f"#define KVD_LAYER_WORDS {LAYER_WORDS}\n" + "".join(
    _BODY % {"name": name, "move": move, "width": width, "type": kind}
    for name, move in _MOVES.items()
    for width, kind in _TYPES.items()
)


def kernel_name(direction: str, width: int) -> str:
    """Name of the kernel for ``direction`` ("gather" or "scatter") and a vector of ``width`` bytes."""
    return f"kvd_{direction}_{width}"


def kernel_names() -> list[str]:
    """All kernels in SOURCE."""
    return [kernel_name(direction, width) for direction in _MOVES for width in _TYPES]


def vector_bytes(pages: Sequence[PageGeometry]) -> int:
    """The widest vector that suits every page of the layers. Packed offsets are sums of page lengths, so they suit too;
    staging memory must be aligned to 16 bytes and its slots be multiples of 16, or hold only such sums."""
    return min(geometry.alignment for geometry in pages)


def layer_rows(pages: Sequence[PageGeometry], packed_offsets: Sequence[int]) -> list[list[int]]:
    """The layer table: per layer LAYER_WORDS numbers, in the order the kernels read them."""
    rows = []
    for geometry, offset in zip(pages, packed_offsets, strict=False):
        run, inner, inner_stride, _, outer_stride = geometry.rows
        rows.append(
            [
                geometry.address,
                geometry.block_stride,
                geometry.head_stride,
                inner_stride,
                outer_stride,
                run,
                inner,
                geometry.page_bytes,
                offset,
            ]
        )
    return rows
