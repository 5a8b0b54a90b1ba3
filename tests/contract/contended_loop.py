"""What any event loop suffers on this machine just now: a plain asyncio loop in a process of its own.

It sleeps and wakes as the daemon's does when it measures its lag, and beside it two threads copy memory, as the
daemon's do. Ends with its standard input; then prints the lags, in seconds, as one line of JSON.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import sys
import threading
import time

from kvd.upkeep import LAG_TICK_S

COPY_BYTES = 1 << 20


def copy(stop: threading.Event) -> None:
    memory = (ctypes.c_char * (2 * COPY_BYTES))()
    address = ctypes.addressof(memory)
    while not stop.is_set():
        ctypes.memmove(address, address + COPY_BYTES, COPY_BYTES)


async def measure(lags: list[float]) -> None:
    while True:
        due = time.monotonic() + LAG_TICK_S
        await asyncio.sleep(LAG_TICK_S)
        lags.append(time.monotonic() - due)


async def main() -> None:
    stop, lags = threading.Event(), list[float]()
    threads = [threading.Thread(target=copy, args=(stop,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        measuring = asyncio.create_task(measure(lags))
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.read)
        measuring.cancel()
    finally:
        stop.set()
    print(json.dumps(lags), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
