"""Registration of shared memory with the CUDA driver, in pieces, on a thread of its own.

Registering pins and maps every page of the memory: seconds for a large pool. Copies do not wait for it; they only must
not cross the edge of a piece, because the driver refuses one copy over two registrations.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, field
from typing import Protocol

from kvd_client.memory import address_of

log = logging.getLogger(__name__)

#: Bytes registered in one driver call.
PIECE_BYTES = 256 << 20


class Registrar(Protocol):
    """The two driver calls."""

    def register(self, address: int, size_bytes: int) -> None:
        """Pins memory. Raises RuntimeError."""
        ...

    def unregister(self, address: int) -> None:
        """Undoes ``register`` of the same address. Raises RuntimeError."""
        ...


@dataclass
class _Area:
    """One memory: what of it is registered, and the thread that registers the rest."""

    memory: memoryview  # keeps the mapping alive: registered memory must not be unmapped
    begin: int
    end: int
    users: int = 1
    stop: threading.Event = field(default_factory=threading.Event)
    done: list[int] = field(default_factory=list)
    thread: threading.Thread | None = None


class Pinning:
    """The areas of one copier. Thread-safe."""

    def __init__(self, registrar: Registrar, piece_bytes: int = PIECE_BYTES) -> None:
        """Registers through ``registrar``, ``piece_bytes`` at a time."""
        self._registrar = registrar
        self._piece_bytes = piece_bytes
        self._lock = threading.Lock()
        self._areas: dict[int, _Area] = {}

    def add(self, memory: memoryview) -> None:
        """Begins to register an area; returns at once. One that is known already only gets one user more: so the
        registration stays when a path comes with the same memory before the old one is gone.
        """
        address = address_of(memory)
        area = _Area(memory, address, address + memory.nbytes)
        with self._lock:
            if (known := self._areas.get(address)) is not None:
                known.users += 1
                return
            self._areas[address] = area
        area.thread = threading.Thread(target=self._work, args=(area,), name="kvd-pinning", daemon=True)
        area.thread.start()

    def remove(self, address: int) -> None:
        """The area at ``address`` has one user less. With the last one its registration ends: this waits for the piece
        under way and undoes the rest. The area's edges are forgotten only afterwards; no copy in it may be under way.
        """
        with self._lock:
            area = self._areas.get(address)
            if area is None:
                return
            area.users -= 1
            if area.users > 0:
                return
        area.stop.set()
        if area.thread is not None:
            area.thread.join()
        for piece in area.done:
            try:
                self._registrar.unregister(piece)
            except RuntimeError as error:
                log.warning("shared memory could not be unregistered from CUDA: %s", error)
        with self._lock:
            self._areas.pop(address, None)

    def clear(self) -> None:
        """Removes every area."""
        with self._lock:
            known = list(self._areas)
            for area in self._areas.values():
                area.users = 1
        for address in known:
            self.remove(address)

    def edges(self, address: int, size_bytes: int) -> list[int]:
        """Addresses inside the given memory that no single copy may cross, ascending."""
        with self._lock:
            areas = list(self._areas.values())
        found: list[int] = []
        for area in areas:
            if area.begin <= address < area.end:
                first = area.begin + ((address - area.begin) // self._piece_bytes + 1) * self._piece_bytes
                found.extend(range(first, min(address + size_bytes, area.end), self._piece_bytes))
        return found

    def _work(self, area: _Area) -> None:
        for begin in range(area.begin, area.end, self._piece_bytes):
            if area.stop.is_set():
                return
            try:
                self._registrar.register(begin, min(self._piece_bytes, area.end - begin))
            except RuntimeError as error:
                log.warning("shared memory stays unregistered with CUDA, copies will be slower: %s", error)
                return
            area.done.append(begin)
