"""``lorafleet up``: Prefect's server and worker, Ray and the reports on loopback, kept running by supervisor."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from pipeline.errors import InputError
from pipeline.machine import check_room, local_cpus
from pipeline.store.lock import hold
from tasks.network import check_listening
from tasks.services.loopback import ask, prepare_http
from tasks.services.passwords import given_login, kept_secret, new_login, private_folder, server_settings
from tasks.services.programs import Programs
from tasks.services.temporary import ray_folder, temporary_folder

CONFIG = Path(__file__).parents[2] / "deploy" / "supervisord.conf"
_WORKER = "lorafleet-up"
_PASSWORD, _RAY_TOKEN = "prefect-password", "ray-token"


@dataclass(frozen=True)
class Addresses:
    """Addresses on loopback, with four consecutive ports: Prefect, reports, Ray, Ray's client server."""

    port: int
    with_ray: bool

    @property
    def ui(self) -> str:
        """Address of the Prefect UI."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def api(self) -> str:
        """Value of ``PREFECT_API_URL``."""
        return f"{self.ui}/api"

    @property
    def reports(self) -> str:
        """Address of the run store's reports."""
        return f"http://127.0.0.1:{self.port + 1}"

    @property
    def ray(self) -> str:
        """Value of ``RAY_ADDRESS``."""
        return f"127.0.0.1:{self.port + 2}"


def up(runs: Path, *, port: int, with_ray: bool, say: Callable[[str], None]) -> None:
    """Start all programs, print their addresses, and keep them running until SIGINT, SIGTERM or SIGHUP.

    Args:
        runs: Run store. Its folder ``.up`` has the logs, and the state that is kept between starts.
        port: Port of the Prefect server. The reports use the next port, and Ray the two after it.
        with_ray: Whether to start Ray. Otherwise each run starts its own Ray, or joins that of ``RAY_ADDRESS``.
        say: Prints a line.
    Raises:
        InputError: a port is taken, the run store cannot be written or has a running `up`, or the environment is wrong.
        LorafleetError: a program does not start, supervisor itself has ended, or a disk is full.
    """
    prepare_http()
    check_room(runs, what="choose another disk with --runs")
    temporary_folder()
    addresses, stop = Addresses(port, with_ray), threading.Event()
    state, refusal = (runs / ".up").resolve(), "`lorafleet up` is already running ({}); stop it"
    lock = hold(state / "lock", runs, holder=f"process {os.getpid()}", refusal=refusal)
    with lock, ray_folder() if with_ray else nullcontext() as folder_of_ray, _stop_on_signals(stop):
        _check_ports(addresses)
        private_folder(state)
        login = given_login() or kept_secret(state / _PASSWORD, new_login())
        programs = Programs(CONFIG, state, _environment(runs, state, addresses, login, folder_of_ray))
        try:
            if programs.wait_until(lambda: _all_answer(addresses, login, programs.started), stop):
                for line in _welcome(addresses, state, login):
                    say(line)
                programs.watch(stop)
        finally:
            programs.stop()
    say("stopped")


@contextmanager
def _stop_on_signals(stop: threading.Event) -> Iterator[None]:
    """While open, have SIGINT, SIGTERM and SIGHUP set an event instead of ending the process."""
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    previous = [signal.signal(number, lambda *_: stop.set()) for number in signals]
    try:
        yield
    finally:
        for number, handler in zip(signals, previous, strict=True):
            signal.signal(number, handler)


def _check_ports(addresses: Addresses) -> None:
    uses = ["the Prefect server", "the reports", "Ray", "Ray's client server"][: 4 if addresses.with_ray else 2]
    for port, use in enumerate(uses, start=addresses.port):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was just closed counts as free
            try:
                probe.bind(("127.0.0.1", port))
            except OSError as error:
                raise InputError(
                    f"port {port}, for {use}, cannot be used: {error.strerror}; choose others with --port"
                ) from None


def _environment(
    runs: Path, state: Path, addresses: Addresses, login: str, folder_of_ray: Path | None
) -> dict[str, str]:
    """Environment variables of all programs, and of the flow runs that the worker starts."""
    ours = {
        "LORAFLEET_UP_PYTHON": sys.executable,
        "LORAFLEET_UP_STATE": str(state),
        "LORAFLEET_UP_RUNS": str(runs.resolve()),
        "LORAFLEET_UP_PORT": str(addresses.port),
        "LORAFLEET_UP_REPORTS_PORT": str(addresses.port + 1),
        "LORAFLEET_UP_RAY": str(addresses.with_ray).lower(),
        "LORAFLEET_UP_RAY_PORT": str(addresses.port + 2),
        "LORAFLEET_UP_RAY_CLIENT_PORT": str(addresses.port + 3),
        "LORAFLEET_UP_RAY_FOLDER": str(folder_of_ray),
        "LORAFLEET_UP_CPUS": str(local_cpus()),
        "LORAFLEET_REPORTS_URL": addresses.reports,
        "PREFECT_HOME": str(state / "prefect"),
        "PREFECT_API_URL": addresses.api,
        # Deployments run `python`, which has to be the one that lorafleet is installed for.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
    }
    if addresses.with_ray:
        ours |= {"RAY_ADDRESS": addresses.ray, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(state / _RAY_TOKEN)}
        kept_secret(state / _RAY_TOKEN, secrets.token_hex(32))
    return os.environ | server_settings(addresses.ui, login) | ours


def _all_answer(addresses: Addresses, login: str, started: datetime) -> bool:
    try:
        ask(f"{addresses.api}/health")
        workers = json.loads(ask(f"{addresses.api}/work_pools/lorafleet/workers/filter", login=login, content=b"{}"))
        ports = range(addresses.port + 1, addresses.port + (3 if addresses.with_ray else 2))
        for port in ports:
            check_listening(f"127.0.0.1:{port}", timeout_seconds=5)
    except OSError:
        return False
    # A worker of that name may be registered from an earlier start.
    return any(
        worker["name"] == _WORKER and datetime.fromisoformat(worker["last_heartbeat_time"]) >= started
        for worker in workers
    )


def _welcome(addresses: Addresses, state: Path, login: str) -> list[str]:
    password = (
        "the one that you have set"
        if given_login()
        else f"{login} (the Prefect UI asks for it once; kept in {state / _PASSWORD})"
    )
    return [
        f"Prefect UI: {addresses.ui}",
        f"password:   {password}",
        f"reports:    {addresses.reports}",
        *([f"Ray:        {addresses.ray}, token in {state / _RAY_TOKEN}"] if addresses.with_ray else []),
        f"logs:       {state}",
        "schedules:  lorafleet deploy",
        f"stop:       Ctrl-C, or kill {os.getpid()}",
    ]
