"""Prefect's API as its UI uses it, and a server and a worker that tests can kill and restart."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from commands import Command, eventually
from websockets.exceptions import ConnectionClosed, InvalidHandshake
from websockets.sync.client import connect

from tasks.services.loopback import basic

POOL = "lorafleet-tests"


class Api:
    """A Prefect server's REST API."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.login: str | None = None
        """``NAME:PASSWORD``, if the server requires one."""

    def get(self, path: str) -> Any:
        """The answer as JSON."""
        return self._send("GET", path, None)

    def post(self, path: str, **body: Any) -> Any:
        """The answer as JSON."""
        return self._send("POST", path, body)

    def answers(self) -> bool:
        """Whether the server is there."""
        try:
            return bool(self.get("/health"))
        except (urllib.error.URLError, OSError):
            return False

    def newest_flow_run(self, flow: str) -> str:
        """Id of the flow's run that was started last."""
        (run,) = self.post("/flow_runs/filter", flows={"name": {"any_": [flow]}}, sort="START_TIME_DESC", limit=1)
        return str(run["id"])

    def state(self, flow_run: str) -> dict[str, Any]:
        """State of a flow run: ``type``, ``name``, ``message``."""
        state: dict[str, Any] = self.get(f"/flow_runs/{flow_run}")["state"]
        return state

    def cancel(self, flow_run: str) -> None:
        """Cancel a flow run as the UI's button does."""
        answer = self.post(f"/flow_runs/{flow_run}/set_state", state={"type": "CANCELLING", "name": "Cancelling"})
        assert answer["status"] == "ACCEPT", answer

    def task_states(self, flow_run: str) -> dict[str, str]:
        """Name of each task run -> type of its state."""
        runs = self.post("/task_runs/filter", flow_runs={"id": {"any_": [flow_run]}}, limit=200)
        return {run["name"]: run["state_type"] for run in runs}

    def artifacts(self, flow_run: str) -> dict[str, Any]:
        """Key -> what it shows."""
        found = self.post("/artifacts/filter", artifacts={"flow_run_id": {"any_": [flow_run]}}, limit=200)
        return {artifact["key"]: artifact["data"] for artifact in found}

    def deploy(self, entrypoint: str, cwd: Path, **values: Any) -> str:
        """Register a flow by its module, to be started by a worker in a folder; returns the deployment's id."""
        flow = self.post("/flows/", name=entrypoint.rpartition(".")[2].replace("_", "-"))
        steps = [{"prefect.deployments.steps.set_working_directory": {"directory": str(cwd)}}]
        where = {"flow_id": flow["id"], "entrypoint": entrypoint, "pull_steps": steps, "work_pool_name": POOL}
        return str(self.post("/deployments/", name=cwd.name, enforce_parameter_schema=False, **where, **values)["id"])

    def start(self, deployment: str) -> str:
        """Have it run now; returns the flow run's id."""
        return str(self.post(f"/deployments/{deployment}/create_flow_run", state={"type": "SCHEDULED"})["id"])

    def _send(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data=data, method=method, headers={"Content-Type": "application/json"}
        )
        if self.login is not None:
            request.add_header("Authorization", basic(self.login))
        for _ in range(30):
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    return json.loads(answer.read() or "null")
            except urllib.error.HTTPError as error:
                if error.code != 503:  # busy: SQLite has one writer; Prefect's own client tries again too
                    raise
                time.sleep(1)
        raise AssertionError(f"{self.url}{path}: busy for half a minute")


def answers_to_strangers(url: str, *, login: str) -> list[str]:
    """Answers of a Prefect server to a page of another site, or to another user without its login.

    The requests are ways to start a deployment on a server without a password, and all websockets of Prefect.

    Args:
        url: Of the API, on loopback.
        login: The right one, to see that the same question is answered with it.
    """
    host = url.split("/")[2]
    body = json.dumps({"name": "planted"}).encode()
    wrong = basic(login[:-1])
    taken = []
    for name, headers in {
        "without a content type": {"Content-Type": None},
        "from a foreign host": {"Host": "evil.example"},
        "from a foreign origin": {"Origin": "http://evil.example"},
        "from a page on loopback": {"Origin": f"http://{host}"},
        "with a wrong password": {"Authorization": wrong},
    }.items():
        status, _ = _raw("POST", url + "/flows/", body, {"Content-Type": "application/json"} | headers)
        taken += [f"POST {name}: {status}"] * (status != 401)
    for path in (
        "/flows/filter",
        "/deployments/filter",
        "/block_documents/filter",
        "/admin/settings",
        "/docs",
        "/openapi.json",
    ):
        status, _ = _raw("GET" if "filter" not in path else "POST", url + path, b"{}" if "filter" in path else None, {})
        taken += [f"{path}: {status}"] * (status != 401)
    for path in _WEBSOCKETS:
        for subprotocols in (None, ["prefect"]):
            for token in (None, login[:-1]):
                if _is_let_in(url, path, subprotocols, token):
                    taken.append(f"websocket {path}, {subprotocols}, {token}")
        assert _is_let_in(url, path, ["prefect"], login), (
            f"{path} is not open to who knows the password, so this test sees nothing"
        )
    status, headers = _raw("POST", url + "/flows/", body, {"Authorization": basic(login)})
    assert status in (200, 201), "the right password is refused, so this test sees nothing"
    origin = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    _, headers = _raw("OPTIONS", url + "/flows/", None, origin)
    taken += [f"{name}: {value}" for name, value in headers.items() if name == "access-control-allow-origin"]
    return taken


_WEBSOCKETS = (
    *("/events/in", "/events/out", "/logs/out"),
    *("/task_runs/subscriptions/scheduled", "/work_pools/lorafleet/workers/connect"),
)


def _raw(method: str, url: str, body: bytes | None, headers: Mapping[str, str | None]) -> tuple[int, dict[str, str]]:
    """Status and headers of the answer; a header without a value is not sent."""
    parts = url.split("/", 3)
    connection = http.client.HTTPConnection(parts[2], timeout=30)
    connection.putrequest(method, f"/{parts[3]}", skip_host="Host" in headers)
    for name, value in headers.items():
        if value is not None:
            connection.putheader(name, value)
    connection.putheader("Content-Length", str(len(body or b"")))
    connection.endheaders(body)
    answer = connection.getresponse()
    answer.read()
    connection.close()
    return answer.status, {name.lower(): value for name, value in answer.getheaders()}


def _is_let_in(url: str, path: str, subprotocols: list[str] | None, token: str | None) -> bool:
    """Whether a websocket is open after the first message, in which Prefect's client gives its password."""
    address = f"ws{url.removeprefix('http')}{path}"
    try:
        with connect(
            address, subprotocols=subprotocols, origin="http://evil.example", proxy=None, open_timeout=30
        ) as socket:  # type: ignore[arg-type]
            socket.send(json.dumps({"type": "auth", "token": token}))
            return "auth_success" in str(socket.recv(timeout=3))
    except TimeoutError:  # open, and waiting for what comes next
        return True
    except (InvalidHandshake, ConnectionClosed):
        return False


def start_stand_in(
    api: str, runs: Path, *, login: str = "lorafleet:x", title: str = "supervisor.supervisord"
) -> subprocess.Popen[bytes]:
    """A process that looks like the supervisor of a `lorafleet up`, until its standard input ends."""
    environment = os.environ | {
        "PREFECT_API_URL": api,
        "LORAFLEET_UP_RUNS": str(runs),
        "PREFECT_API_AUTH_STRING": login,
    }
    command = [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()", title]
    process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    return process


class Server:
    """A Prefect server with a home of its own, on one port for all its lives."""

    def __init__(self, home: Path, **settings: str) -> None:
        home.mkdir(parents=True, exist_ok=True)
        self.home, self._settings = home, settings
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self.api = Api(f"http://127.0.0.1:{self._port}/api")
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def database(self) -> Path:
        """The file that SQLite keeps, if it does."""
        return self.home / "prefect.db"

    def start(self, *, seconds: float = 120) -> None:
        """Start, and wait until it answers."""
        environment = (
            os.environ | {"PREFECT_HOME": str(self.home), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"} | self._settings
        )
        with (self.home / "server.log").open("ab") as log:
            command = [sys.executable, "-m", "tasks.services.prefect_server", str(self._port)]
            self._process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        eventually(self.api.answers, seconds=seconds, what="the Prefect server answers")

    def kill(self) -> None:
        """``kill -9``, if it runs."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def start_worker(api: Api, cwd: Path, **environment: str) -> Command:
    """``prefect worker start``, which makes its pool and polls every second; waits until it is there."""
    settings = {"PREFECT_API_URL": api.url, "PREFECT_HOME": str(cwd / "home"), "PREFECT_WORKER_QUERY_SECONDS": "1"}
    program: Sequence[str] = (sys.executable, "-m", "prefect", "worker", "start")
    worker = Command("--pool", POOL, "--type", "process", program=program, cwd=cwd, **settings, **environment)
    worker.wait_until(lambda: _has_workers(api), seconds=60)
    return worker


def _has_workers(api: Api) -> bool:
    try:
        return any(worker["status"] == "ONLINE" for worker in api.post(f"/work_pools/{POOL}/workers/filter"))
    except urllib.error.HTTPError:  # the pool is not there yet
        return False
