"""The daemon's presence table (``kvd/wire/presence.py``) as a client reads it: a miss that costs no call."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence

from kvd.wire.errors import ProtocolMismatch, Unavailable
from kvd.wire.presence import HEADER, MAGIC, VERSION, buckets_of
from kvd_client.lifeline import ended
from kvd_client.mapping import READ, map_file

try:
    from kvd_client._presence import may_hold
except ImportError:  # installed without a compiler
    from kvd.wire.presence import may_hold


class PresenceView:
    """The table of one daemon, mapped. Thread-safe."""

    def __init__(self, descriptor: int, size_bytes: int, daemon_id: int, lifeline: socket.socket) -> None:
        """``descriptor``: of the table; it is closed. ``lifeline`` says how long anybody writes it. Raises
        ProtocolMismatch for what this client cannot read, and Unavailable when it cannot be mapped, or is another
        daemon's."""
        try:
            if (buckets := buckets_of(size_bytes)) is None:
                raise ProtocolMismatch(f"a presence table of {size_bytes} bytes")
            table = map_file(descriptor, size_bytes, READ).bytes()
        finally:
            os.close(descriptor)
        magic, version, writer, counted, _ = HEADER.unpack_from(table)
        if (magic, version, counted) != (MAGIC, VERSION, buckets):
            raise ProtocolMismatch(f"the presence table says {magic!r}, version {version}, {counted} buckets")
        if writer != daemon_id:
            raise Unavailable("the daemon was restarted in between")
        self._words: memoryview[int] = table.cast("Q").toreadonly()
        self._lifeline = lifeline

    def may_hold(self, namespace_id: bytes, keys: Sequence[bytes]) -> int:
        """How many of ``keys``, from the first on, a Lookup may find; 0: it would find none. Of a daemon that has gone
        nothing is known: all of them."""
        return len(keys) if ended(self._lifeline) else may_hold(self._words, namespace_id, keys)
