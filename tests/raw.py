"""The protocols by hand, for tests of the daemon that must not depend on the client."""

from __future__ import annotations

import array
import os
import queue
import socket
from collections.abc import Iterator
from typing import Any, NamedTuple

import grpc

from kvd.wire import calls, errors, lifeline
from kvd.wire.chunks import Location
from kvd.wire.identity import Identity
from kvd.wire.pb import kvd_pb2 as pb

TIMEOUT_S = 10.0


def slots_of(answer: pb.LookupResponse | pb.ReserveResponse) -> list[Location]:
    """The slots that an answer names."""
    segments = answer.segments or [0] * len(answer.offsets)
    return [Location(*slot) for slot in zip(segments, answer.offsets, answer.generations, strict=True)]


class Welcomed(NamedTuple):
    """What a lifeline was answered."""

    status: int
    daemon_id: int
    ticket: bytes
    segments: list[lifeline.SegmentInfo]
    descriptors: list[int]  # two per segment
    presence_bytes: int


class RawLifeline:
    """A lifeline socket; ``close`` is this process's death as far as the daemon can see."""

    def __init__(self, path: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(TIMEOUT_S)
        self.socket.connect(path)
        self.descriptors: list[int] = []
        self.channel: socket.socket | None = None

    def hello(
        self, kind: int = lifeline.Kind.OPEN, token: bytes = bytes(16), version: int = lifeline.VERSION
    ) -> Welcomed:
        """Says HELLO and reads the answer."""
        self.socket.send(lifeline.HELLO.pack(lifeline.MAGIC, version, kind, token))
        message, rights, _, _ = self.socket.recvmsg(lifeline.MAX_MESSAGE_BYTES, socket.CMSG_SPACE(4 * 16))
        found = array.array("i")
        for level, what, data in rights:
            assert (level, what) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
            found.frombytes(data)
        self.descriptors += found
        size = lifeline.WELCOME.size
        magic, version, status, daemon_id, ticket, count, _, presence_bytes = lifeline.WELCOME.unpack_from(message)
        assert (magic, version) == (lifeline.MAGIC, lifeline.VERSION)
        segments = [
            lifeline.SegmentInfo(*lifeline.SEGMENT.unpack_from(message, size + i * lifeline.SEGMENT.size))
            for i in range(count)
        ]
        if status == lifeline.Status.OK:
            self.channel = socket.socket(fileno=os.dup(found[2 * count]))
            self.channel.settimeout(TIMEOUT_S)
        return Welcomed(status, daemon_id, ticket, segments, list(found)[: 2 * count], presence_bytes)

    def ask(self, request: calls.Request, request_id: int = 1) -> memoryview | errors.KvdError:
        """Sends a frame over the call channel and reads its answer."""
        assert self.channel is not None
        self.channel.sendall(calls.pack_request(request, request_id))
        answered, op, body = self.answer()
        assert (answered, op) == (request_id, calls.op_of(request))
        return body

    def answer(self) -> tuple[int, calls.Op, memoryview | errors.KvdError]:
        """Reads one answer from the call channel; ConnectionResetError at its end."""
        assert self.channel is not None
        frame = bytearray()
        while len(frame) < 4 or len(frame) < calls.frame_length(frame):
            wanted = 4 if len(frame) < 4 else calls.frame_length(frame)
            part = self.channel.recv(wanted - len(frame))
            if not part:
                raise ConnectionResetError("the daemon has closed the channel")
            frame += part
        return calls.unpack_answer(frame)

    def at_end(self) -> bool:
        """Whether the daemon has closed its end; waits for it."""
        return self.socket.recv(1) == b""

    def close(self) -> None:
        """Closes the socket and the descriptors that came over it."""
        self.socket.close()
        if self.channel is not None:
            self.channel.close()
        for fd in self.descriptors:
            os.close(fd)
        self.descriptors = []


class RawSession:
    """A session by hand: over the Unix socket with a lifeline, or over TCP when ``path`` is None."""

    def __init__(self, target: str, path: str | None = None, *, hello: pb.Hello | bytes | None = None) -> None:
        self.lifeline = None if path is None else RawLifeline(lifeline.socket_path(path))
        ticket = b"" if self.lifeline is None else self.lifeline.hello().ticket
        self.channel = grpc.insecure_channel(target)
        self._notes: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        if hello is None:
            hello = pb.Hello(protocol_min=1, protocol_max=1, client_name="raw", client_version="1", ticket=ticket)
        first = hello if isinstance(hello, bytes) else pb.ClientNote(hello=hello).SerializeToString()
        self._notes.put(first)
        self.stream: Any = self.channel.stream_stream("/kvd.v1.Kvd/Session")(self._outgoing(), timeout=60)
        try:
            self.raw_welcome: bytes = next(self.stream)
        except BaseException:
            self.close()
            raise
        self.welcome = pb.ServerNote.FromString(self.raw_welcome).welcome

    def _outgoing(self) -> Iterator[bytes]:
        while (note := self._notes.get()) is not None:
            yield note

    def beat(self) -> None:
        """Sends a heartbeat."""
        self._notes.put(pb.ClientNote(heartbeat=pb.Heartbeat(sequence=1)).SerializeToString())

    def send_raw(self, note: bytes) -> None:
        """Sends a note in bytes."""
        self._notes.put(note)

    def next_note(self) -> pb.ServerNote:
        """Waits for the daemon's next note; grpc.RpcError when the stream has ended."""
        return pb.ServerNote.FromString(next(self.stream))

    def raw_call(self, method: str, request: bytes, token: bytes | None = None) -> bytes:
        """One unary call, in bytes."""
        metadata = (("kvd-session-bin", self.welcome.session_token if token is None else token),)
        call = self.channel.unary_unary(f"/kvd.v1.{method}")
        answer: bytes = call(request, timeout=TIMEOUT_S, metadata=metadata)
        return answer

    def call(self, method: str, request: Any, token: bytes | None = None) -> Any:
        """One unary call of the Kvd service; the answer is of the request's Response type."""
        answer = getattr(pb, type(request).__name__.removesuffix("Request") + "Response")
        return answer.FromString(self.raw_call(f"Kvd/{method}", request.SerializeToString(), token))

    def open_namespace(self, model: str = "m", chunk_bytes: int = 4096) -> bytes:
        """The id of a namespace with one layer and one head."""
        identity = pb.Identity(
            format_version=1,
            model=model,
            weights_revision="r",
            num_layers=1,
            num_kv_heads=1,
            block_tokens=1,
            chunk_blocks=1,
        )
        found = self.call("OpenNamespace", pb.OpenNamespaceRequest(identity=identity, chunk_bytes=chunk_bytes))
        assert found.namespace_id == Identity(model=model, weights_revision="r").namespace_id("default")
        return bytes(found.namespace_id)

    def reserve(self, namespace: bytes, keys: list[bytes], lease_id: int = 1) -> list[Location | None]:
        """Reserves a prefix from the root; the slots of what was granted."""
        items = [pb.ReserveItem(key=key, parent=parent) for key, parent in zip(keys, [b"", *keys], strict=False)]
        request = pb.ReserveRequest(namespace_id=namespace, lease_id=lease_id, items=items)
        answer = self.call("Reserve", request)
        slots = slots_of(answer)
        return [slots.pop(0) if status == pb.RESERVE_STATUS_GRANTED else None for status in answer.statuses]

    def commit(self, namespace: bytes, keys: list[bytes], lease_id: int = 1) -> list[int]:
        """Commits whole chunks; the statuses."""
        items = [pb.CommitItem(key=key) for key in keys]
        request = pb.CommitRequest(namespace_id=namespace, lease_id=lease_id, items=items)
        return [result.status for result in self.call("Commit", request).results]

    def lookup(self, namespace: bytes, keys: list[bytes], lease_id: int = 2) -> pb.LookupResponse:
        """Looks a prefix up."""
        answer: pb.LookupResponse = self.call(
            "Lookup", pb.LookupRequest(namespace_id=namespace, lease_id=lease_id, keys=keys)
        )
        return answer

    def end_stream(self) -> None:
        """Ends the session, not the lifeline."""
        self._notes.put(None)
        self.stream.cancel()

    def close(self) -> None:
        """Ends everything."""
        self.end_stream()
        self.channel.close()
        if self.lifeline is not None:
            self.lifeline.close()

    def __enter__(self) -> RawSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
