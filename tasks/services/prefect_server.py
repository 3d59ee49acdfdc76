"""Embedded Prefect server on loopback, started and stopped with the run that needs it.

``python -m tasks.services.prefect_server PORT [FD]`` is that server. FD is a socket of the parent process, bound to the
port. The server ends with its parent, even if the parent is killed.
"""

from __future__ import annotations

import atexit
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pipeline.errors import InputError, LorafleetError
from pipeline.machine import check_room
from tasks.checks.servers import refuses_login
from tasks.children import die_with_parent, last_fault
from tasks.services.loopback import ask, prepare_http
from tasks.services.passwords import CLIENT, given_login, login_for, new_login, private_folder, server_settings
from tasks.services.temporary import temporary_folder

_START_SECONDS = 120.0
_QUIET = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_LOGGING_LEVEL": "WARNING",
    "PREFECT_LOGGING_INTERNAL_LEVEL": "CRITICAL",  # at ERROR it prints every event that an unreachable server misses
    "PREFECT_LOGGING_LOGGERS_PREFECT_FLOW_RUNS_LEVEL": "INFO",
    "PREFECT_LOGGING_LOGGERS_PREFECT_TASK_RUNS_LEVEL": "INFO",
    "PREFECT_LOGGING_FORMATTERS_STANDARD_FLOW_RUN_FMT": "%(asctime)s | %(message)s",
    "PREFECT_LOGGING_FORMATTERS_STANDARD_TASK_RUN_FMT": "%(asctime)s | %(message)s",
    "PREFECT_CLIENT_SERVER_VERSION_CHECK_ENABLED": "false",
    "RAY_USAGE_STATS_ENABLED": "0",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "true",
}


class PrefectServer:
    """Prefect server for one run. Does nothing if the user has configured a server."""

    def __init__(self, home: Path) -> None:
        """Set the environment variables of Prefect, which reads them when it is imported.

        Args:
            home: Folder of the SQLite database and the log.
        Raises:
            InputError: the environment names proxies or certificates that cannot be used.
            LorafleetError: the disk of ``home`` or of temporary files is full.
        """
        for name, value in _QUIET.items():
            os.environ.setdefault(name, value)
        if sys.stderr.isatty():  # the live table replaces the log lines
            os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "WARNING")
        prepare_http()
        self._socket: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        # Registered before Prefect is imported, so that it runs after Prefect has sent its last logs at exit.
        atexit.register(self.stop)
        if url := os.environ.get("PREFECT_API_URL"):
            if login := login_for(url):
                os.environ[CLIENT] = login
            return
        check_room(home, what="choose another disk")
        temporary_folder()
        private_folder(home)
        self._socket = socket.socket()  # kept open for the server: a free port may be taken by Ray in a second
        self._socket.bind(("127.0.0.1", 0))
        self._login = given_login() or new_login()  # every web page and every local user can reach loopback
        os.environ["PREFECT_HOME"] = str(home.resolve())
        os.environ["PREFECT_API_URL"] = f"http://127.0.0.1:{self._socket.getsockname()[1]}/api"
        os.environ[CLIENT] = self._login
        self._log = home / "server.log"

    def start(self) -> None:
        """Start the server process. Must be called from the main thread, because it ends with its parent thread."""
        if self._socket is None:
            return
        ours = server_settings(os.environ["PREFECT_API_URL"].removesuffix("/api"), self._login)
        with self._socket as bound, self._log.open("wb") as log:
            # -P: ignore a tasks.py in the working folder
            command = [
                sys.executable,
                "-P",
                "-m",
                "tasks.services.prefect_server",
                str(bound.getsockname()[1]),
                str(bound.fileno()),
            ]
            streams: dict[str, Any] = {"stdout": log, "stderr": log, "stdin": subprocess.DEVNULL}
            self._process = subprocess.Popen(
                command, **streams, env=os.environ | ours, start_new_session=True, pass_fds=[bound.fileno()]
            )

    def ready(self) -> None:
        """Wait until the server answers.

        Raises:
            InputError: a configured server refuses the password.
            LorafleetError: the embedded server ended, or did not answer within two minutes.
        """
        if self._process is None:
            if refuses_login(os.environ["PREFECT_API_URL"]):
                raise InputError(
                    "the Prefect server of PREFECT_API_URL requires a password; "
                    "set PREFECT_API_AUTH_STRING=NAME:PASSWORD"
                )
            return
        deadline = time.monotonic() + _START_SECONDS
        while self._process.poll() is None and time.monotonic() < deadline:
            try:
                ask(f"{os.environ['PREFECT_API_URL']}/health")
                return
            except OSError:
                time.sleep(0.1)
        ended = self._process.poll() is not None
        why = last_fault(self._log) or (
            f"exit code {self._process.returncode}" if ended else f"no answer in {_START_SECONDS:.0f} s"
        )
        retry = "" if ended else "run the command again when the machine is less busy, "
        raise LorafleetError(
            f"the embedded Prefect server did not start: {why}; see {self._log}, "
            f"{retry}or set PREFECT_API_URL to a running one"
        )

    def stop(self) -> None:
        """Stop the embedded server. A server that the user has configured keeps running."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None
        for name in ("PREFECT_API_URL", CLIENT):
            os.environ.pop(name, None)


def _serve(port: int, *descriptors: int) -> None:
    die_with_parent(signal.SIGKILL)
    import uvicorn

    app = "prefect.server.api.server:create_app"
    config = uvicorn.Config(app, factory=True, host="127.0.0.1", port=port, log_level="error", lifespan="on")
    uvicorn.Server(config).run(sockets=[socket.socket(fileno=descriptor) for descriptor in descriptors] or None)


if __name__ == "__main__":
    _serve(*map(int, sys.argv[1:]))
