"""Stand-ins for what the vLLM adapter talks to: requests, the controller, leases."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

from kvd.wire.chunks import Location, ReserveResult, ReserveStatus


def hashes_of(name: str, count: int) -> list[bytes]:
    """A chain of block hashes; equal names begin equally."""
    chain, last = [], name.encode()
    for i in range(count):
        last = hashlib.sha256(last + bytes([i])).digest()
        chain.append(last)
    return chain


@dataclass
class FakeRequest:
    """As much of vLLM's Request as the adapter looks at."""

    request_id: str
    num_tokens: int
    block_hashes: list[bytes]
    num_computed_tokens: int = 0
    num_in_flight_tokens: int = 0
    skip_reading_prefix_cache: bool | None = False
    lora_request: Any = None


@dataclass(eq=False)
class FakeLease:
    """A read or write lease, either."""

    lease_id: int
    epoch: int
    locations: list[Location] = field(default_factory=list)
    results: list[ReserveResult] = field(default_factory=list)
    released: bool = False
    promoting: int = 0

    def __len__(self) -> int:
        return len(self.locations)

    def release(self) -> None:
        self.released = True


@dataclass(frozen=True)
class FakeAnswer:
    ticket: int
    lease: FakeLease | None


class FakeController:
    """Holds ``stored`` keys, answers reserves when told to, and remembers what it was asked."""

    def __init__(self) -> None:
        self.ready = True
        self.epoch = 1
        self.read_lease_s = 30.0
        self.stored: set[bytes] = set()
        self.verdicts: dict[bytes, ReserveStatus] = {}
        self.on_disk: set[bytes] = set()  # follows what is stored: a lookup says that it is on its way
        self.lookups: list[tuple[list[bytes], int]] = []
        self.again: list[bool] = []  # of each lookup
        self.leases: list[FakeLease] = []
        self.asked: list[tuple[int, list[tuple[bytes, bytes]]]] = []
        self.reserved: list[list[tuple[bytes, bytes]]] = []
        self.committed: list[bytes] = []
        self.aborted: list[bytes] = []
        self._answers: list[FakeAnswer] = []
        self._places = 0

    def lookup(self, keys: list[bytes], skip: int, *, again: bool) -> FakeLease | None:
        self.lookups.append((keys, skip))
        self.again.append(again)
        if not self.ready:
            return None
        held = 0
        while held < len(keys) and keys[held] in self.stored:
            held += 1
        lease = FakeLease(len(self.lookups), self.epoch, [self._place() for _ in range(max(0, held - skip))])
        while held + lease.promoting < len(keys) and keys[held + lease.promoting] in self.on_disk:
            lease.promoting += 1
        self.leases.append(lease)
        return lease

    def reserve(self, ticket: int, items: list[tuple[bytes, bytes]]) -> None:
        self.asked.append((ticket, items))
        self.reserved.append(items)

    def answer(self, *, with_lease: bool = True) -> None:
        """Answers everything asked so far; keys without a verdict are granted."""
        for ticket, items in self.asked:
            results = []
            for key, _ in items:
                status = self.verdicts.get(key, ReserveStatus.GRANTED)
                results.append(ReserveResult(status, self._place() if status == ReserveStatus.GRANTED else None))
            lease = FakeLease(100 + ticket, self.epoch, results=results) if with_lease else None
            self._answers.append(FakeAnswer(ticket, lease))
        self.asked = []

    def answers(self) -> list[FakeAnswer]:
        answers, self._answers = self._answers, []
        return answers

    def commit(self, lease: Any, keys: list[bytes]) -> None:
        self.committed += keys

    def abort(self, lease: Any, keys: list[bytes]) -> None:
        self.aborted += keys

    def _place(self) -> Location:
        self._places += 1
        return Location(0, self._places * 4096, self._places)
