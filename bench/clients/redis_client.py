"""A client of Redis for the load generator, in an environment with ``redis[hiredis]``."""

from __future__ import annotations

from typing import Any

import redis


class RedisStore:
    """redis-py with its C parser; each request is one pipeline, or one command of many keys where there is one.

    What it reads stays in the buffers that the library makes: it is not copied on to where it is wanted, which a user
    of it would have to do.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        if "path" in options:
            self._redis = redis.Redis(unix_socket_path=options["path"])
        else:
            self._redis = redis.Redis(host="127.0.0.1", port=options["port"])

    def put(self, keys: list[bytes], data: list[memoryview]) -> int:
        """A pipeline of SET."""
        pipeline = self._redis.pipeline(transaction=False)
        for key, chunk in zip(keys, data, strict=True):
            pipeline.set(key, chunk)
        return sum(map(bool, pipeline.execute()))

    def get(self, keys: list[bytes], into: list[memoryview]) -> int:
        """MGET."""
        found = self._redis.mget(keys)
        into[: len(found)] = [memoryview(one or b"") for one in found]
        return next((i for i, one in enumerate(found) if one is None), len(found))

    def exists(self, keys: list[bytes]) -> int:
        """EXISTS of all keys in one command."""
        return self._redis.exists(*keys)

    def close(self) -> None:
        """Ends the connection."""
        self._redis.close()


def open_store(options: dict[str, Any], client: int, data: list[memoryview], into: list[memoryview]) -> RedisStore:
    """``options``: ``path`` of the Unix socket or ``port``."""
    return RedisStore(options)
