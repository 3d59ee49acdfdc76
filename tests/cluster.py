"""A Ray cluster of two nodes with one CPU each on loopback, with token authentication. Nodes can be killed."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil

_STORE_BYTES = 100 * 2**20
# The head keeps its ports over its lives, so that who knows its address finds it again.
_CLUSTER = f"""
import sys
from ray._private.utils import write_ray_address
from ray.cluster_utils import Cluster
temp_dir, gcs_port, dashboard_port = sys.argv[1], *map(int, sys.argv[2:])
node = {{"num_cpus": 1, "object_store_memory": {_STORE_BYTES}, "node_ip_address": "127.0.0.1", "temp_dir": temp_dir}}
head = node | {{"gcs_server_port": gcs_port, "dashboard_port": dashboard_port, "include_dashboard": dashboard_port > 0}}
cluster = Cluster(initialize_head=True, head_node_args=head)
write_ray_address(cluster.address, temp_dir)  # as `ray start` does: from it a submitted job has its RAY_ADDRESS
print(cluster.address, flush=True)
for line in sys.stdin:
    if line == "restart the head\\n":
        cluster.remove_node(cluster.head_node, allow_graceful=False)
    added = cluster.add_node(**(head if cluster.head_node is None else node))
    print(added.all_processes["raylet"][0].process.pid, flush=True)
"""


class Cluster:
    """Somebody else's Ray; ``environment`` is what a command on it needs, ``address`` what it is called."""

    def __init__(self, cwd: Path, *, dashboard: bool = False) -> None:
        token = cwd / "ray-token"
        token.write_text(secrets.token_hex(32), encoding="utf-8")
        self.environment = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        }
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith("RAY_")
        } | self.environment
        environment |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_health_check_failure_threshold": "2"}
        ports = [_free_port(), _free_port() if dashboard else 0]
        self._temporary = tempfile.TemporaryDirectory(prefix="ray-")  # the path of a socket in it must be short
        self.dashboard = f"http://127.0.0.1:{ports[1]}" if dashboard else None
        with (cwd / "cluster.err").open("wb") as err:
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": err, "text": True}
            command = [sys.executable, "-c", _CLUSTER, self._temporary.name, *map(str, ports)]
            self.process = subprocess.Popen(command, env=environment, cwd=cwd, **pipes)
        self.address = self._line()
        self._second: psutil.Process | None = None
        self.complete()

    def processes(self, title: str) -> list[psutil.Process]:
        """Living processes whose command line holds the title."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if title in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def nodes_at_work(self) -> set[int]:
        """The nodes on which an MTEB task's worker lives, each by the process of its raylet."""
        found = set()
        for worker in self.processes("ray::Worker"):
            with contextlib.suppress(psutil.Error):
                found.add(worker.ppid())
        return found

    def complete(self) -> None:
        """Have two nodes."""
        if self._second is None:
            self._second = psutil.Process(int(self._say("add a node")))

    def kill_node(self) -> None:
        """``kill -9`` of the second node's raylet and of its workers."""
        assert self._second is not None
        for process in (self._second, *self._second.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._second = None

    def restart_head(self) -> None:
        """Kill all processes of the head's node, and start a new head at the same address. The second node is lost."""
        self._say("restart the head")
        self._second = None

    def stop(self) -> None:
        """End all of it."""
        family = [*psutil.Process(self.process.pid).children(recursive=True), psutil.Process(self.process.pid)]
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()
        self._temporary.cleanup()

    def _say(self, line: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        return self._line()

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
