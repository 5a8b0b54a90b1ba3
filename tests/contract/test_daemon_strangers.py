"""Users that the daemon does not know, as real processes of another user."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

from tests.daemon import Daemon, clean_environment

#: Becomes another user only after its imports: that user may not be able to read the environment they come from.
STRANGER = """
    import os, socket, sys
    import grpc
    from kvd.wire.endpoints import parse_endpoint
    from kvd.wire.pb import kvd_pb2 as pb, kvd_pb2_grpc
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
    channel = grpc.insecure_channel(parse_endpoint(sys.argv[1]).grpc_target)
    stub = kvd_pb2_grpc.KvdStub(channel)
    admin = kvd_pb2_grpc.AdminStub(channel)
    hello = pb.ClientNote(hello=pb.Hello(protocol_min=1, protocol_max=1))
    for call in (
        lambda: stub.Stats(pb.StatsRequest(), timeout=10),
        lambda: next(iter(stub.Session(iter([hello]), timeout=10))),
        lambda: admin.Drop(pb.DropRequest(), timeout=10),
        lambda: admin.Audit(pb.AuditRequest(), timeout=10),
    ):
        try:
            call()
        except grpc.RpcError as error:
            print(error.code().name)
        else:
            print("LET IN")
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_another_user_of_this_machine_is_not_let_in_over_loopback() -> None:
    with Daemon() as daemon:
        result = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(STRANGER), daemon.tcp_endpoint],
            env=clean_environment(),
            capture_output=True,
            text=True,
            timeout=50,
            check=False,
        )
    assert result.stdout.split() == ["UNAUTHENTICATED"] * 4, result.stderr


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_another_user_of_this_machine_cannot_reach_the_unix_sockets() -> None:
    with Daemon() as daemon:
        os.chmod(os.path.dirname(daemon.socket), 0o755)  # the sockets' own modes are to be seen
        program = """
            import os, socket, sys
            os.setgroups([]); os.setgid(65534); os.setuid(65534)
            for path, kind in ((sys.argv[1], socket.SOCK_STREAM), (sys.argv[1] + ".shm", socket.SOCK_SEQPACKET)):
                try:
                    socket.socket(socket.AF_UNIX, kind).connect(path)
                except PermissionError:
                    print("REFUSED")
        """
        result = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program), str(daemon.socket)],
            capture_output=True,
            text=True,
            timeout=50,
            check=False,
        )
    assert result.stdout.split() == ["REFUSED"] * 2, result.stderr
