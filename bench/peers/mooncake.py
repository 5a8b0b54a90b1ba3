"""Mooncake Store as a peer: a master and one process that owns the memory; clients contribute none.

``local``: clients share memory with that process (``setup_dummy``). ``tcp``: each client is a transfer engine of its
own and reaches the memory over TCP. Both copy between the store and buffers that were registered before.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

from kvd_client.bench.processes import Process, free_port, listens, python_of

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "mooncake-transfer-engine-non-cuda"


class PeerServer:
    """``mooncake_master`` with its HTTP metadata server, and ``mooncake_client``, both of the pip package."""

    most_clients = 16
    client = str(ROOT / "bench" / "clients" / "mooncake_client.py")

    def __init__(self, pool_bytes: int, directory: str) -> None:
        self.python = python_of(ROOT, "mooncake")
        binaries = Path(self.python).parent
        rpc, http, metrics, port = (free_port() for _ in range(4))
        metadata, master = f"http://127.0.0.1:{http}/metadata", f"127.0.0.1:{rpc}"
        master_command = [str(binaries / "mooncake_master"), f"--rpc_port={rpc}", f"--metrics_port={metrics}"]
        master_command += ["--enable_http_metadata_server=true", "--http_metadata_server_host=127.0.0.1"]
        master_command += [f"--http_metadata_server_port={http}"]
        owner_command = [str(binaries / "mooncake_client"), "--host=127.0.0.1", f"--port={port}", "--protocol=tcp"]
        owner_command += [f"--global_segment_size={pool_bytes}", f"--master_server_address={master}"]
        owner_command += [f"--metadata_server={metadata}", f"--threads={min(8, os.cpu_count() or 1)}"]
        environment = {"MC_LOG_LEVEL": "ERROR", "GLOG_minloglevel": "2"}
        self._processes: list[Process] = []
        try:
            for command, own in ((master_command, rpc), (owner_command, port)):
                self._processes.append(Process(command, directory, environment))
                self._processes[-1].wait(lambda own=own: listens(own))  # type: ignore[misc]
            self._processes[0].wait(lambda: listens(http))
        except BaseException:
            self.close()
            raise
        shown = [" ".join([Path(command[0]).name, *command[1:]]) for command in (master_command, owner_command)]
        found = subprocess.run(
            [self.python, "-c", f"from importlib.metadata import version; print(version({PACKAGE!r}))"],
            capture_output=True,
            text=True,
            check=True,
        )
        self.about = f"{PACKAGE} {found.stdout.strip()}: {'; '.join(shown)}"
        reach = {"master": master, "metadata": metadata, "owner": f"127.0.0.1:{port}"}
        self.variants: dict[str, dict[str, Any]] = {way: {"way": way, **reach} for way in ("local", "tcp")}
        self.pids = [process.pid for process in self._processes]

    def loop_lag(self) -> list[tuple[float, float]]:
        """Not known."""
        return []

    def close(self) -> None:
        """Ends both."""
        for process in reversed(self._processes):
            process.close()
