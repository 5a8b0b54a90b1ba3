"""Threads for what must not hold up the event loop, all of them there before the daemon serves.

asyncio's own executor starts its threads when they are first needed, on the loop, and a start waits until the new
thread runs: a tenth of a second and more where the cores are busy.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

#: At most two of them are held for long at a time, by the pool's population before the daemon serves and by saving its
#: state; the others are for questions that take milliseconds.
THREADS = 4
_START_S = 30.0


def ready_executor() -> ThreadPoolExecutor:
    """An executor whose threads all run. Raises RuntimeError when the system gives no more threads."""
    executor = ThreadPoolExecutor(THREADS, thread_name_prefix="kvd-worker")
    # Whoever waits here is not idle, so each task gets a thread of its own.
    together = threading.Barrier(THREADS, timeout=_START_S)
    for _ in range(THREADS):
        executor.submit(together.wait)
    return executor
