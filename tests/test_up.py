"""`lorafleet up`: all programs answer, killed programs are restarted, and stopping it stops exactly its own."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from commands import Command, epochs_done, eventually, run, session_folders, write_config, write_task
from prefect_server import Api, answers_to_strangers

Folders = Callable[[str], Path]


def free_ports() -> int:
    """The first of four that are free."""
    while True:
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            first = stack.enter_context(socket.socket())
            first.bind(("127.0.0.1", 0))
            port: int = first.getsockname()[1]
            for following in (port + 1, port + 2, port + 3):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", following))
            return port


class Up(Command):
    """A running `lorafleet up`."""

    def __init__(self, cwd: Path, *arguments: str, **environment: str) -> None:
        self.port = free_ports()
        self.api = Api(f"http://127.0.0.1:{self.port}/api")
        self.reports = f"http://127.0.0.1:{self.port + 1}"
        super().__init__("up", "--port", str(self.port), *arguments, cwd=cwd, **environment)

    def told(self) -> str:
        """Standard output so far."""
        return self._out.read_text()

    def wait_until_all_answer(self) -> None:
        self.wait_until(lambda: "stop:" in self.told(), seconds=180)
        self.api.login = re.findall(r"^password:   (\S+) ", self.told(), re.MULTILINE)[0]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Up]]:
    """Start `lorafleet up`; whatever a test leaves of it is killed."""
    started: list[Up] = []

    def up(*arguments: str, **environment: str) -> Up:
        started.append(Up(tmp_path, *arguments, **environment))
        return started[-1]

    yield up
    for command in started:
        for process in command.family():
            process.kill()
        command.sweep()


def get(url: str, **headers: str) -> tuple[int, bytes]:
    """Status and body."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, b""


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.timeout(280)
@pytest.mark.faults
def test_all_of_it_answers_comes_back_when_killed_and_is_gone_when_stopped(
    start: Callable[..., Up], tmp_path: Path
) -> None:
    (tmp_path / "runs" / "r1").mkdir(parents=True)
    (tmp_path / "runs" / "r1" / "report.html").write_text("<p>a report</p>", encoding="utf-8")
    up = start("--no-ray")
    up.wait_until_all_answer()
    assert f"Prefect UI: http://127.0.0.1:{up.port}\n" in up.told()
    assert f"reports:    {up.reports}\n" in up.told()
    assert b"<html" in get(f"http://127.0.0.1:{up.port}")[1]
    assert get(f"{up.reports}/r1/report.html") == (200, b"<p>a report</p>")
    (worker,) = up.api.post("/work_pools/lorafleet/workers/filter")
    assert worker["status"] == "ONLINE"

    check_that_only_who_knows_the_password_is_answered(up, tmp_path)
    check_that_its_own_commands_find_it(up, tmp_path)

    again = run("up", "--no-ray", "--port", str(free_ports()), cwd=tmp_path)
    assert (again.code, again.out, again.err.count("\n")) == (2, "", 1), again.err
    assert "`lorafleet up` is already running" in again.err
    elsewhere = run("up", "--no-ray", "--runs", "others", "--port", str(up.port), cwd=tmp_path)
    assert (elsewhere.code, elsewhere.out, elsewhere.err.count("\n")) == (2, "", 1), elsewhere.err
    assert f"port {up.port}" in elsewhere.err
    assert "--port" in elsewhere.err
    assert up.process.poll() is None

    (server,) = up.family("server start")
    server.kill()
    eventually(
        lambda: [p for p in up.family("server start") if p != server] and up.api.answers(),
        seconds=60,
        what="the server is back",
    )

    up.process.send_signal(signal.SIGTERM)
    ended = up.wait(seconds=60)
    assert ended.code == 0, ended.err
    assert ended.out.endswith("stopped\n")
    assert up.left(seconds=1) == []
    assert not any(answers(port) for port in range(up.port, up.port + 4))


def check_that_only_who_knows_the_password_is_answered(up: Up, tmp_path: Path) -> None:
    assert up.api.login is not None
    assert answers_to_strangers(up.api.url, login=up.api.login) == []
    state = tmp_path / "runs" / ".up"
    file = state / "prefect-password"
    assert file.read_text(encoding="utf-8") == up.api.login
    assert [stat.S_IMODE(path.stat().st_mode) for path in (state, file)] == [0o700, 0o600]
    secret = up.api.login.partition(":")[2]
    written = [
        path for path in (tmp_path / "runs").rglob("*") if path.is_file() and secret.encode() in path.read_bytes()
    ]
    assert written == [file]
    assert up.log() == ""
    assert not any(secret in argument for process in up.family() for argument in process.cmdline())


def check_that_its_own_commands_find_it(up: Up, tmp_path: Path) -> None:
    """At a port that is not the usual one, without a variable; and by the address alone, from elsewhere."""
    deployed = run("deploy", cwd=tmp_path)
    assert deployed.code == 0, deployed.err
    assert f"http://127.0.0.1:{up.port}/deployments/" in deployed.out
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert run("deploy", cwd=elsewhere, PREFECT_API_URL=up.api.url).code == 0
    wrong = run("deploy", cwd=elsewhere, PREFECT_API_URL=up.api.url, PREFECT_API_AUTH_STRING="me:wrong")
    assert (wrong.code, wrong.out, wrong.err.count("\n")) == (2, "", 1), wrong.err
    assert "requires a password; set PREFECT_API_AUTH_STRING" in wrong.err
    examined = run("doctor", "--json", cwd=elsewhere, PREFECT_API_URL=up.api.url)
    (check,) = [check for check in json.loads(examined.out)["checks"] if check["name"] == "Prefect API"]
    assert check["status"] == "ok", check


@pytest.mark.faults
@pytest.mark.timeout(120)
def test_the_password_stays_from_one_start_to_the_next_and_one_that_the_user_sets_wins(
    start: Callable[..., Up], tmp_path: Path
) -> None:
    first = start("--no-ray")
    first.wait_until_all_answer()
    first.process.send_signal(signal.SIGTERM)
    assert first.wait(seconds=60).code == 0
    second = start("--no-ray", PREFECT_SERVER_API_AUTH_STRING="me:mine")
    second.wait_until(lambda: "stop:" in second.told(), seconds=100)
    assert "password:   the one that you have set\n" in second.told()
    assert "me:mine" not in second.told()
    assert second.api.login is None
    with pytest.raises(urllib.error.HTTPError):
        second.api.post("/flows/filter")
    second.api.login = "me:mine"
    assert second.api.post("/flows/filter") == []
    assert (tmp_path / "runs" / ".up" / "prefect-password").read_text(encoding="utf-8") == first.api.login


@pytest.mark.faults
@pytest.mark.timeout(120)
def test_a_program_that_does_not_start_is_named_with_its_reason(start: Callable[..., Up], tmp_path: Path) -> None:
    (tmp_path / "runs" / ".up" / "prefect").mkdir(parents=True)
    (tmp_path / "runs" / ".up" / "prefect" / "prefect.db").write_text("this is not a database " * 100, encoding="utf-8")
    ended = start("--no-ray").wait(seconds=100)
    assert (ended.code, ended.out) == (1, "")
    assert "prefect-server does not start: " in ended.err
    assert "not a database" in ended.err


def test_a_run_store_that_cannot_be_written_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file", encoding="utf-8")
    ended = run("up", cwd=tmp_path)
    assert (ended.code, ended.out, ended.err.count("\n")) == (2, "", 1)
    assert "run store runs" in ended.err


def test_reports_are_read_only_and_hold_nothing_but_reports(tmp_path: Path) -> None:
    store = tmp_path / "runs"
    shown = {
        "r/report.html": "text/html",
        "r/a.json": "application/json",
        "r/README.md": "text/plain",
        "history.html": "text/html",
    }
    hidden = ["r/adapter.safetensors", "r/config.toml", ".up/prefect.json", "r/.work/a.json", "r/head.pt"]
    for name in (*shown, *hidden):
        (store / name).parent.mkdir(parents=True, exist_ok=True)
        (store / name).write_text(name, encoding="utf-8")
    (tmp_path / "outside.json").write_text("secret", encoding="utf-8")
    (store / "r" / "link.json").symlink_to(tmp_path / "outside.json")
    (store / "r" / "into.json").symlink_to(store / ".up" / "prefect.json")
    port = free_ports()
    server = subprocess.Popen(
        [sys.executable, "-P", "-m", "tasks.services.reports", str(store), str(port)],
        cwd=tmp_path,
        stderr=subprocess.DEVNULL,
    )
    try:
        eventually(lambda: answers(port), seconds=30, what="the reports answer")
        url = f"http://127.0.0.1:{port}"
        for name in shown:
            assert get(f"{url}/{name}?version=1") == (200, name.encode())
        assert get(url) == (200, b"history.html")
        away = [
            "r/link.json",
            "r/into.json",
            "../outside.json",
            "r/%2e%2e/%2e%2e/outside.json",
            "r",
            "nothing.html",
            "r/%00.html",
        ]
        for name in [*hidden, *away]:
            assert get(f"{url}/{name}")[0] == 404, name
        assert get(f"{url}/r/report.html", Host="evil.example")[0] == 400
        assert get(f"{url}/r/report.html", Host=f"localhost:{port}")[0] == 200
        assert [c.laddr.ip for c in psutil.Process(server.pid).net_connections() if c.status == psutil.CONN_LISTEN] == [
            "127.0.0.1"
        ]
    finally:
        server.kill()
        server.wait()


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_a_scheduled_run_trains_on_the_ray_of_up_and_nothing_is_left_when_it_is_stopped(
    start: Callable[..., Up], encoder_folder: Folders, tmp_path: Path
) -> None:
    up, other = start(), start("--runs", "other")
    up.wait_until_all_answer()
    other.wait_until_all_answer()
    listening = [c.laddr for process in up.family() for c in connections(process) if c.status == psutil.CONN_LISTEN]
    assert {address.port for address in listening} >= {up.port, up.port + 1, up.port + 2}
    assert {address.ip.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}

    write_training(tmp_path, encoder_folder("bert"), "Quick")
    text = SCHEDULE.format(name="often")
    (tmp_path / "schedules.yaml").write_text(text, encoding="utf-8")
    deployed = run("deploy", "--file", "schedules.yaml", cwd=tmp_path, PREFECT_API_URL=up.api.url)
    assert deployed.code == 0, deployed.err
    deployment = up.api.get("/deployments/name/train-adapters/often")["id"]

    def done() -> list[str]:
        runs = up.api.post("/flow_runs/filter", deployments={"id": {"any_": [deployment]}}, sort="START_TIME_ASC")
        return [run["state"]["message"] for run in runs if run["state"]["type"] in ("COMPLETED", "FAILED", "CRASHED")]

    up.wait_until(lambda: up.family("ray::Worker"), seconds=120)
    assert len(up.family("gcs_server")) == 1  # the run has not started another Ray
    (folder_of_ray,) = {argument for process in up.family("gcs_server") for argument in session_folders(process)}
    assert stat.S_IMODE(folder_of_ray.stat().st_mode) == 0o700
    assert up.wait_until(done, seconds=200)[0] == "1 adapter trained, 0 unchanged"

    write_training(tmp_path, encoder_folder("bert"), "Quick", "Long")
    up.wait_until(lambda: epochs_done(tmp_path / "runs"), seconds=120)
    (flow_run,) = up.api.post("/flow_runs/filter", flow_runs={"state": {"type": {"any_": ["RUNNING"]}}})
    up.api.cancel(flow_run["id"])
    eventually(lambda: not up.family("ray::Worker"), seconds=10, what="the workers of the cancelled run are gone")
    eventually(lambda: up.api.state(flow_run["id"])["name"] == "Cancelled", seconds=20, what="the run is cancelled")

    up.wait_until(lambda: up.family("ray::Worker"), seconds=120)  # of the next one
    (flow_run,) = up.api.post("/flow_runs/filter", flow_runs={"state": {"type": {"any_": ["RUNNING"]}}})
    up.process.send_signal(signal.SIGINT)
    ended = up.wait(seconds=120)
    assert ended.code == 0, ended.err
    assert up.left(seconds=1) == []
    with contextlib.closing(sqlite3.connect(tmp_path / "runs" / ".up" / "prefect" / "prefect.db")) as database:
        states = dict(database.execute("SELECT name, state_name FROM flow_run").fetchall())
    assert states[flow_run["name"]] == "Crashed"  # and not Running for ever
    assert not folder_of_ray.exists()
    assert other.process.poll() is None
    assert other.api.answers()
    assert answers(other.port + 2)

    other.process.kill()  # it cannot even hear that
    eventually(lambda: not other.family(), seconds=90, what="nothing is left of it")


def write_training(folder: Path, encoder: Path, *names: str) -> None:
    """A config of MTEB tasks; ``Long`` trains until it is stopped."""
    tasks = [write_task(folder / "data", name, num_train=800 if name == "Long" else 60) for name in names]
    tasks = [task | {"max_epochs": 500 if task["name"] == "Long" else 1} for task in tasks]
    evaluate = {"columns": ["frozen_full_data", "head"]}
    write_config(folder / "config.toml", encoder, tasks, train={"batch_size": 2, "patience": 500}, evaluate=evaluate)


SCHEDULE = """
pull: []
deployments:
  - name: {name}
    entrypoint: flows.train_adapters.train_adapters
    tags: [lorafleet]
    parameters: {{config: config.toml, runs: runs}}
    schedules: [{{interval: 20}}]
    concurrency_limit: {{limit: 1, collision_strategy: CANCEL_NEW}}
    work_pool:
      name: lorafleet
      job_variables: {{command: python -P -m flows.scheduled, working_dir: "{{{{ $PWD }}}}"}}
"""


def connections(process: psutil.Process) -> list[psutil._common.pconn]:
    with contextlib.suppress(psutil.Error):
        return process.net_connections(kind="tcp")
    return []
