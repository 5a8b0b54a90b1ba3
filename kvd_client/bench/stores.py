"""The stores that the load generator loads: kvd, and peers from the ``bench`` directory of a checkout."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any, Protocol, cast

from kvd.wire.version import VERSION
from kvd_client.bench.daemon import BenchDaemon

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
PEERS = ROOT / "bench" / "peers"


class Server(Protocol):
    """A store that runs. Made with (pool_bytes, directory): memory that it may fill, and a directory of its own for
    files, removed by the caller. Its making raises OSError or RuntimeError when it cannot run here."""

    #: Ways to reach it, by name, and what its client's ``open_store`` is told.
    variants: dict[str, dict[str, Any]]
    #: Its processes; none for a store that has none.
    pids: list[int]
    #: Release, commands and settings, for the record.
    about: str
    #: Most clients that this machine's memory bears.
    most_clients: int
    #: The Python that its clients run in.
    python: str
    #: The file with its ``open_store``.
    client: str

    def loop_lag(self) -> list[tuple[float, float]]:
        """See ``BenchDaemon.loop_lag``; [] where nothing is known."""
        ...

    def close(self) -> None:
        """Ends it."""
        ...


class KvdServer:
    """The daemon, over its Unix socket with shared memory and over TCP; see ``Server``."""

    most_clients = 1 << 10
    python = sys.executable
    client = str(HERE / "kvd_store.py")

    def __init__(self, pool_bytes: int, directory: str) -> None:
        self._daemon = BenchDaemon(pool_bytes)
        endpoints = {"unix": self._daemon.unix_endpoint, "tcp": self._daemon.tcp_endpoint}
        self.variants: dict[str, dict[str, Any]] = {name: {"endpoint": where} for name, where in endpoints.items()}
        self.pids = [self._daemon.pid]
        self.about = f"kvd {VERSION}: kvd serve {self._daemon.settings}"

    def loop_lag(self) -> list[tuple[float, float]]:
        """See ``Server``."""
        return self._daemon.loop_lag()

    def close(self) -> None:
        """Ends it."""
        self._daemon.close()


def start(name: str, pool_bytes: int, directory: str) -> Server:
    """Starts ``kvd``, or the peer of that name. Raises OSError or RuntimeError, its text saying what is missing."""
    if name == "kvd":
        return KvdServer(pool_bytes, directory)
    path = PEERS / f"{name}.py"
    if name not in peers():
        raise RuntimeError(f"there is no peer {name!r}; there are: {', '.join(peers()) or 'none, without a checkout'}")
    spec = importlib.util.spec_from_file_location(f"kvd_bench_peer_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return cast(Server, module.PeerServer(pool_bytes, directory))


def peers() -> list[str]:
    """Names of the peers that can be asked for."""
    return sorted(path.stem for path in PEERS.glob("[a-z]*.py"))
