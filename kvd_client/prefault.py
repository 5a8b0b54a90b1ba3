"""The page tables of a mapped pool, filled before the first copy needs them.

A copy into memory that this process has not touched yet takes a fault for every page and is five times slower than the
next. So a thread of low priority maps what lies there, around sixteen pages with one fault. It takes no memory but the
tables themselves, 2 MiB for a GiB: only what the file already has is mapped, never a hole that nobody has filled.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref

from kvd_client.mapping import Mapping

log = logging.getLogger(__name__)

#: Mapped in one call: whoever maps or unmaps something else in this process waits for it, some milliseconds.
PIECE_BYTES = 64 << 20
#: A daemon that is still taking its pool from the system is given so long to get ahead again.
PAUSE_S = 2.0

_lock = threading.Lock()
_begun: weakref.WeakSet[Mapping] = weakref.WeakSet()


def prefault(mapping: Mapping) -> None:
    """Starts the thread, once for a mapping. It ends by itself, and with the mapping; nobody waits for it."""
    with _lock:
        if mapping in _begun:
            return
        _begun.add(mapping)
    thread = threading.Thread(target=_run, args=(weakref.ref(mapping),), name="kvd-prefault", daemon=True)
    try:
        thread.start()
    except RuntimeError as error:  # the system gives no further thread
        log.debug("the pool is not mapped ahead: %s", error)


def _run(reference: weakref.ref[Mapping]) -> None:
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)  # of this thread, not of the process
    done_bytes = 0
    try:
        while (reached := _go_on(reference, done_bytes)) > done_bytes:
            done_bytes = reached
            time.sleep(PAUSE_S)
    except OSError as error:
        log.debug("the pool is not mapped ahead: %s", error.strerror)


def _go_on(reference: weakref.ref[Mapping], start: int) -> int:
    """Maps what the file has from byte ``start`` on. Where that ends; 0 when nobody uses the mapping any more.

    Raises OSError when the kernel cannot.
    """
    end = start
    while (mapping := reference()) is not None:  # held for one piece: the last to use it must be able to end it
        if start == end:
            found = mapping.filled(start)
            if found is None:
                return end
            start, end = found
        piece_bytes = min(PIECE_BYTES, end - start)
        mapping.fault_in(start, piece_bytes)
        start += piece_bytes
        del mapping
    return 0
