"""A client of Mooncake Store for the load generator, in an environment with its pip package."""

from __future__ import annotations

import ctypes
from typing import Any

from mooncake.store import MooncakeDistributedStore

#: Keeps the library's own buffers small: what is moved lies in registered memory.
LOCAL_BUFFER_BYTES = 64 << 20


class MooncakeStore:
    """The zero-copy calls that its documents recommend: ``batch_put_from``, ``batch_get_into``, ``batch_is_exist``."""

    def __init__(self, options: dict[str, Any], data: list[memoryview], into: list[memoryview]) -> None:
        self._store = MooncakeDistributedStore()
        regions_bytes = 2 * sum(map(len, data))
        if options["way"] == "local":
            pool_bytes = regions_bytes + LOCAL_BUFFER_BYTES
            self._check(self._store.setup_dummy(pool_bytes, LOCAL_BUFFER_BYTES, options["owner"]))
            self._move(data, into)
        else:
            self._check(
                self._store.setup("127.0.0.1", options["metadata"], 0, LOCAL_BUFFER_BYTES, "tcp", "", options["master"])
            )
        for chunks in (data, into):
            self._check(self._store.register_buffer(_address(chunks[0]), sum(map(len, chunks))))

    def put(self, keys: list[bytes], data: list[memoryview]) -> int:
        """Puts from registered memory. What finds no room is not stored; the store makes room in the background."""
        addresses = [_address(chunk) for chunk in data]
        results = self._store.batch_put_from(_names(keys), addresses, [len(chunk) for chunk in data])
        return sum(one == 0 for one in results)

    def get(self, keys: list[bytes], into: list[memoryview]) -> int:
        """Gets into registered memory."""
        sizes = [len(chunk) for chunk in into]
        found = self._store.batch_get_into(_names(keys), [_address(chunk) for chunk in into], sizes)
        return next((i for i, one in enumerate(found) if one != sizes[i]), len(found))

    def exists(self, keys: list[bytes]) -> int:
        """Asks for all of them in one call; the answer leases what is there."""
        found = self._store.batch_is_exist(_names(keys))
        return next((i for i, one in enumerate(found) if one != 1), len(found))

    def close(self) -> None:
        """Ends it."""
        self._store.close()

    def _move(self, *lists: list[memoryview]) -> None:
        """Puts memory that the store's process shares in the place of the worker's own."""
        for chunks in lists:
            size = sum(map(len, chunks))
            address = self._store.alloc_from_mem_pool(size)
            if not address:
                raise RuntimeError("the store has no shared memory for buffers")
            region = memoryview((ctypes.c_ubyte * size).from_address(address)).cast("B")
            part = size // len(chunks)
            for number in range(len(chunks)):
                region[number * part : (number + 1) * part] = chunks[number]
                chunks[number] = region[number * part : (number + 1) * part]

    @staticmethod
    def _check(result: int) -> None:
        if result:
            raise RuntimeError(f"Mooncake says {result}")


def _names(keys: list[bytes]) -> list[str]:
    return [key.hex() for key in keys]


def _address(chunk: memoryview) -> int:
    return ctypes.addressof(ctypes.c_ubyte.from_buffer(chunk))


def open_store(options: dict[str, Any], client: int, data: list[memoryview], into: list[memoryview]) -> MooncakeStore:
    """``options``: ``way`` (local or tcp) and addresses of ``master``, ``metadata`` and ``owner``."""
    return MooncakeStore(options, data, into)
