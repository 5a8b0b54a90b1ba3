"""A real daemon: what it answers, and what it refuses."""

from __future__ import annotations

import json
import os
import socket
import stat
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
