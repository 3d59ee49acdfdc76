"""What a run needs on a machine where nothing runs yet: a Prefect server on loopback, started and stopped with it.

``python -m tasks.embedded PORT [FD]`` is that server, FD a socket of its parent's that is bound to the port. It dies with the process that
started it, killed or not.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from pipeline.errors import LorafleetError
from tasks.loopback import unproxied

_START_SECONDS = 120.0
_QUIET = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_LOGGING_LEVEL": "WARNING",
    "PREFECT_LOGGING_INTERNAL_LEVEL": "CRITICAL",  # at ERROR it prints each event that a server which is away does not take
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
    """A Prefect server for one run, if no other is configured."""

    def __init__(self, home: Path) -> None:
        """Set the environment for it, with its SQLite database under ``home``; Prefect reads that when it is imported."""
        for name, value in _QUIET.items():
            os.environ.setdefault(name, value)
        if sys.stderr.isatty():  # there a live table shows what the lines would say
            os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "WARNING")
        self._socket: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        # Registered before Prefect is imported, so run after it: Prefect sends its last logs when the interpreter ends.
        atexit.register(self.stop)
        if os.environ.get("PREFECT_API_URL"):
            return
        home.mkdir(parents=True, exist_ok=True)
        self._socket = socket.socket()  # held until the server has it: what is free now may be Ray's in a second
        self._socket.bind(("127.0.0.1", 0))
        os.environ["PREFECT_HOME"] = str(home.resolve())
        os.environ["PREFECT_API_URL"] = f"http://127.0.0.1:{self._socket.getsockname()[1]}/api"
        os.environ.update(unproxied())
        self._log = home / "server.log"

    def start(self) -> None:
        """Begin to start it; must be called from the main thread."""
        if self._socket is None:
            return
        with self._socket as bound, self._log.open("wb") as log:
            # -P: the working folder may hold a tasks.py of its own
            command = [sys.executable, "-P", "-m", "tasks.embedded", str(bound.getsockname()[1]), str(bound.fileno())]
            streams: dict[str, Any] = {"stdout": log, "stderr": log, "stdin": subprocess.DEVNULL}
            self._process = subprocess.Popen(command, **streams, start_new_session=True, pass_fds=[bound.fileno()])

    def ready(self) -> None:
        """Wait until the server answers.

        Raises: LorafleetError: it ended, or did not answer in two minutes.
        """
        if self._process is None:
            return
        deadline = time.monotonic() + _START_SECONDS
        while self._process.poll() is None and time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"{os.environ['PREFECT_API_URL']}/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        raise LorafleetError(f"the embedded Prefect server did not start; see {self._log}, or set PREFECT_API_URL to a running one")

    def stop(self) -> None:
        """Stop the server; one that the user configured is left alone."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None
        os.environ.pop("PREFECT_API_URL", None)


def _die_with_parent() -> None:
    if sys.platform == "linux":
        set_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)


def _serve(port: int, *descriptors: int) -> None:
    _die_with_parent()
    import uvicorn

    app = "prefect.server.api.server:create_app"
    config = uvicorn.Config(app, factory=True, host="127.0.0.1", port=port, log_level="error", lifespan="on")
    uvicorn.Server(config).run(sockets=[socket.socket(fileno=descriptor) for descriptor in descriptors] or None)


if __name__ == "__main__":
    _serve(*map(int, sys.argv[1:]))
