"""The command ``kvd``."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any, TypeVar, cast

import grpc
from google.protobuf.message import Message

from kvd import config
from kvd.values import parse_size
from kvd.wire.endpoints import UnixEndpoint, find_socket, parse_endpoint
from kvd.wire.errors import KvdError, from_rpc_error
from kvd.wire.pb import kvd_pb2 as pb
from kvd.wire.version import VERSION

#: How long a command waits for the daemon.
CALL_TIMEOUT_S = 5.0
AUDIT_TIMEOUT_S = 60.0

M = TypeVar("M", bound=Message)

# Flags of ``kvd serve``, by the names of the settings; None = a switch. Those of ``config.LISTS`` may be given several
# times. Values are read and checked by kvd.config.
_FLAGS: dict[str, tuple[str | None, str]] = {
    "socket": ("PATH", "Unix socket for engines on this node (default: the first usual place that can be written to)"),
    "listen": ("HOST:PORT", "TCP address of the control plane (default: 127.0.0.1:7440)"),
    "data": ("HOST:PORT", "TCP address of the data plane (default: two ports above --listen)"),
    "http": ("HOST:PORT", "address of /metrics, /healthz and /readyz (default: 127.0.0.1:7441)"),
    "pool": ("SIZE", "memory for chunks, for example 512MiB or 8GiB (default: 1GiB)"),
    "pool_dir": (
        "DIR",
        "tmpfs or hugetlbfs directory for the pool's files, in which a restarted daemon finds its chunks again; auto "
        "(default: one of its own in /dev/shm, if that has room), or none (anonymous memory: a restart starts cold)",
    ),
    "huge_pages": (None, "take huge pages of the hugetlb pool; transparent ones need no setting"),
    "populate": ("WHEN", "take the pool's memory lazy (on first use), background (default) or start (before serving)"),
    "group": ("NAME", "let members of this group in as well"),
    "allow_remote": (None, "let in peers from other machines; they are not authenticated"),
    "drain_timeout": ("SECONDS", "longest wait for transfers under way when stopping (default: 5)"),
    "quarantine": ("SECONDS", "how long slots of a dead writer stay unused (default: 5)"),
    "read_lease": ("SECONDS", "how long a read lease lives without being renewed (default: 30)"),
    "spill_dir": ("DIR", "directory on an NVMe drive for chunks that leave the pool; once for every drive"),
    "spill": ("SIZE", "what may be written there in all, split evenly, for example 200GiB"),
    "spill_write_rate": ("SIZE", "most that is written to the drives in a second, all together (default: 0, no limit)"),
    "spill_write_daily": ("SIZE", "most that is written to the drives in a day, all together (default: 0, no limit)"),
    "spill_floor": ("SIZE", "what stays free on each of their file systems (default: 1GiB)"),
    "spill_admit": ("WHICH", "write chunks always (default), or only those that were reused"),
    "spill_codec": ("HOW", "make records smaller: none (default) or auto (where it is seen to pay)"),
    "ttl": ("TIME", "drop what nobody has used for this long, for example 12h or 7d (default: 0, never)"),
    "shares": ("SHARE", "tenant=NAME:soft=SIZE,hard=SIZE or namespace=ID:..., once for each of them"),
    "recompute_weight": (
        "WEIGHT",
        "eviction counts a chunk behind n tokens as 1 + WEIGHT x n/32K (default: 0, all alike)",
    ),
    "record_trace": ("FILE", "record what lookups ask for, as salted hashes, to be read by kvd replay"),
    "log_level": ("LEVEL", "debug, info (default), warning or error"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; its exit code is 0 for good, 1 for no (good) answer, 2 for wrong usage or settings."""
    arguments = _parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments)
        return code
    except config.BadSetting as error:
        print(f"kvd: {error}", file=sys.stderr)
        return 2
    except KvdError as error:
        print(f"kvd: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


# ---------------------------------------------------------------- commands


def _serve(arguments: argparse.Namespace) -> int:
    loaded = _load(arguments)
    logging.basicConfig(
        level=loaded.settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    # The daemon's own libraries are loaded for this command only: the others answer at once.
    from kvd.server import serve

    return serve(loaded)


def _config(arguments: argparse.Namespace) -> int:
    rows = _load(arguments).describe()
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for key, value, source in rows:
        print(f"{key:<{widths[0]}}  {value:<{widths[1]}}  {source}")
    return 0


def _status(arguments: argparse.Namespace) -> int:
    from kvd import status

    stats = _call(arguments, "Kvd/Stats", pb.StatsRequest(), pb.StatsResponse)
    print(json.dumps(status.as_json(stats), indent=2) if arguments.json else status.as_text(stats))
    return 0


def _drop(arguments: argparse.Namespace) -> int:
    request = pb.DropRequest(namespace_id=arguments.namespace or b"")
    answer = _call(arguments, "Admin/Drop", request, pb.DropResponse)
    on_disk = f" ({answer.records} records on disk)" if answer.records else ""
    print(f"dropped {answer.chunks} chunks{on_disk}; kept {answer.kept} that are in use or pinned")
    return 0


def _pin(arguments: argparse.Namespace) -> int:
    request = pb.PinRequest(namespace_id=arguments.namespace, key=arguments.key or b"")
    answer = _call(arguments, "Admin/Pin", request, pb.PinResponse)
    print(f"pinned; it covers {answer.chunks} chunks now")
    return 0


def _unpin(arguments: argparse.Namespace) -> int:
    request = pb.UnpinRequest(namespace_id=arguments.namespace, key=arguments.key or b"")
    answer = _call(arguments, "Admin/Unpin", request, pb.UnpinResponse)
    print(f"unpinned; it covered {answer.chunks} chunks")
    return 0


def _pins(arguments: argparse.Namespace) -> int:
    from kvd import status

    answer = _call(arguments, "Admin/ListPins", pb.ListPinsRequest(), pb.ListPinsResponse)
    print(json.dumps(status.as_json(answer), indent=2) if arguments.json else status.pins_as_text(answer))
    return 0


def _audit(arguments: argparse.Namespace) -> int:
    answer = _call(arguments, "Admin/Audit", pb.AuditRequest(), pb.AuditResponse, AUDIT_TIMEOUT_S)
    for finding in answer.findings:
        print(finding)
    print("the books agree" if not answer.findings else f"{len(answer.findings)} findings")
    return 1 if answer.findings else 0


def _bench(arguments: argparse.Namespace) -> int:
    if arguments.rounds < 1:
        raise config.BadSetting("rounds", arguments.rounds, "flag --rounds", "give 1 or more")
    # The one command that is a client: it measures a daemon of its own from outside.
    from kvd_client.bench.run import run

    return run(arguments)


def _replay(arguments: argparse.Namespace) -> int:
    from kvd.replay.command import run

    return run(arguments)


def _version(arguments: argparse.Namespace) -> int:
    print(f"kvd {VERSION}")
    return 0


# ---------------------------------------------------------------- how


def _load(arguments: argparse.Namespace) -> config.Loaded:
    return config.load({key: getattr(arguments, key) for key in _FLAGS}, os.environ, arguments.config)


def _call(
    arguments: argparse.Namespace, method: str, request: Message, response: type[M], timeout_s: float = CALL_TIMEOUT_S
) -> M:
    """One call to the daemon. Raises KvdError, its text fit for the terminal."""
    try:
        endpoint = parse_endpoint(arguments.endpoint) if arguments.endpoint else UnixEndpoint(find_socket())
    except ValueError as error:
        raise config.BadSetting("endpoint", arguments.endpoint, "flag --endpoint", str(error)) from error
    with grpc.insecure_channel(endpoint.grpc_target) as channel:
        call = channel.unary_unary(
            f"/kvd.v1.{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=response.FromString,
        )
        try:
            return cast(M, call(request, timeout=timeout_s))
        except grpc.RpcError as failure:
            refusal = from_rpc_error(failure)
    if refusal.code not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
        raise refusal
    missing = isinstance(endpoint, UnixEndpoint) and not os.path.exists(endpoint.path)
    why = "there is no such socket" if missing else str(refusal)
    raise type(refusal)(f"no daemon answers at {endpoint} ({why}); start one with `kvd serve`, or give --endpoint")


def _namespace_id(text: str) -> bytes:
    return _hex(text, "a namespace id is 64 hexadecimal digits, see `kvd status --json`")


def _key(text: str) -> bytes:
    return _hex(text, "a key is 64 hexadecimal digits: the engine's hash of the last block of the chunk")


def _hex(text: str, wanted: str) -> bytes:
    try:
        found = bytes.fromhex(text)
    except ValueError:
        found = b""
    if len(found) != 32:
        raise argparse.ArgumentTypeError(wanted)
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kvd", description="KV cache as a service for LLM engines.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"kvd {VERSION}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    serve = _command(commands, "serve", _serve, "run the daemon")
    _add_settings(serve)
    show = _command(commands, "config", _config, "print the settings in force and where each came from")
    show.add_argument("--show", action="store_true", required=True, help="print them")
    _add_settings(show)
    status = _command(commands, "status", _status, "print the state of a daemon")
    status.add_argument("--json", action="store_true", help="as JSON")
    drop = _command(commands, "drop", _drop, "drop stored chunks that nobody uses")
    drop.add_argument("--namespace", metavar="ID", type=_namespace_id, help="only those of this namespace")
    audit = _command(commands, "audit", _audit, "check the daemon's books against each other")
    pin = _command(commands, "pin", _pin, "wish that a prefix or a namespace stays, in the pool and on disk")
    unpin = _command(commands, "unpin", _unpin, "take that wish back")
    for command in (pin, unpin):
        command.add_argument(
            "namespace", metavar="NAMESPACE", type=_namespace_id, help="its id, see `kvd status --json`"
        )
        command.add_argument(
            "key", metavar="KEY", nargs="?", type=_key, help="of the last chunk of a prefix (default: all)"
        )
    pins = _command(commands, "pins", _pins, "list what is pinned")
    pins.add_argument("--json", action="store_true", help="as JSON")
    for client in (status, drop, pin, unpin, pins, audit):
        client.add_argument(
            "--endpoint", metavar="WHERE", help="unix:PATH or tcp://HOST:PORT (default: the local socket)"
        )
    _add_bench(_command(commands, "bench", _bench, "measure kvd against what the machine does without it"))
    _add_replay(_command(commands, "replay", _replay, "show what eviction would make of a recorded trace"))
    _command(commands, "version", _version, "print the release")
    return parser


def _command(commands: Any, name: str, run: object, text: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    command.set_defaults(run=run)
    return command


def _add_bench(command: argparse.ArgumentParser) -> None:
    parts = ("local", "tcp", "spill", "lookup", "start", "restart", "pages", "copier", "engine", "load", "all")
    command.add_argument("part", nargs="?", choices=parts, default="all")
    command.add_argument(
        "--dir", metavar="DIR", default=".", help="where on the disk that is measured (default: here); nothing stays"
    )
    command.add_argument("--rounds", type=int, default=9, help="rounds that are counted (default: 9; load: 3 at most)")
    command.add_argument("--json", action="store_true", help="as JSON")
    command.add_argument("--markdown", action="store_true", help="as tables of Markdown, with what they depend on")
    command.add_argument("--plot", metavar="FILE", help="a picture of the ratios as well, SVG")
    command.add_argument(
        "--held", type=int, default=10**6, help="most chunks held while lookups are measured (default: 1000000)"
    )
    load = command.add_argument_group("load", "clients that store, load and look up at the same time")
    load.add_argument("--peer", metavar="NAME", action="append", default=[], help="beside kvd; see docs/benchmarks.md")
    load.add_argument("--clients", metavar="N[,N]", type=_counts, default=(1, 4, 16), help="default: 1,4,16")
    load.add_argument(
        "--chunks",
        metavar="SIZE[,SIZE]",
        type=_sizes,
        default=(256 << 10, 2 << 20, 40 << 20),
        help="default: 256KiB,2MiB,40MiB",
    )
    load.add_argument("--batch", type=int, default=0, help="chunks of a request (default: as many as make 8 MiB)")
    load.add_argument("--writes", type=float, default=0.25, help="share of stores in the mixed phase (default: 0.25)")
    load.add_argument("--hits", type=float, default=0.8, help="share of reads of what was stored (default: 0.8)")
    load.add_argument("--seconds", type=float, default=1.0, help="length of each phase in each round (default: 1)")
    load.add_argument("--pool", metavar="SIZE", type=_size, default=1 << 30, help="of every store (default: 1GiB)")


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(_size(part) for part in text.split(","))


def _counts(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _add_replay(command: argparse.ArgumentParser) -> None:
    command.add_argument("trace", metavar="TRACE", help="JSON lines, plain, .xz or .zst; see --record-trace of serve")
    command.add_argument(
        "--policy",
        metavar="NAME[,NAME]",
        default="gittins",
        help="gittins (default: what the daemon does), lru, s3fifo",
    )
    command.add_argument(
        "--capacity-percent",
        metavar="P[,P]",
        default="1,2,5,10",
        help="sizes of the pool, in percent of the trace's different blocks (default: 1,2,5,10)",
    )
    command.add_argument("--disk-percent", metavar="P[,P]", help="sizes of the disks below it (default: none)")
    command.add_argument(
        "--spill-admit",
        choices=("always", "reused"),
        default="always",
        help="what is written to them (default: always)",
    )
    command.add_argument(
        "--recompute-weight", metavar="WEIGHT", type=float, default=0.0, help="as of serve (default: 0)"
    )
    command.add_argument("--partial-tails", action="store_true", help="store last blocks that are not full, too")
    command.add_argument("--json", action="store_true", help="as JSON")


def _add_settings(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--config", metavar="FILE", help="TOML file with settings; flags and KVD_... variables win over it"
    )
    for key, (value, text) in _FLAGS.items():
        flag = "--" + key.replace("_", "-")
        if value is None:
            command.add_argument(flag, dest=key, action="store_const", const=True, help=text)
        elif key in config.LISTS:
            command.add_argument(flag, dest=key, action="append", metavar=value, help=text)
        else:
            command.add_argument(flag, dest=key, metavar=value, help=text)
