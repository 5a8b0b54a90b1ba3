"""A real daemon: how it starts, and how it stops."""

from __future__ import annotations

import grp
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import grpc
import pytest

from kvd.wire import errors
from kvd.wire.lifeline import socket_path
from kvd.wire.pb import kvd_pb2 as pb
from tests.daemon import Daemon, run_kvd
from tests.raw import RawSession
from tests.wait import wait_until

KEYS = [bytes([number]) * 32 for number in range(1, 4)]


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
        with pytest.raises(grpc.RpcError) as caught:
            session.call("Reserve", refusal)
        assert type(errors.from_rpc_error(caught.value)) is errors.Draining
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
