"""Belady's optimum: what nobody can beat who does not know the future."""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Callable

from kvd.replay.run import work
from kvd.replay.trace import Trace

_NEVER = (1 << 63) - 1
_REPORT_EVERY = 256


def next_uses(trace: Trace) -> array[int]:
    """For every access the number of the next one to the same block. 8 bytes an access."""
    found = array("q", bytes(8 * len(trace.blocks)))
    last = array("q", [_NEVER]) * trace.unique
    blocks = trace.blocks
    for at in range(len(blocks) - 1, -1, -1):
        block = blocks[at]
        found[at] = last[block]
        last[block] = at
    return found


def belady(
    trace: Trace, following: array[int], capacity: int, *, store_tails: bool, progress: Callable[[float], None]
) -> tuple[int, float]:
    """Hits, and the work that they save (``kvd.replay.run.work``), when always that goes which is used again last.

    The newcomer is one of those. ``following``: of ``next_uses``.
    A block is used whenever one below it is, and before that, so leaves go first without being asked to.
    """
    hits = at = resident = 0
    saved = 0.0
    wanted = array("q", [-1]) * trace.unique  # the next use of what is resident
    heap: list[tuple[int, int]] = []
    push, replace = heapq.heappush, heapq.heapreplace
    for number, (_, blocks, tail) in enumerate(trace.requests()):
        unbroken = True
        before = hits
        last = len(blocks) - (tail and not store_tails)
        for index, block in enumerate(blocks):
            again = following[at]
            at += 1
            if wanted[block] >= 0:
                hits += unbroken
                wanted[block] = again
                push(heap, (-again, block))
                continue
            unbroken = False
            if again == _NEVER or index >= last:
                continue
            if resident < capacity:
                resident += 1
                push(heap, (-again, block))
            else:
                while wanted[heap[0][1]] != -heap[0][0]:
                    heapq.heappop(heap)
                if -heap[0][0] <= again:
                    continue
                wanted[heap[0][1]] = -1
                replace(heap, (-again, block))
            wanted[block] = again
        saved += work(hits - before, trace.block_tokens)
        if len(heap) > 4 * capacity + 1024:
            heap = [(-wanted[block], block) for _, block in heap if wanted[block] >= 0]
            heap = list(dict.fromkeys(heap))
            heapq.heapify(heap)
        if number % _REPORT_EVERY == 0:
            progress(number / len(trace))
    return hits, saved
