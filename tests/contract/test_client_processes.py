"""Several processes of one engine, their deaths, and what is left behind."""

from __future__ import annotations

import base64
import os
import pickle
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator

import pytest

from kvd_client import Piece, SessionUnknown, StoreOutcome, Unavailable, open_path, whole
from tests.contract.clients import (
    CHUNK_BYTES,
    WAYS,
    buffers,
    chained,
    client_of,
    namespace_of,
    payloads,
    prefix,
    wait_for_no_writes,
)
from tests.daemon import ROOT, Daemon, clean_environment
from tests.wait import wait_until

QUARANTINE_S = 0.3


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with Daemon(pool="32MiB", quarantine=QUARANTINE_S) as daemon:
        yield daemon


@pytest.fixture(autouse=True)
def nothing_is_left(daemon: Daemon) -> Iterator[None]:
    yield
    wait_for_no_writes(daemon)
    wait_until(lambda: not daemon.stats().sessions, what="every session to be gone")
    assert daemon.audit() == []


def python(script: str, *arguments: str) -> subprocess.Popen[str]:
    """A process that runs ``script``."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=clean_environment(),
    )


WORKER = """
    import base64, pickle, sys, time
    from kvd_client import Piece, open_path
    attachment, lease_id, location, span, data = pickle.loads(base64.b64decode(sys.argv[1]))
    path = open_path(attachment)
    print(path.kind, path.write(lease_id, [Piece(location, span, data)], time.monotonic() + 20), flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("way", WAYS)
def test_a_worker_process_copies_under_the_schedulers_lease(daemon: Daemon, way: str) -> None:
    with client_of(daemon, way) as client:
        namespace, keys, data = namespace_of(client, 4096), prefix(1), payloads(1, 4096)
        with client.reserve(namespace, chained(keys)) as lease:
            message = (client.attachment(), lease.lease_id, lease.results[0].location, whole(4096), data[0])
            worker = python(WORKER, base64.b64encode(pickle.dumps(message)).decode())
            assert worker.stdout is not None
            kind = "shm" if way == "shm" else "tcp"
            assert worker.stdout.readline() == f"{kind} [True]\n"
            worker.communicate("", timeout=20)
            assert worker.returncode == 0
            lease.commit(keys)
        out = buffers(1, 4096)
        assert client.load(namespace, keys, out) == 1
        assert out == data


@pytest.mark.parametrize("way", WAYS)
def test_an_attachment_is_void_when_its_session_has_ended(daemon: Daemon, way: str) -> None:
    client = client_of(daemon, way)
    attachment = client.attachment()
    assert "token" not in repr(attachment)
    assert attachment.token.hex() not in repr(attachment)
    open_path(attachment).close()
    client.close()
    wait_until(lambda: not daemon.stats().sessions, what="the session to be over")
    with pytest.raises(SessionUnknown):
        open_path(attachment)


def test_slots_of_a_dead_scheduler_are_held_until_its_worker_is_gone_too(daemon: Daemon) -> None:
    client = client_of(daemon, "shm")
    namespace = namespace_of(client, 4096)
    lease = client.reserve(namespace, chained(prefix(1)))
    message = (client.attachment(), lease.lease_id, lease.results[0].location, whole(4096), bytes(4096))
    worker = python(WORKER, base64.b64encode(pickle.dumps(message)).decode())
    assert worker.stdout is not None
    assert worker.stdout.readline() == "shm [True]\n"
    client.close()
    wait_until(lambda: daemon.stats().sessions[0].members == 1, what="the scheduler to be gone")
    for _ in range(20):
        pool = daemon.stats().pool
        assert pool.writing_bytes and not pool.quarantined_bytes
    worker.kill()
    worker.communicate(timeout=20)
    wait_for_no_writes(daemon)


ENGINE = """
    import sys, time
    from kvd_client import Client, Identity, Piece, whole
    endpoint, transport, chunk_bytes = sys.argv[1], sys.argv[2], int(sys.argv[3])
    client = Client(endpoint, transport=transport, timeout_s=20)
    client.connect(20)
    namespace = client.namespace(Identity(model="killed", weights_revision=endpoint + transport), chunk_bytes)
    keys = [bytes([i]) * 32 for i in range(8)]
    items = [(key, keys[i - 1] if i else b"") for i, key in enumerate(keys)]
    lease = client.reserve(namespace, items)
    pieces = [Piece(r.location, whole(chunk_bytes), b"x" * chunk_bytes) for r in lease.results]
    client.path().write(lease.lease_id, pieces[:4], time.monotonic() + 20)
    lease.commit(keys[:2])
    half = whole(chunk_bytes // 2)
    client.path().write(
        lease.lease_id, [Piece(p.location, half, b"y" * half.size) for p in pieces[4:6]], time.monotonic() + 20
    )
    print("in the middle", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("way", WAYS)
def test_a_client_killed_in_mid_store_leaves_nothing_half_written_behind(daemon: Daemon, way: str) -> None:
    endpoint = daemon.tcp_endpoint if way == "tcp" else daemon.unix_endpoint
    transport = "tcp" if way == "tcp-data" else "auto"
    engine = python(ENGINE, endpoint, transport, str(CHUNK_BYTES))
    assert engine.stdout is not None
    assert engine.stdout.readline() == "in the middle\n"
    before = daemon.stats()
    assert before.pool.writing_bytes >= 6 * CHUNK_BYTES
    counted = before.counters["quarantined_chunks"]
    engine.kill()
    engine.communicate(timeout=20)
    wait_for_no_writes(daemon)
    assert daemon.stats().counters["quarantined_chunks"] == counted + 6, "the slots went through the quarantine"

    with client_of(daemon, way) as client:
        identity = namespace_of(client).identity
        namespace = client.namespace(type(identity)(model="killed", weights_revision=endpoint + transport), CHUNK_BYTES)
        keys = [bytes([i]) * 32 for i in range(8)]
        out = buffers(8)
        assert client.load(namespace, keys, out) == 2
        assert out[:2] == [b"x" * CHUNK_BYTES] * 2
        data = payloads(8)
        assert client.store(namespace, chained(keys), data) == [StoreOutcome.PRESENT] * 2 + [StoreOutcome.STORED] * 6


def test_a_program_that_forgets_to_close_ends_at_once(daemon: Daemon) -> None:
    script = """
        import sys
        from kvd_client import Client, Identity, ROOT
        client = Client(sys.argv[1], timeout_s=20)
        client.connect(20)
        namespace = client.namespace(Identity(model="forgetful", weights_revision="1"), 4096)
        print(client.store(namespace, [(b"k" * 32, ROOT)], [bytes(4096)])[0].name)
    """
    for endpoint in (daemon.unix_endpoint, daemon.tcp_endpoint):
        program = python(script, endpoint)
        output, _ = program.communicate(timeout=20)
        assert program.returncode == 0
        assert output in ("STORED\n", "PRESENT\n")


def test_importing_the_client_brings_no_tensor_library() -> None:
    script = """
        import sys
        import kvd_client
        heavy = {"torch", "numpy", "cupy", "vllm", "uvloop", "prometheus_client"}
        rooms = [name for name in sys.modules if name.startswith("kvd.") and not name.startswith("kvd.wire")]
        print(sorted(heavy & set(sys.modules)), rooms)
    """
    output, _ = python(script).communicate(timeout=30)
    assert output == "[] []\n"


def test_descriptors_do_not_pile_up(daemon: Daemon) -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    for way in WAYS:
        client_of(daemon, way).close()
    before = descriptors()
    for _ in range(5):
        for way in WAYS:
            with client_of(daemon, way) as client:
                path = open_path(client.attachment())
                assert path.alive
                path.close()
    wait_until(lambda: descriptors() <= before + 4, what="the descriptors to be closed")


def test_a_path_that_cannot_be_opened_says_why(daemon: Daemon) -> None:
    with client_of(daemon, "shm") as client:
        attachment = client.attachment()
        with pytest.raises(SessionUnknown):
            open_path(attachment._replace(token=bytes(16)))
        with pytest.raises(SessionUnknown):
            open_path(attachment._replace(daemon_id=attachment.daemon_id ^ 1))
        with pytest.raises(Unavailable):
            open_path(attachment._replace(address="/nowhere/kvd.sock.shm"))
        path = open_path(attachment)
        namespace, keys, data = namespace_of(client), prefix(1), payloads(1)
        client.store(namespace, chained(keys), data)
        with client.lookup(namespace, keys) as lease:
            out = buffers(1)
            pieces = [Piece(lease.locations[0], whole(CHUNK_BYTES), out[0])]
            assert path.read(lease.lease_id, pieces, time.monotonic() + 10) == [True]
            assert out == data
        path.close()
