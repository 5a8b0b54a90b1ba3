"""The load generator's client of kvd; see ``worker.py`` for what it must do."""

from __future__ import annotations

from typing import Any

from kvd.wire.chunks import ROOT
from kvd.wire.identity import Identity
from kvd_client.client import Client, StoreOutcome

CONNECT_TIMEOUT_S = 30.0
CALL_TIMEOUT_S = 60.0


class KvdStore:
    """A session of a daemon; see ``worker.Store``."""

    def __init__(self, endpoint: str, chunk_bytes: int) -> None:
        self._client = Client(endpoint, timeout_s=CALL_TIMEOUT_S)
        self._client.connect(CONNECT_TIMEOUT_S)
        self._namespace = self._client.namespace(Identity("bench", f"load {chunk_bytes}"), chunk_bytes)

    def put(self, keys: list[bytes], data: list[memoryview]) -> int:
        """Reserve, copy, Commit."""
        outcomes = self._client.store(self._namespace, list(zip(keys, [ROOT, *keys], strict=False)), data)
        return outcomes.count(StoreOutcome.STORED)

    def get(self, keys: list[bytes], into: list[memoryview]) -> int:
        """Lookup, copy, Release."""
        return self._client.load(self._namespace, keys, into)

    def exists(self, keys: list[bytes]) -> int:
        """Lookup, which leases, and Release."""
        with self._client.lookup(self._namespace, keys) as lease:
            return len(lease)

    def close(self) -> None:
        """Ends the session."""
        self._client.close()


def open_store(options: dict[str, Any], client: int, data: list[memoryview], into: list[memoryview]) -> KvdStore:
    """``options``: ``endpoint``."""
    return KvdStore(options["endpoint"], len(data[0]))
