"""A real daemon: how it starts, what it answers, how it stops."""

from __future__ import annotations

import grp
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from kvd.wire import errors
from kvd.wire.lifeline import socket_path
from kvd.wire.pb import kvd_pb2 as pb
from tests.daemon import Daemon, run_kvd
from tests.raw import RawSession
from tests.wait import wait_until

KEYS = [bytes([number]) * 32 for number in range(1, 4)]


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with Daemon() as daemon:
        yield daemon
        assert daemon.audit() == []
        assert "Traceback" not in daemon.log


def refused(*flags: str, **environment: str) -> str:
    """Why ``kvd serve`` with these flags did not start."""
    result = run_kvd("serve", *flags, **environment)
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    return result.stderr


def free_places(directory: Path) -> list[str]:
    """Flags that keep a daemon out of everybody's way."""
    ports = ["--listen", "127.0.0.1:0", "--http", "127.0.0.1:0"]
    return ["--socket", f"{directory}/x.sock", *ports, "--pool-dir", "none", "--pool", "4MiB"]


# ---------------------------------------------------------------- what it answers


def test_one_line_says_where_everything_is(daemon: Daemon) -> None:
    assert daemon.line.startswith(f"kvd 0.1.0 serving: unix:{daemon.socket} tcp://127.0.0.1:")
    assert " data://127.0.0.1:" in daemon.line
    assert " http://127.0.0.1:" in daemon.line
    assert " pool 64MiB (memfd, " in daemon.line
    assert ":0 " not in daemon.line


def test_the_sockets_are_for_this_user_alone(daemon: Daemon) -> None:
    for path in (daemon.socket, socket_path(daemon.socket)):
        assert stat.filemode(os.stat(path).st_mode) == "srw-------"


@pytest.mark.parametrize("endpoint", ["unix", "tcp"])
def test_health_and_reflection_answer(daemon: Daemon, endpoint: str) -> None:
    target = daemon.unix_endpoint if endpoint == "unix" else daemon.tcp_endpoint.removeprefix("tcp://")
    with grpc.insecure_channel(target) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "kvd.v1.Kvd", "kvd.v1.Admin"):
            answer = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        requests = [
            reflection_pb2.ServerReflectionRequest(list_services=""),
            reflection_pb2.ServerReflectionRequest(file_containing_symbol="kvd.v1.Kvd"),
        ]
        services, files = list(reflection.ServerReflectionInfo(iter(requests), timeout=10))
        names = {service.name for service in services.list_services_response.service}
        assert {"kvd.v1.Kvd", "kvd.v1.Admin", "grpc.health.v1.Health"} <= names
        assert any(b"LookupRequest" in file for file in files.file_descriptor_response.file_descriptor_proto)


def test_http_answers(daemon: Daemon) -> None:
    assert daemon.get("/healthz") == (200, "ok\n")
    assert daemon.get("/readyz") == (200, "serving\n")
    assert daemon.get("/nothing")[0] == 404
    metrics = daemon.metrics()
    assert metrics["kvd_pool_capacity_bytes"] == 64 << 20
    states = [value for name, value in metrics.items() if name.startswith("kvd_pool_bytes{")]
    assert sum(states) == 64 << 20


def test_metrics_tell_what_has_happened(daemon: Daemon) -> None:
    before = daemon.metrics()
    with RawSession(daemon.unix_endpoint, daemon.socket) as session:
        namespace = session.open_namespace("metrics")
        session.reserve(namespace, KEYS)
        session.commit(namespace, KEYS)
        session.lookup(namespace, [*KEYS, bytes(32)])
        after = daemon.metrics()
        assert after['kvd_sessions{path="shm"}'] == 1
        assert after["kvd_read_leases"] == 1

    def risen(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert risen("kvd_lookup_asked_chunks_total") == 4
    assert risen('kvd_lookup_hit_chunks_total{tier="host"}') == 3
    assert risen("kvd_lookup_miss_chunks_total") == 1
    assert risen('kvd_reserve_chunks_total{outcome="granted"}') == 3
    assert risen('kvd_write_chunks_total{outcome="stored"}') == 3
    assert risen('kvd_transfer_bytes_total{direction="in",path="shm"}') == 3 * 4096
    assert risen('kvd_requests_total{code="OK",method="Lookup"}') == 1
    assert risen('kvd_request_seconds_count{method="Lookup"}') == 1
    labels = {label.split("=")[0] for name in after for label in name.partition("{")[2].rstrip("}").split(",") if label}
    bounded = {"code", "method", "le", "path", "direction", "state", "tier", "outcome", "reason", "version"}
    assert labels <= bounded | {"tenant", "drive", "share", "bound"}


def test_status_tells_people_and_programs(daemon: Daemon) -> None:
    with RawSession(daemon.unix_endpoint, daemon.socket) as session:
        session.open_namespace("a-model")
        text = run_kvd("status", "--endpoint", daemon.tcp_endpoint).stdout
        found = daemon.status()
    assert "kvd 0.1.0, serving for" in text
    assert "a-model" in text
    assert "raw 1" in text
    assert f"uid {os.getuid()} pid {os.getpid()}" in text
    assert found["state"] == "serving"
    assert found["pool"]["bytes"] == 64 << 20
    assert [entry["path"] for entry in found["sessions"]] == ["shm"]
    assert isinstance(found["counters"]["lookups"], int)


def test_json_status_holds_every_field_of_the_answer(daemon: Daemon) -> None:
    result = run_kvd("status", "--json", "--endpoint", daemon.unix_endpoint)
    found = json.loads(result.stdout)
    assert set(found) == {field.name for field in pb.StatsResponse.DESCRIPTOR.fields}


def test_status_finds_the_daemon_by_itself(daemon: Daemon) -> None:
    assert run_kvd("status", KVD_SOCKET=daemon.socket).returncode == 0


def test_without_a_daemon_the_commands_say_so(tmp_path: Path) -> None:
    for command in (["status"], ["status", "--json"], ["drop"], ["audit"], ["pins"]):
        result = run_kvd(*command, "--endpoint", f"unix:{tmp_path}/none.sock")
        assert result.returncode == 1
        assert result.stdout == ""
        assert f"no daemon answers at unix:{tmp_path}/none.sock (there is no such socket)" in result.stderr
    result = run_kvd("status", "--endpoint", "nonsense")
    assert result.returncode == 2
    assert "endpoint = 'nonsense' (flag --endpoint)" in result.stderr


def test_an_operator_drops_what_nobody_uses(daemon: Daemon) -> None:
    with RawSession(daemon.unix_endpoint, daemon.socket) as session:
        namespace = session.open_namespace("dropped")
        session.reserve(namespace, KEYS)
        session.commit(namespace, KEYS)
        result = run_kvd("drop", "--namespace", namespace.hex(), "--endpoint", daemon.unix_endpoint)
        assert result.stdout == "dropped 3 chunks; kept 0 that are in use or pinned\n"
        assert not session.lookup(namespace, KEYS).offsets
    assert run_kvd("audit", "--endpoint", daemon.unix_endpoint).stdout == "the books agree\n"
    assert run_kvd("drop", "--namespace", "beef", "--endpoint", daemon.unix_endpoint).returncode == 2


def test_an_operator_pins_lists_and_unpins(daemon: Daemon) -> None:
    where = ("--endpoint", daemon.unix_endpoint)
    with RawSession(daemon.unix_endpoint, daemon.socket) as session:
        namespace = session.open_namespace("pinned")
        session.reserve(namespace, KEYS)
        session.commit(namespace, KEYS)
        second = KEYS[1].hex()
        assert run_kvd("pin", namespace.hex(), second, *where).stdout == "pinned; it covers 2 chunks now\n"
        assert run_kvd("pin", namespace.hex(), second, *where).stdout == "pinned; it covers 2 chunks now\n"
        (listed,) = json.loads(run_kvd("pins", "--json", *where).stdout)["pins"]
        assert listed == {"namespace_id": namespace.hex(), "key": second, "chunks": 2, "bytes": 2 * 4096}
        assert f"{namespace.hex()}  {second}  2" in run_kvd("pins", *where).stdout
        assert daemon.metrics()['kvd_pinned_chunks{tenant="default"}'] == 2
        (figures,) = [one for one in daemon.status()["namespaces"] if one["namespace_id"] == namespace.hex()]
        assert figures["pinned_chunks"] == 2
        assert run_kvd("unpin", namespace.hex(), second, *where).stdout == "unpinned; it covered 2 chunks\n"
        assert run_kvd("pins", *where).stdout == "nothing is pinned\n"
        assert run_kvd("pin", namespace.hex(), *where).stdout == "pinned; it covers 3 chunks now\n"
        assert run_kvd("unpin", namespace.hex(), *where).returncode == 0
    assert run_kvd("pin", "beef", *where).returncode == 2
    assert run_kvd("pin", bytes(32).hex(), "beef", *where).returncode == 2
    assert run_kvd("audit", *where).stdout == "the books agree\n"


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
def test_everything_works_over_ipv6() -> None:
    with Daemon(listen="[::1]:0", http="[::1]:0", pool="4MiB") as daemon:
        assert daemon.tcp_endpoint.startswith("tcp://[::1]:")
        assert daemon.data_endpoint.startswith("[::1]:")
        assert daemon.get("/readyz")[0] == 200
        with RawSession(daemon.tcp_endpoint.removeprefix("tcp://")) as session:
            assert session.welcome.tenant == "default"
            assert daemon.status()["sessions"][0]["peer"].startswith("[::1]:")
        assert run_kvd("status", "--endpoint", daemon.tcp_endpoint).returncode == 0


# ---------------------------------------------------------------- requests that are refused


def failure(session: RawSession, method: str, request: object, token: bytes | None = None) -> errors.KvdError:
    with pytest.raises(grpc.RpcError) as caught:
        session.call(method, request, token)
    return errors.from_rpc_error(caught.value)


def test_refusals_carry_a_reason_that_programs_can_read(daemon: Daemon) -> None:
    with RawSession(daemon.unix_endpoint, daemon.socket) as session:
        lookup = pb.LookupRequest(namespace_id=bytes(32), lease_id=1, keys=KEYS)
        assert type(failure(session, "Lookup", lookup, token=bytes(16))) is errors.SessionUnknown
        assert type(failure(session, "Lookup", lookup, token=b"")) is errors.SessionUnknown
        assert type(failure(session, "Lookup", lookup)) is errors.NamespaceUnknown
        namespace = session.open_namespace()
        short = pb.LookupRequest(namespace_id=namespace, lease_id=1, keys=[b"short"])
        assert type(failure(session, "Lookup", short)) is errors.InvalidRequest
        long = pb.LookupRequest(namespace_id=namespace, lease_id=1, keys=[bytes(32)] * 5000)
        assert type(failure(session, "Lookup", long)) is errors.InvalidRequest
        huge = pb.Identity(format_version=1, model="x" * 2000, weights_revision="r", num_layers=1, num_kv_heads=1)
        request = pb.OpenNamespaceRequest(identity=huge, chunk_bytes=4096)
        assert type(failure(session, "OpenNamespace", request)) is errors.InvalidRequest


def test_a_message_beyond_the_bound_is_refused(daemon: Daemon) -> None:
    with RawSession(daemon.unix_endpoint, daemon.socket) as session:
        with pytest.raises(grpc.RpcError) as caught:
            session.raw_call("Kvd/Lookup", bytes(5 << 20))
        assert isinstance(caught.value, grpc.Call)
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert session.call("Stats", pb.StatsRequest()).state == "serving"


def test_the_token_of_a_session_that_has_ended_is_worth_nothing(daemon: Daemon) -> None:
    with RawSession(daemon.tcp_endpoint.removeprefix("tcp://")) as session:
        session.open_namespace()
        session.end_stream()
        wait_until(lambda: not daemon.stats().sessions, what="the session to end")
        assert type(failure(session, "Renew", pb.RenewRequest(lease_ids=[1]))) is errors.SessionUnknown


def test_clients_and_daemons_without_a_common_protocol_part_with_a_reason(daemon: Daemon) -> None:
    for low, high in ((2, 9), (0, 0)):
        with pytest.raises(grpc.RpcError) as caught:
            RawSession(daemon.tcp_endpoint.removeprefix("tcp://"), hello=pb.Hello(protocol_min=low, protocol_max=high))
        error = errors.from_rpc_error(caught.value)
        assert type(error) is errors.ProtocolMismatch
        assert f"{low} to {high}" in str(error)


def test_a_session_begins_with_hello(daemon: Daemon) -> None:
    beat = pb.ClientNote(heartbeat=pb.Heartbeat(sequence=1)).SerializeToString()
    with pytest.raises(grpc.RpcError) as caught:
        RawSession(daemon.tcp_endpoint.removeprefix("tcp://"), hello=beat)
    assert type(errors.from_rpc_error(caught.value)) is errors.InvalidRequest


# ---------------------------------------------------------------- start


def test_a_second_daemon_on_the_same_socket_is_refused_with_the_reason(daemon: Daemon) -> None:
    text = refused("--socket", daemon.socket, "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", "--pool", "4MiB")
    assert f"socket = '{daemon.socket}' (flag --socket)" in text
    assert f"a daemon serves there already (process {daemon.pid})" in text
    assert daemon.stats().state == "serving"


def test_a_second_daemon_on_the_same_pool_directory_is_refused(tmp_path: Path) -> None:
    directory = Path("/dev/shm") / f"kvd-test-{os.getpid()}"
    directory.mkdir()
    try:
        with Daemon(pool_dir=directory, pool="4MiB") as first:
            assert f"file in {directory}" in first.line
            text = refused(*free_places(tmp_path), "--pool-dir", str(directory))
            assert f"pool_dir = '{directory}' (flag --pool-dir): a daemon serves there already" in text
        assert stat.S_IMODE((directory / "kvd-pool").stat().st_mode) == 0o600
    finally:
        shutil.rmtree(directory)


@pytest.mark.parametrize("key", ["listen", "data", "http"])
def test_a_port_that_is_taken_is_named(tmp_path: Path, key: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        text = refused(*free_places(tmp_path), f"--{key}", address)
    assert f"{key} = '{address}' (flag --{key}): cannot be listened on: Address already in use" in text


def test_a_dead_daemons_socket_is_replaced() -> None:
    with Daemon(pool="4MiB") as daemon:
        before = daemon.line
        daemon.kill()
        assert os.path.exists(daemon.socket)
        daemon.start()
        assert daemon.line == before  # the same places
        assert daemon.stats().state == "serving"
        assert daemon.stop() == 0


def test_a_file_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    precious = tmp_path / "x.sock"
    precious.write_text("precious")
    assert "exists and is not a socket" in refused(*free_places(tmp_path))
    assert precious.read_text() == "precious"


def test_bad_settings_stop_the_start_with_a_message(tmp_path: Path) -> None:
    assert "pool = 'much' (flag --pool): write a size" in refused(*free_places(tmp_path)[:-1], "much")
    assert "pool = '8GB' (environment KVD_POOL): write a size" in refused(*free_places(tmp_path)[:-2], KVD_POOL="8GB")
    assert "listen = '0.0.0.0:0' (flag --listen): not a loopback address" in refused(
        *free_places(tmp_path), "--listen", "0.0.0.0:0"
    )
    assert "larger than the" in refused(*free_places(tmp_path)[:-1], "1000TiB")
    assert "there is no directory" in refused("--socket", f"{tmp_path}/none/x.sock")
    assert "unrecognized arguments: --poool" in refused("--poool", "1GiB")


def test_config_show_prints_what_is_in_force_and_where_it_came_from(tmp_path: Path) -> None:
    file = tmp_path / "kvd.toml"
    file.write_text("read_lease = 7\n")
    result = run_kvd("config", "--show", "--config", str(file), "--pool", "2GiB", KVD_QUARANTINE="3")
    rows = {line.split()[0]: line.split(maxsplit=2)[1:] for line in result.stdout.splitlines()}
    assert rows["pool"] == ["2GiB", "flag --pool"]
    assert rows["quarantine"] == ["3", "environment KVD_QUARANTINE"]
    assert rows["read_lease"] == ["7", f"file {file}"]
    assert rows["listen"] == ["127.0.0.1:7440", "default"]


def test_an_option_that_opens_the_daemon_to_others_is_warned_about() -> None:
    with Daemon(listen="0.0.0.0:0", allow_remote=True, pool="4MiB") as daemon:
        assert "WARNING" in daemon.log
        assert "without authentication" in daemon.log


def test_a_group_is_let_in_by_the_sockets_modes() -> None:
    group = grp.getgrgid(os.getgid())
    with Daemon(group=group.gr_name, pool="4MiB") as daemon:
        for path in (daemon.socket, socket_path(daemon.socket)):
            found = os.stat(path)
            assert (stat.filemode(found.st_mode), found.st_gid) == ("srw-rw----", group.gr_gid)


@pytest.mark.parametrize(("populate", "taken"), [("lazy", 0), ("start", 16 << 20)])
def test_the_pools_memory_is_taken_when_it_was_asked_to_be(populate: str, taken: int) -> None:
    with Daemon(pool="16MiB", populate=populate) as daemon:
        assert daemon.stats().pool.populated_bytes == taken


def test_by_default_the_pools_memory_is_taken_in_the_background(daemon: Daemon) -> None:
    wait_until(lambda: daemon.stats().pool.populated_bytes == 64 << 20, what="the pool to be populated")


def test_the_daemon_is_small_and_drags_nothing_heavy_in(daemon: Daemon) -> None:
    with Daemon(pool="4MiB") as idle:
        status = Path(f"/proc/{idle.pid}/status").read_text()
        rss_bytes = int(status.split("VmRSS:")[1].split()[0]) * 1024
        assert rss_bytes - (4 << 20) < 100 << 20
    heavy = "[m for m in ('numpy', 'torch', 'cupy') if m in sys.modules]"
    program = f"import sys, kvd.server, kvd.cli, kvd.status; print({heavy})"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "[]"


# ---------------------------------------------------------------- stop


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_well_and_leaves_no_sockets(number: signal.Signals) -> None:
    with Daemon(pool="4MiB") as daemon:
        os.kill(daemon.pid, number)
        wait_until(lambda: daemon.exit_code is not None, what="the daemon to stop")
        assert daemon.exit_code == 0
        assert not os.path.exists(daemon.socket)
        assert not os.path.exists(socket_path(daemon.socket))


def test_a_stopping_daemon_tells_its_sessions_grants_nothing_and_waits_for_writes() -> None:
    with Daemon(pool="4MiB", drain_timeout=30) as daemon, RawSession(daemon.unix_endpoint, daemon.socket) as session:
        namespace = session.open_namespace()
        session.reserve(namespace, KEYS[:1])
        os.kill(daemon.pid, signal.SIGTERM)
        note = session.next_note()
        assert note.draining.deadline_ms == 30_000
        refusal = pb.ReserveRequest(namespace_id=namespace, lease_id=9, items=[pb.ReserveItem(key=KEYS[1])])
        assert type(failure(session, "Reserve", refusal)) is errors.Draining
        assert daemon.get("/readyz") == (503, "stopping\n")
        assert daemon.get("/healthz")[0] == 200
        assert daemon.stats().state == "draining"
        assert session.commit(namespace, KEYS[:1]) == [1]  # what was begun is finished
        wait_until(lambda: daemon.exit_code is not None, what="the daemon to stop")
        assert daemon.exit_code == 0
        with pytest.raises(grpc.RpcError) as caught:
            session.next_note()
        assert type(errors.from_rpc_error(caught.value)) is errors.Draining


@pytest.mark.parametrize("cut_short_by", ["deadline", "second signal"])
def test_a_write_that_never_ends_does_not_hold_the_stop_up(cut_short_by: str) -> None:
    timeout_s = 0.2 if cut_short_by == "deadline" else 300
    with (
        Daemon(pool="4MiB", drain_timeout=timeout_s) as daemon,
        RawSession(daemon.unix_endpoint, daemon.socket) as session,
    ):
        session.reserve(session.open_namespace(), KEYS[:1])
        os.kill(daemon.pid, signal.SIGTERM)
        session.next_note()
        if cut_short_by == "second signal":
            os.kill(daemon.pid, signal.SIGTERM)
        wait_until(lambda: daemon.exit_code is not None, what="the daemon to stop")
        assert daemon.exit_code == 0
