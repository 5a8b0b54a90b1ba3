"""The composition root: the only place that chooses implementations, and the order of start and stop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterator

import uvloop

from kvd import preflight
from kvd.authority import LoopAuthority
from kvd.calls import CallServer
from kvd.config import Loaded
from kvd.control import ControlServer, bind, remove_stale_socket
from kvd.desk import Desk
from kvd.http import HttpServer, Page
from kvd.lifeline import LifelineServer
from kvd.lock import AlreadyLocked, PathLock
from kvd.memory.segment import Segment
from kvd.metrics import Metrics
from kvd.peers import Access
from kvd.recorder import Recorder
from kvd.report import Report
from kvd.service import SERVICES, ControlService, Facts
from kvd.session import Sessions
from kvd.storage import Storage
from kvd.transport.tcp import DataPlane
from kvd.types import SessionId
from kvd.upkeep import Upkeep
from kvd.values import POOL_AUTO, HostPort, Populate, human_size
from kvd.wire.lifeline import socket_path
from kvd.wire.version import VERSION
from kvd.workers import ready_executor

log = logging.getLogger(__name__)

#: How long a stop waits for calls that are being answered, after the drain.
STOP_GRACE_S = 1.0
_DRAIN_POLL_S = 0.05
_MAX_FILES = 65536


def serve(loaded: Loaded) -> int:
    """Runs a daemon until it is told to stop; its exit code. Raises ``BadSetting`` when it cannot start."""
    preflight.check(loaded)
    if loaded.settings.allow_remote:
        log.warning("allow_remote: peers from other machines are let in without authentication")
    _make_default_directory(loaded)
    pool_directory, note = preflight.pool_directory(loaded.settings)
    if note:
        log.log(logging.WARNING if loaded.settings.pool_dir == POOL_AUTO else logging.INFO, "%s", note)
    with _locks(loaded, pool_directory), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.get_loop().set_default_executor(ready_executor())
        runner.run(Daemon(loaded, pool_directory).run())
    return 0


class Daemon:
    """One daemon, from start to stop, on the running event loop."""

    def __init__(self, loaded: Loaded, pool_directory: str | None) -> None:
        """``pool_directory``: where the pool's files lie; None = it has none."""
        self._loaded = loaded
        self._pool_directory = pool_directory
        self._settings = loaded.settings
        self._ready = False
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._interrupted = False

    async def run(self) -> None:
        """Starts, serves until SIGTERM or SIGINT, drains and stops; a second signal cuts the drain short."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled, number)
        _raise_file_limit()
        async with contextlib.AsyncExitStack() as stack:
            await self._start(stack)
            await self._stop.wait()
            self._ready = False
            await self._drain()
        log.info("stopped")

    # -- start

    async def _start(self, stack: contextlib.AsyncExitStack) -> None:
        """Brings everything up; ``stack`` takes it down again in the opposite order."""
        settings, loop = self._settings, asyncio.get_running_loop()
        daemon_id = secrets.randbits(64) | 1
        storage = Storage(self._loaded, daemon_id, self._pool_directory)
        segment, limits = storage.pool.segment, storage.limits
        for note in segment.notes():
            log.warning("pool: %s", note)
        self._store = store = storage.store
        stack.push_async_callback(self._put_away, storage)
        stack.callback(segment.stop_populating)
        self._sessions = sessions = Sessions(store, on_end=lambda session: end_connections(session))
        access = Access(settings.group, allow_remote=settings.allow_remote)
        metrics = Metrics()

        http = HttpServer({"/metrics": self._metrics_page(metrics), "/healthz": _healthy, "/readyz": self._readiness})
        with self._naming("http"):
            listener = bind(*settings.http)
        http_address = HostPort(settings.http.host, listener.getsockname()[1])
        await http.start(listener)
        stack.push_async_callback(http.close)

        recorder = self._make_recorder()
        if recorder is not None:
            recorder.start()
            stack.push_async_callback(asyncio.to_thread, recorder.close)
        desk = Desk(store, sessions, metrics, recorder)
        calls = CallServer(desk, sessions, limits.max_chunks_per_request)

        authority = LoopAuthority(loop, sessions, store)
        data = DataPlane(*settings.data, [segment.data], authority, observer=metrics.moved, calls=calls.adopt)
        with self._naming("data"):
            data.start()
        # Its threads ask the loop: it is closed from a thread.
        stack.push_async_callback(asyncio.to_thread, data.close)

        def end_connections(session: SessionId) -> None:
            data.close_session(session)
            calls.close_session(session)

        self._control = control = ControlServer()
        lifelines = LifelineServer(
            socket_path(settings.socket),
            sessions=sessions,
            access=access,
            segments=[segment],
            daemon_id=daemon_id,
            calls=calls,
            holders=storage.pool.holders,
            presence=storage.presence,
        )
        with self._naming("listen"):
            listen_address = HostPort(settings.listen.host, control.listen_tcp(*settings.listen))
        with self._naming("socket"):
            self._listen_unix(control, lifelines, access.gid)
        stack.callback(lifelines.close)
        stack.callback(_unlink, settings.socket)
        stack.push_async_callback(control.stop, STOP_GRACE_S)

        addresses = [
            f"unix:{settings.socket}",
            f"tcp://{listen_address}",
            f"data://{HostPort(settings.data.host, data.port)}",
            f"http://{http_address}",
        ]
        report = Report(
            store,
            sessions,
            segment,
            daemon_id,
            addresses,
            recovery=storage.recovery,
            nodes=storage.nodes,
            drives=storage.drives if storage.has_disks else None,
            daily_bytes=settings.spill_write_daily_bytes,
            written_today_bytes=storage.written_today_bytes,
            trace=dict if recorder is None else recorder.totals,
        )
        metrics.watch(report.figures, VERSION)
        facts = Facts(
            daemon_id=daemon_id,
            listen_port=listen_address.port,
            data_port=data.port,
            read_lease_s=limits.read_lease_s,
            max_chunks_per_request=limits.max_chunks_per_request,
            stats=report.stats,
            remembered=storage.remembered,
        )
        service = ControlService(store, sessions, access, metrics, facts, desk)
        upkeep = Upkeep(store, sessions, metrics, last_request=lambda: desk.last_request_at)
        await storage.start(metrics.promoted)
        await self._populate(segment)
        if self._stop.is_set():
            return
        await control.start(SERVICES, service.handlers())
        stack.push_async_callback(upkeep.stop)
        upkeep.start()
        self._ready = True
        pool = f"pool {human_size(segment.size)} ({segment.describe()})"
        print(f"kvd {VERSION} serving: {' '.join(addresses)} {pool}", flush=True)

    def _make_recorder(self) -> Recorder | None:
        path = self._settings.record_trace
        if path is None:
            return None
        try:
            return Recorder(path)
        except OSError as error:
            raise self._loaded.reject("record_trace", f"cannot be written: {error.strerror}") from error

    async def _populate(self, segment: Segment) -> None:
        if self._settings.populate is Populate.BACKGROUND:
            segment.populate_in_background()
        elif self._settings.populate is Populate.START:
            log.info("taking %s of memory", human_size(segment.size))
            population = asyncio.create_task(asyncio.to_thread(segment.populate, _progress(segment.size)))
            stop = asyncio.create_task(self._stop.wait())
            await asyncio.wait((population, stop), return_when=asyncio.FIRST_COMPLETED)
            stop.cancel()
            if self._stop.is_set():
                segment.stop_populating()
            await population

    def _listen_unix(self, control: ControlServer, lifelines: LifelineServer, gid: int | None) -> None:
        """Makes the two sockets, for this user alone or for the group as well."""
        paths = (self._settings.socket, lifelines.path)
        for path in paths:
            remove_stale_socket(path)
        mask = os.umask(0o177)
        try:
            control.listen_unix(self._settings.socket)
            lifelines.start()
        finally:
            os.umask(mask)
        if gid is not None:
            for path in paths:
                os.chown(path, -1, gid)
                os.chmod(path, 0o660)

    @contextlib.contextmanager
    def _naming(self, key: str) -> Iterator[None]:
        """Turns a failure to listen into one that names the setting."""
        try:
            yield
        except (OSError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise self._loaded.reject(key, f"cannot be listened on: {reason}; free it, or give another") from error

    # -- pages

    def _metrics_page(self, metrics: Metrics) -> Callable[[str], Page]:
        def page(accept: str) -> Page:
            body, content_type = metrics.render(accept)
            return Page(200, body, content_type)

        return page

    def _readiness(self, accept: str) -> Page:
        if self._ready:
            return Page(200, b"serving\n")
        return Page(503, b"stopping\n" if self._stop.is_set() else b"starting\n")

    # -- stop

    async def _put_away(self, storage: Storage) -> None:
        """The pool stays for the next daemon, unless a person at a terminal has finished and never named a place."""
        forget = self._interrupted and self._settings.pool_dir == POOL_AUTO
        self._store.settle()
        await storage.stop(0 if self._hurry.is_set() else self._settings.drain_timeout_s, forget=forget)

    def _signalled(self, number: int) -> None:
        self._interrupted = number == signal.SIGINT
        if self._stop.is_set():
            self._hurry.set()
        self._stop.set()

    async def _drain(self) -> None:
        """Grants nothing new, tells everybody, and waits until what is under way is done, or too late."""
        timeout_s = self._settings.drain_timeout_s
        self._sessions.drain(timeout_s)
        with contextlib.suppress(TimeoutError):
            await self._control.stop_serving()
        deadline = time.monotonic() + timeout_s
        while self._busy() and time.monotonic() < deadline and not self._hurry.is_set():
            await asyncio.sleep(_DRAIN_POLL_S)
        for session in self._sessions.all():
            self._sessions.end(session)

    def _busy(self) -> bool:
        writing = any(session.write_leases for session in self._store.stats().sessions.values())
        return writing or any(session.io_in_flight for session in self._sessions.all())


def _healthy(accept: str) -> Page:
    return Page(200, b"ok\n")


@contextlib.contextmanager
def _locks(loaded: Loaded, pool_directory: str | None) -> Iterator[None]:
    """Holds the socket and the pool directory against other daemons. Raises ``BadSetting``."""
    settings = loaded.settings
    held: list[PathLock] = []
    try:
        held.append(_lock(loaded, "socket", settings.socket + ".lock"))
        if pool_directory is not None:
            if settings.pool_dir == POOL_AUTO:
                _make_pool_directory(loaded, pool_directory)
            held.append(_lock(loaded, "pool_dir", os.path.join(pool_directory, ".kvd.lock")))
        yield
    finally:
        for lock in held:
            lock.release()


def _lock(loaded: Loaded, key: str, path: str) -> PathLock:
    try:
        return PathLock(path)
    except AlreadyLocked as error:
        holder = f"process {error.holder}" if error.holder else "another process"
        raise loaded.reject(key, f"a daemon serves there already ({holder}); stop it first, or give another") from error
    except OSError as error:
        raise loaded.reject(key, f"{path} cannot be made: {error.strerror}") from error


def _make_pool_directory(loaded: Loaded, directory: str) -> None:
    try:
        preflight.make_private(directory)
    except OSError as error:
        raise loaded.reject("pool_dir", f"{directory} cannot be made: {error.strerror}") from error


def _make_default_directory(loaded: Loaded) -> None:
    """Makes the directory of a socket that nobody named; one that others could have made is not trusted."""
    directory = os.path.dirname(loaded.settings.socket)
    try:
        if loaded.sources["socket"] == "default":
            os.makedirs(directory, mode=0o755 if loaded.settings.group else 0o700, exist_ok=True)
        found = os.lstat(directory)
    except OSError as error:
        raise loaded.reject("socket", f"{directory} cannot be made: {error.strerror}") from error
    if directory.startswith("/tmp/kvd-") and found.st_uid not in (os.getuid(), 0):
        raise loaded.reject(
            "socket", f"{directory} belongs to user {found.st_uid}; give --socket in a directory of yours"
        )


def _raise_file_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, _MAX_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _progress(total: int) -> Callable[[int], None] | None:
    """A line on the terminal that says how far the pool is, if there is a terminal."""
    if not sys.stderr.isatty():
        return None

    def show(done: int) -> None:
        end = "\n" if done >= total else ""
        print(f"\rtaking memory: {human_size(done)} of {human_size(total)}", end=end, file=sys.stderr, flush=True)

    return show


def _unlink(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
