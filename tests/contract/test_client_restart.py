"""A daemon restarted on its pool, and clients that stay up: what they keep, what they let go, who is waited for."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator

import pytest

from kvd.types import ROOT
from kvd_client import Client, StoreOutcome, open_path
from kvd_client.mapping import housekeeper
from tests.contract.clients import CHUNK_BYTES, buffers, chained, client_of, namespace_of, payloads, prefix
from tests.daemon import ROOT as REPOSITORY
from tests.daemon import Daemon, clean_environment, run_kvd
from tests.wait import wait_until

QUARANTINE_S = 0.3


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    with Daemon(warm=True, pool="32MiB", quarantine=QUARANTINE_S) as daemon:
        yield daemon
        housekeeper.release()


def mappings() -> list[str]:
    """This process's mappings of a pool, addresses and names."""
    with open("/proc/self/maps") as maps:
        return sorted(line.split()[0] for line in maps if "/kvd-pool" in line)


def restart(daemon: Daemon, how: str) -> None:
    getattr(daemon, how)()
    daemon.start()


def connected_again(client: Client, epoch: int) -> None:
    wait_until(lambda: client.connected and client.epoch > epoch, 20, "the client to be back")


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_a_client_that_stays_up_finds_its_chunks_and_maps_nothing_anew(daemon: Daemon, how: str) -> None:
    client = client_of(daemon, "shm")
    namespace, keys, data = namespace_of(client), prefix(20), payloads(20)
    assert client.store(namespace, chained(keys), data) == [StoreOutcome.STORED] * 20
    before = mappings()
    assert len(before) == 1
    for _ in range(2):
        epoch, life = client.epoch, daemon.stats().daemon_id
        restart(daemon, how)
        connected_again(client, epoch)
        assert client.info is not None and client.info.daemon_id != life
        out = buffers(20)
        loaded = wait_until(lambda: client.load(namespace, keys, out) == 20 and out, 20, "every chunk")  # noqa: B023
        assert loaded == data
        assert mappings() == before
    client.close()
    gc.collect()
    assert mappings() == []
    assert daemon.audit() == []


@pytest.mark.slow
def test_descriptors_do_not_pile_up_over_restarts(daemon: Daemon) -> None:
    client = client_of(daemon, "shm")
    counts = []
    for _ in range(4):
        epoch = client.epoch
        restart(daemon, "kill")
        connected_again(client, epoch)
        gc.collect()
        counts.append(len(os.listdir("/proc/self/fd")))
    assert max(counts) <= counts[0] + 2
    client.close()


def test_a_path_of_the_former_life_learns_that_its_slot_was_given_away(daemon: Daemon) -> None:
    client = client_of(daemon, "shm")
    namespace, keys, data = namespace_of(client), prefix(1), payloads(1)
    client.store(namespace, chained(keys), data)
    lease = client.lookup(namespace, keys)
    path = open_path(client.attachment())
    view = path.view(lease.locations[0], CHUNK_BYTES)
    assert view is not None and view == data[0]
    epoch = client.epoch
    restart(daemon, "kill")
    connected_again(client, epoch)
    assert path.intact(lease.locations) == [True], "nobody has touched it"
    assert run_kvd("drop", "--endpoint", daemon.unix_endpoint).returncode == 0
    assert path.intact(lease.locations) == [False]
    view.release()
    path.close()
    client.close()


WRITER = """
    import sys
    from kvd_client import Client, Identity
    client = Client(sys.argv[1], timeout_s=20)
    client.connect(20)
    namespace = client.namespace(Identity(model="writer", weights_revision="1"), 65536)
    lease = client.reserve(namespace, [(bytes.fromhex(sys.argv[2]), b"")])
    view = client.path().view(lease.results[0].location, 65536)
    view[:4] = b"half"
    print("writing", flush=True)
    sys.stdin.readline()
    view[:4] = b"late"
    del view
    print("done", flush=True)
    sys.stdin.readline()
"""


def writer(daemon: Daemon) -> subprocess.Popen[str]:
    """An engine in the middle of a copy."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(WRITER), daemon.unix_endpoint, prefix(1)[0].hex()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env=clean_environment(),
    )
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    return process


@pytest.mark.parametrize("how", ["finishes", "dies"])
def test_a_slot_of_the_former_life_is_free_only_when_its_writer_is_proven_to_have_stopped(
    daemon: Daemon, how: str
) -> None:
    processes = [engine := writer(daemon)]
    try:
        restart(daemon, "kill")
        pool = daemon.stats().pool
        assert pool.quarantined_bytes == 65536 and pool.writing_bytes == 0
        processes.append(other := writer(daemon))
        restart(daemon, "kill")  # the proof lasts over several lives
        assert daemon.stats().pool.quarantined_bytes == 2 * 65536
        other.kill()
        # When the one that is dead has had its quarantine, the other's time would be over as well.
        wait_until(lambda: daemon.stats().pool.quarantined_bytes == 65536, 20, "the dead writer's slot to be free")
        with client_of(daemon, "shm") as client:
            namespace = namespace_of(client)
            keys, data = prefix(200), payloads(1)
            client.store(namespace, [(key, ROOT) for key in keys], data * 200, timeout_s=20)
        assert daemon.stats().pool.quarantined_bytes == 65536, "not even for want of room"
        if how == "finishes":
            assert engine.stdin is not None and engine.stdout is not None
            engine.stdin.write("\n")
            engine.stdin.flush()
            assert engine.stdout.readline() == "done\n"
        else:
            engine.kill()
        wait_until(lambda: daemon.stats().pool.quarantined_bytes == 0, 20, "the slot to be free")
        assert daemon.audit() == []
    finally:
        for process in processes:
            process.kill()
            process.communicate(timeout=10)


def test_a_pool_of_another_size_starts_cold_and_clients_let_the_old_one_go(daemon: Daemon) -> None:
    client = client_of(daemon, "shm")
    namespace, keys, data = namespace_of(client), prefix(4), payloads(4)
    client.store(namespace, chained(keys), data)
    before = mappings()
    daemon.options["pool"] = "16MiB"
    epoch = client.epoch
    restart(daemon, "kill")
    connected_again(client, epoch)
    assert client.load(namespace, keys, buffers(4)) == 0
    gc.collect()
    assert len(mappings()) == 1 and mappings() != before
    assert "another size" in daemon.log
    assert client.store(namespace, chained(keys), data) == [StoreOutcome.STORED] * 4
    client.close()


def test_a_client_that_is_closed_keeps_nothing_of_a_daemon_that_has_gone(daemon: Daemon) -> None:
    client = client_of(daemon, "shm")
    daemon.kill()
    wait_until(lambda: not client.connected, what="the end to be seen")
    wait_until(lambda: housekeeper._retained, what="the mapping to be retained")
    gc.collect()
    assert len(mappings()) == 1
    client.close()
    assert mappings() == []


def test_the_daemon_keeps_none_of_the_locks_that_it_gives_to_clients(daemon: Daemon) -> None:
    def held() -> int:
        links = [os.path.join(f"/proc/{daemon.pid}/fd", name) for name in os.listdir(f"/proc/{daemon.pid}/fd")]
        return sum(os.readlink(link).endswith("/kvd-holders") for link in links if os.path.islink(link))

    with client_of(daemon, "shm") as client:
        open_path(client.attachment()).close()
        # The client may have its descriptor before the daemon has closed its own copy.
        wait_until(lambda: held() == 1, what="the daemon to keep its own only, which has no lock")
