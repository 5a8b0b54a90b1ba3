"""A daemon that serves starts no thread on its event loop: the loop would wait until the new thread runs."""

from __future__ import annotations

from pathlib import Path

from kvd_client import StoreOutcome
from tests.contract.clients import WAYS, buffers, chained, client_of, namespace_of, payloads, prefix
from tests.daemon import ROOT, Daemon

#: Python runs this before anything else. A daemon's loop is in its main thread.
WATCHER = """
import sys, threading, traceback

start = threading.Thread.start

def watched(self):
    if threading.get_ident() == threading.main_thread().ident:
        print("thread started on the loop:", *traceback.format_stack(), file=sys.stderr, flush=True)
    start(self)

threading.Thread.start = watched
"""


def test_no_thread_is_started_on_the_loop_once_the_daemon_serves(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(WATCHER)
    with Daemon(spill="64MiB", env={"PYTHONPATH": f"{tmp_path}:{ROOT}"}) as daemon:
        at_start = daemon.log
        assert "thread started on the loop" in at_start, "nobody watches"
        for way in WAYS:
            with client_of(daemon, way) as client:
                namespace, keys = namespace_of(client), prefix(3)
                assert client.store(namespace, chained(keys), payloads(3)) == [StoreOutcome.STORED] * 3
                assert client.load(namespace, keys, buffers(3)) == 3
        daemon.stats()
        daemon.metrics()
        assert "thread started" not in daemon.log.removeprefix(at_start)
