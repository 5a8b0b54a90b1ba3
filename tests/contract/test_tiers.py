"""What a client stores it gets back, byte for byte, from memory, from a disk, and from a daemon that was restarted."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvd_client import Client, NamespaceHandle, StoreOutcome
from tests.contract.clients import CHUNK_BYTES, buffers, chained, client_of, namespace_of, payloads, prefix
from tests.daemon import Daemon
from tests.soak.corpus import Corpus
from tests.wait import wait_until

POOL_BYTES = 16 << 20
#: Even, odd, and a good part of the pool.
CORPORA = [Corpus(chunk_bytes, 10 * POOL_BYTES // 3) for chunk_bytes in (64 << 10, 200_003, 1 << 20)]

THERE = {StoreOutcome.STORED, StoreOutcome.PRESENT}


def store(client: Client, namespace: NamespaceHandle, keys: list[bytes], data: list[bytes]) -> None:
    """Stores a prefix. NO_ROOM says: later, when the disk has been written."""

    def stored() -> bool:
        return set(client.store(namespace, chained(keys), data)) <= THERE

    wait_until(stored, 30, "room")


def assert_there(client: Client, namespace: NamespaceHandle, keys: list[bytes], data: list[bytes]) -> None:
    """Every byte of a prefix can be had, now or after a moment; whatever is handed out is right."""
    size = namespace.chunk_bytes

    def there() -> bool:
        out = buffers(len(keys), size)
        count = client.load(namespace, keys, out)
        assert out[:count] == data[:count]
        return count == len(keys)

    wait_until(there, 30, "the whole prefix")


def wait_written(daemon: Daemon, records: int) -> None:
    """Until so many records are on the disk."""

    def written() -> bool:
        disk = daemon.stats().disk
        return disk.records >= records and not disk.queue_chunks

    wait_until(written, 30, "the disk to be written")


@pytest.mark.slow
@pytest.mark.parametrize("way", ["shm", "tcp"])
def test_ten_times_the_pool_is_all_there(way: str) -> None:
    with (
        Daemon(pool=f"{POOL_BYTES >> 20}MiB", spill="512MiB") as daemon,
        client_of(daemon, way) as client,
    ):
        prefixes = [
            (client.namespace(corpus.identity, corpus.chunk_bytes), corpus.keys(number), corpus)
            for corpus in CORPORA
            for number in range(corpus.prefixes)
        ]
        assert sum(len(keys) * corpus.chunk_bytes for _, keys, corpus in prefixes) > 10 * POOL_BYTES
        prefixes.sort(key=lambda item: item[1][-1])  # sizes and prefixes in any order
        for namespace, keys, corpus in prefixes:
            store(client, namespace, keys, [corpus.data(key) for key in keys])
        for namespace, keys, corpus in reversed(prefixes):
            assert_there(client, namespace, keys, [corpus.data(key) for key in keys])
        stats = daemon.stats()
        assert stats.disk.live_bytes > 9 * POOL_BYTES
        assert stats.pool.writing_bytes == 0
        assert daemon.audit() == []


@pytest.fixture
def cold() -> Iterator[Daemon]:
    """A daemon whose pool ends with it."""
    with Daemon(pool="32MiB", spill="128MiB", quarantine=0.1) as daemon:
        yield daemon


@pytest.mark.parametrize("way", ["shm", "tcp"])
def test_a_lookup_finds_on_the_disk_what_memory_has_lost_and_waits_for_it_if_asked_to(cold: Daemon, way: str) -> None:
    keys, data = prefix(20), payloads(20)
    with client_of(cold, way) as client:
        namespace = namespace_of(client)
        store(client, namespace, keys, data)
        wait_written(cold, 20)
        cold.stop()
        cold.start()
        wait_until(lambda: client.connected, 20, "the client to connect again")
        wait_written(cold, 20)  # they have been found
        with client.lookup(namespace, keys) as first:
            assert len(first) + first.promoting == 20
        with client.lookup(namespace, keys, again=True, wait_s=30) as lease:
            assert (len(lease), lease.promoting) == (20, 0)
        assert_there(client, namespace, keys, data)
        assert cold.audit() == []


def test_what_is_computed_again_while_it_lies_on_the_disk_is_taken(cold: Daemon) -> None:
    keys, data = prefix(4), payloads(4)
    with client_of(cold, "shm") as client:
        namespace = namespace_of(client)
        store(client, namespace, keys, data)
        wait_written(cold, 4)
        cold.stop()
        cold.start()
        wait_until(lambda: client.connected, 20, "the client to connect again")
        wait_written(cold, 4)
        assert client.store(namespace, chained(keys), data) == [StoreOutcome.STORED] * 4
        assert_there(client, namespace, keys, data)
        assert cold.audit() == []


@pytest.mark.parametrize("way", ["shm", "tcp"])
@pytest.mark.parametrize("spill", [None, "128MiB"])
def test_a_restart_loses_nothing_whether_it_was_asked_for_or_not(way: str, spill: str | None) -> None:
    options = {"spill": spill} if spill else {}
    keys, data = prefix(20), payloads(20)
    with Daemon(pool="32MiB", warm=True, quarantine=0.1, **options) as daemon, client_of(daemon, way) as client:
        namespace = namespace_of(client)
        store(client, namespace, keys, data)
        for end in (daemon.stop, daemon.kill, daemon.kill):
            end()
            daemon.start()
            wait_until(lambda: client.connected, 20, "the client to connect again")
            assert_there(client, namespace, keys, data)
            more, more_data = prefix(2), payloads(2)
            store(client, namespace, more, more_data)
            assert_there(client, namespace, more, more_data)
            assert daemon.audit() == []
        assert daemon.stats().counters["reserved_chunks"] == 2


@pytest.mark.parametrize("way", ["shm", "tcp"])
def test_a_spoiled_disk_gives_misses_and_never_wrong_bytes(cold: Daemon, way: str) -> None:
    sets = [(prefix(4), payloads(4)) for _ in range(8)]
    with client_of(cold, way) as client:
        namespace = namespace_of(client)
        for keys, data in sets:
            store(client, namespace, keys, data)
        wait_written(cold, 32)
        cold.kill()
        extents = sorted(path for path in cold.spill_directory.rglob("*.extent") if path.stat().st_size)
        for extent in extents:
            spoil(extent)
        cold.start()
        wait_until(lambda: client.connected, 20, "the client to connect again")
        lost = 0
        for keys, data in sets:
            out = buffers(4)
            count = client.load(namespace, keys, out)
            assert out[:count] == data[:count]
            lost += 4 - count
        assert lost
        for keys, data in sets:
            store(client, namespace, keys, data)
            assert_there(client, namespace, keys, data)
        assert cold.audit() == []


def spoil(extent: Path) -> None:
    """Turns over a bit in the middle of every second chunk's worth of bytes."""
    with extent.open("r+b") as file:
        for place in range(CHUNK_BYTES // 2, os.fstat(file.fileno()).st_size, 2 * CHUNK_BYTES):
            file.seek(place)
            byte = file.read(1)
            file.seek(place)
            file.write(bytes([byte[0] ^ 1]))
