"""Clients that outlive the daemon: they store, read, change their minds and drop, and check every byte they get."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import grpc

from kvd.wire.errors import KvdError
from kvd_client import Client, Location, NamespaceHandle, Piece, Span
from tests.crash.house import KEPT, SCRATCH, TIMEOUT_S, VISITED, House, data_of
from tests.soak.corpus import Corpus, chained

#: One client each.
WAYS = ("shm", "shm", "tcp")
#: What one does when the daemon is away.
_PAUSE_S = 0.01


class Crew:
    """The clients. They do something only inside ``at_work``, but stay connected, or try to, until ``close``."""

    def __init__(self, house: House, seed: object = 0) -> None:
        self.counts: Counter[str] = Counter()
        self._house = house
        self._stop = threading.Event()
        self._failures: list[BaseException] = []
        self._stack = ExitStack()
        self._members = [
            _Member(
                house,
                self._stack.enter_context(Client(house.endpoint(way), name=f"crew {way}", timeout_s=TIMEOUT_S)),
                random.Random(f"{seed} {number}"),
                self._stop,
                self.counts,
            )
            for number, way in enumerate(WAYS)
        ]

    @property
    def client(self) -> Client:
        """One of them, for those who have something to check meanwhile."""
        return self._members[0].client

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """They work as long as the block lasts. Wrong bytes, and errors that a missing daemon does not explain, are
        raised at its end."""
        self._stop.clear()
        threads = [threading.Thread(target=self._run, args=(member,), daemon=True) for member in self._members]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in threads:
                thread.join(60)
            assert not any(thread.is_alive() for thread in threads), "a client hangs"
        if self._failures:
            raise self._failures[0]

    def until_death(self, timeout_s: float) -> bool:
        """Works until the daemon is dead; False when it lived on for ``timeout_s``."""
        deadline = time.monotonic() + timeout_s
        with self.at_work():
            while not self._house.dead and not self._failures and time.monotonic() < deadline:
                time.sleep(0.005)
        return self._house.dead

    def close(self) -> None:
        """Ends the sessions."""
        self._stack.close()

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, member: _Member) -> None:
        try:
            while not self._stop.is_set():
                member.step()
        except BaseException as error:
            self._failures.append(error)


@contextmanager
def furnished(seed: object, **kind: Any) -> Iterator[tuple[House, Crew]]:
    """A ``House(**kind)`` whose daemon serves, with people in it, and everything that is kept in its place."""
    with House(**kind) as house:
        house.start()
        with Crew(house, seed) as crew:
            crew.client.connect(20)
            house.fill(crew.client)
            yield house, crew


class _Member:
    """One client at work."""

    def __init__(
        self, house: House, client: Client, dice: random.Random, stop: threading.Event, counts: Counter[str]
    ) -> None:
        self.client = client
        self._house = house
        self._dice = dice
        self._stop = stop
        self._counts = counts
        self._ways: list[tuple[Callable[[], None], float]] = [
            (self._store_kept, 8),
            (self._store_scratch, 6),
            (self._load, 8),
            (self._hold, 2),
            (self._change_its_mind, 2),
            (self._drop, 0.5),
            (self._visit, 0.3),
        ]

    def step(self) -> None:
        """Does one thing, or waits a little for the daemon."""
        way = self._dice.choices([way for way, _ in self._ways], [weight for _, weight in self._ways])[0]
        try:
            way()
            self._counts[way.__name__] += 1
        except (KvdError, grpc.RpcError, OSError):
            self._counts["away"] += 1
            self._stop.wait(_PAUSE_S)

    # -- what there is to do

    def _store_kept(self) -> None:
        self._store(self.client, *self._some(KEPT))

    def _store_scratch(self) -> None:
        self._store(self.client, *self._some(SCRATCH))

    def _load(self) -> None:
        corpus, keys = self._some((*KEPT, *SCRATCH))
        self._house.read(self.client, corpus, keys)

    def _hold(self) -> None:
        """Looks at slots in place, for a while, and asks afterwards whether they were theirs all the time."""
        corpus, keys = self._some((*KEPT, *SCRATCH))
        path = self.client.path()
        with self.client.lookup(self._space(self.client, corpus), keys) as lease:
            views = [path.view(location, corpus.chunk_bytes) for location in lease.locations]
            self._stop.wait(self._dice.random() * 0.1)
            for key, location, view in zip(keys, lease.locations, views, strict=False):
                if view is not None:
                    equal = view == data_of(corpus, key)
                    assert equal or path.intact([location]) == [False], f"wrong bytes in place of {key.hex()[:16]}"
            del views

    def _change_its_mind(self) -> None:
        """Reserves, writes rubbish into a part, and aborts or dawdles: nobody may ever read that."""
        corpus, keys = self._some((*KEPT, *SCRATCH))
        with self.client.reserve(self._space(self.client, corpus), chained(keys)) as lease:
            granted = [result.location for result in lease.results if result.location is not None]
            self._write_half(corpus, lease.lease_id, granted)
            self._stop.wait(self._dice.random() * 0.02)

    def _drop(self) -> None:
        """An operator drops a namespace of which nothing is promised."""
        self._house.drop(self._dice.choice(SCRATCH))

    def _visit(self) -> None:
        """A client comes, stores, and goes; then its namespace is dropped, and forgotten when nothing is left of it."""
        with Client(self._house.daemon.unix_endpoint, name="visitor", timeout_s=TIMEOUT_S) as client:
            client.connect(1.0)
            self._store(client, VISITED, VISITED.keys(0))
        self._house.drop(VISITED)

    # -- how

    def _some(self, corpora: tuple[Corpus, ...]) -> tuple[Corpus, list[bytes]]:
        corpus = self._dice.choice(corpora)
        keys = corpus.keys(self._dice.randrange(corpus.prefixes))
        return corpus, keys[: self._dice.randint(1, len(keys))]

    def _space(self, client: Client, corpus: Corpus) -> NamespaceHandle:
        return client.namespace(corpus.identity, corpus.chunk_bytes)

    def _store(self, client: Client, corpus: Corpus, keys: list[bytes]) -> None:
        data = [data_of(corpus, key) for key in keys]
        outcomes = client.store(self._space(client, corpus), chained(keys), data)
        self._house.promises.note(corpus, keys, outcomes)
        self._counts.update(outcome.name for outcome in outcomes)

    def _write_half(self, corpus: Corpus, lease_id: int, places: list[Location]) -> None:
        half = corpus.chunk_bytes // 2
        rubbish = self._dice.randbytes(half)
        pieces = [Piece(location, Span(0, half, half, 1), rubbish) for location in places]
        self.client.path().write(lease_id, pieces, time.monotonic() + TIMEOUT_S)
