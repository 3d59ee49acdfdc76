"""Recovery of a run, and of the next one, from cancelling, killed Prefect processes and a locked database."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from bulk import save_bulk_adapter
from commands import PLANTED, Command, bulk_rows, eventually, run, write_bulk_input, write_config, write_task
from prefect_server import Api, Server, start_worker
from trainings import QUICK, Store, epochs_told, train_undisturbed, write_training

Folders = Callable[[str], Path]
EPOCHS = 14
GROUP = 20  # rows of a unit


@pytest.fixture(scope="module")
def config(encoder_folder: Folders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``Quick``, and ``Long`` after it."""
    return write_training(
        tmp_path_factory.mktemp("recovery-data"), encoder_folder("bert"), QUICK, "Long", epochs=EPOCHS
    )


@pytest.fixture(scope="module")
def undisturbed(config: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return train_undisturbed(config, tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture
def api(prefect_api: str) -> Api:
    return Api(prefect_api)


@pytest.fixture
def store(config: Path, api: Api, tmp_path: Path) -> Store:
    return Store(tmp_path, config, PREFECT_API_URL=api.url)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A Prefect server of the test's own, which may be killed."""
    server = Server(tmp_path / "prefect")
    server.start()
    yield server
    server.kill()


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Callable[..., Command]]:
    """Start a Prefect worker; it and all that it has started are killed after the test."""
    workers: list[Command] = []

    def start(api: Api, cwd: Path) -> Command:
        workers.append(start_worker(api, cwd))
        return workers[-1]

    yield start
    for worker in workers:
        for process in worker.family():
            process.kill()
        worker.sweep()


def is_gone(command: Command, *titles: str) -> Callable[[], bool]:
    return lambda: not command.family(*titles)


@pytest.mark.faults
@pytest.mark.timeout(300)
def test_a_run_that_is_cancelled_in_the_ui_stops_within_ten_seconds_and_the_same_command_goes_on(
    store: Store, api: Api
) -> None:
    command = store.start_in_the_middle()
    (finished,) = store.quick_results()
    flow_run = api.newest_flow_run("train-adapters")
    api.cancel(flow_run)
    eventually(is_gone(command, "ray::Worker"), seconds=10, what="the workers are gone")
    ended = command.wait(seconds=30)
    assert ended.code == 130, ended.err
    assert "interrupted; finished work is kept" in ended.err
    assert command.left(seconds=10) == []
    assert "Ray cluster" not in ended.err  # nobody asked for another one, once this one had been stopped
    state = api.state(flow_run)
    assert (state["type"], state["name"]) == ("CANCELLED", "Cancelled")
    assert "finished work is kept" in state["message"]

    again = store.start()
    again.wait_until(lambda: epochs_told(again.log(), "Long"))
    assert epochs_told(again.log(), "Long")[0] > 1
    assert f"Quick: unchanged, taken over from run {finished.parent.parent.name}" in again.log()
    again.process.send_signal(signal.SIGINT)
    assert again.wait(seconds=30).code == 130


@pytest.mark.faults
@pytest.mark.timeout(300)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_ends_a_program_stops_a_run_as_ctrl_c_does(number: signal.Signals, store: Store) -> None:
    command = store.start_in_the_middle()
    (finished,) = store.quick_results()
    command.process.send_signal(number)
    ended = command.wait(seconds=60)
    assert ended.code == 130, ended.err
    assert "interrupted; finished work is kept" in ended.err
    assert "Crash detected" not in ended.err
    assert "Traceback" not in ended.err
    assert command.left(seconds=10) == []

    again = store.start()
    again.wait_until(lambda: epochs_told(again.log(), "Long"))
    assert epochs_told(again.log(), "Long")[0] > 1
    assert f"Quick: unchanged, taken over from run {finished.parent.parent.name}" in again.log()
    again.process.send_signal(number)
    assert again.wait(seconds=60).code == 130


@pytest.mark.faults
@pytest.mark.timeout(300)
@pytest.mark.parametrize("where", ["process", "ray"])
def test_a_bulk_job_that_is_cancelled_in_the_ui_stops_and_the_same_command_goes_on(
    where: str, encoder_folder: Folders, api: Api, tmp_path: Path
) -> None:
    save_bulk_adapter(tmp_path / "topics", encoder_folder("bert"))
    write_bulk_input(tmp_path / "in", num_files=2, rows=8 * GROUP, group=GROUP)
    options = (
        "--where",
        where,
        "--cpus",
        "1",
        "--rows-per-unit",
        str(GROUP),
        "--encoder",
        encoder_folder("bert"),
        "--offline",
    )
    job = ("classify", "in", "out", "--adapter", tmp_path / "topics", *options)
    output = tmp_path / "out"

    def done() -> int:
        return len(list(output.glob("*-*.parquet")))

    command = Command(*job, cwd=tmp_path, PREFECT_API_URL=api.url, PYTHONPATH=str(PLANTED), PLANTED_SECONDS="1")
    command.wait_until(lambda: done() >= 2)
    flow_run = api.newest_flow_run("classify-datasets")
    api.cancel(flow_run)
    eventually(is_gone(command, "ray::MapWorker"), seconds=10, what="the actors are gone")
    ended = command.wait(seconds=30)
    assert ended.code == 130, ended.err
    assert command.left(seconds=10) == []
    state = api.state(flow_run)
    assert (state["type"], state["name"]) == ("CANCELLED", "Cancelled")
    kept = done()
    assert 2 <= kept < 16

    again = run(*job, cwd=tmp_path, PREFECT_API_URL=api.url)
    assert again.code == 0, again.err
    assert json.loads((output / "_job.json").read_text())["units_done_before"] == kept
    assert bulk_rows(output).column("id").to_pylist() == list(range(16 * GROUP))


def deploy(api: Api, config: Path, cwd: Path) -> str:
    """With one run at a time, as `lorafleet deploy` has it: one more is cancelled."""
    limit = {"concurrency_limit": 1, "concurrency_options": {"collision_strategy": "CANCEL_NEW"}}
    return api.deploy(
        "flows.train_adapters.train_adapters", cwd, parameters={"config": str(config), "runs": "runs"}, **limit
    )


def ends(api: Api, flow_run: str, *, seconds: float = 120) -> tuple[str, str]:
    """The type of the flow run's last state, and its message."""

    def last() -> tuple[str, str] | None:
        state = api.state(flow_run)
        return (
            (state["type"], state["message"] or "")
            if state["type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
            else None
        )

    ended: tuple[str, str] = eventually(last, seconds=seconds, what="the flow run ends")
    return ended


@pytest.mark.faults
@pytest.mark.timeout(300)
def test_a_run_of_a_prefect_worker_is_cancelled_within_ten_seconds_and_the_next_one_goes_on(
    store: Store, api: Api, started: Callable[..., Command], tmp_path: Path
) -> None:
    worker = started(api, tmp_path)
    deployment = deploy(api, store.config, tmp_path)
    flow_run = api.start(deployment)
    worker.wait_until(store.in_the_middle)
    api.cancel(flow_run)
    eventually(is_gone(worker, "ray::Worker"), seconds=10, what="the workers are gone")
    assert ends(api, flow_run, seconds=30)[0] == "CANCELLED"
    eventually(
        is_gone(worker, "prefect.engine", "raylet/raylet", "gcs_server"),
        seconds=20,
        what="the run's processes are gone",
    )
    assert worker.process.poll() is None
    assert "Ray cluster" not in worker.log()
    assert ends(api, api.start(deployment)) == ("COMPLETED", "1 adapter trained, 1 unchanged")


@pytest.mark.faults
@pytest.mark.timeout(300)
def test_a_run_whose_process_is_killed_is_crashed_and_the_next_one_goes_on(
    store: Store, api: Api, started: Callable[..., Command], tmp_path: Path
) -> None:
    worker = started(api, tmp_path)
    deployment = deploy(api, store.config, tmp_path)
    flow_run = api.start(deployment)
    worker.wait_until(store.in_the_middle)
    worker.kill("prefect.engine")
    assert ends(api, flow_run, seconds=30)[0] == "CRASHED"
    assert ends(api, api.start(deployment)) == ("COMPLETED", "1 adapter trained, 1 unchanged")


@pytest.mark.faults
@pytest.mark.timeout(300)
def test_a_run_ends_with_the_prefect_worker_that_is_killed_and_the_next_one_goes_on(
    store: Store, api: Api, started: Callable[..., Command], tmp_path: Path
) -> None:
    """Its output goes through the worker: the next line that it logs ends it, in an orderly way."""
    worker = started(api, tmp_path)
    deployment = deploy(api, store.config, tmp_path)
    flow_run = api.start(deployment)
    worker.wait_until(store.in_the_middle)
    worker.process.kill()
    assert ends(api, flow_run)[0] == "CRASHED"
    eventually(
        is_gone(worker, "prefect.engine", "ray::Worker", "raylet/raylet", "gcs_server"),
        seconds=20,
        what="all of the run is gone",
    )
    started(api, tmp_path)
    assert ends(api, api.start(deployment)) == ("COMPLETED", "1 adapter trained, 1 unchanged")


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_a_run_that_dies_together_with_its_prefect_worker_does_not_block_later_ones_for_ever(
    store: Store, api: Api, started: Callable[..., Command], tmp_path: Path
) -> None:
    """Its slot is a lease of five minutes, which nobody renews any more."""
    worker = started(api, tmp_path)
    deployment = deploy(api, store.config, tmp_path)
    flow_run = api.start(deployment)
    worker.wait_until(store.in_the_middle)
    worker.process.kill()
    worker.kill("prefect.engine")
    killed = time.monotonic()
    started(api, tmp_path)
    assert ends(api, api.start(deployment)) == ("CANCELLED", "Deployment concurrency limit reached.")
    while (end := ends(api, api.start(deployment)))[0] == "CANCELLED":
        assert time.monotonic() < killed + 360, "the slot is not free after six minutes"
        time.sleep(15)
    assert end == ("COMPLETED", "1 adapter trained, 1 unchanged")
    assert api.state(flow_run)["type"] == "RUNNING"  # nobody is left to say otherwise


@pytest.mark.faults
@pytest.mark.timeout(300)
def test_a_run_survives_a_restart_of_the_prefect_server(
    config: Path, undisturbed: dict[str, str], server: Server, tmp_path: Path
) -> None:
    store = Store(tmp_path, config, PREFECT_API_URL=server.api.url)
    command = store.start_in_the_middle()
    flow_run = server.api.newest_flow_run("train-adapters")
    server.kill()
    time.sleep(10)
    server.start()
    ended = command.wait()
    assert store.adapters(ended) == undisturbed
    assert server.api.state(flow_run)["type"] == "COMPLETED"
    assert {"score-table", "score-notes"} <= set(server.api.artifacts(flow_run))
    print(server.api.task_states(flow_run), ended.err)


@pytest.mark.faults
@pytest.mark.timeout(400)
def test_a_run_whose_prefect_server_never_comes_back_ends_with_one_message_and_its_work_is_kept(
    config: Path, undisturbed: dict[str, str], server: Server, api: Api, tmp_path: Path
) -> None:
    """Prefect's client tries for a minute, and three times; here for six seconds."""
    store = Store(tmp_path, config, PREFECT_API_URL=server.api.url, PREFECT_CLIENT_MAX_RETRIES="2")
    command = store.start_in_the_middle()
    server.kill()
    ended = command.wait(seconds=120)
    assert ended.code == 1
    assert "Traceback" not in ended.err
    (last,) = (line for line in ended.err.splitlines() if line.startswith("error:"))
    assert last.startswith(f"error: the Prefect server at {server.api.url} does not answer")
    assert len([line for line in ended.err.splitlines() if "does not answer" in line]) <= 5, ended.err
    assert command.left(seconds=10) == []
    again = Store(tmp_path, config, PREFECT_API_URL=api.url).start().wait()
    assert store.adapters(again) == undisturbed
    assert "epoch" not in again.err


@pytest.mark.faults
@pytest.mark.timeout(300)
def test_the_slot_of_a_run_outlives_a_restart_of_a_prefect_server_that_keeps_leases_in_files(
    store: Store, started: Callable[..., Command], tmp_path: Path
) -> None:
    """Prefect's default keeps leases in memory. A run could not renew its own, and a dead run's slot stayed taken."""
    server = Server(
        tmp_path / "prefect",
        PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE="prefect.server.concurrency.lease_storage.filesystem",
    )
    server.start()
    try:
        api = server.api
        worker = started(api, tmp_path)
        deployment = deploy(api, store.config, tmp_path)
        flow_run = api.start(deployment)
        worker.wait_until(store.in_the_middle)
        lease = api.state(flow_run)["state_details"]["deployment_concurrency_lease_id"]
        server.kill()
        time.sleep(10)
        server.start()
        api.post(f"/v2/concurrency_limits/leases/{lease}/renew", lease_duration=300)
        assert ends(api, flow_run) == ("COMPLETED", "2 adapters trained, 0 unchanged")
        assert ends(api, api.start(deployment))[0] == "COMPLETED"
    finally:
        server.kill()


@pytest.mark.faults
@pytest.mark.timeout(300)
def test_a_run_survives_a_locked_database(
    config: Path, undisturbed: dict[str, str], server: Server, tmp_path: Path
) -> None:
    """Locked by another process for 15 seconds, and again while the run ends."""
    store = Store(tmp_path, config, PREFECT_API_URL=server.api.url)
    command = store.start_in_the_middle()
    flow_run = server.api.newest_flow_run("train-adapters")
    with closing(sqlite3.connect(server.database, timeout=60, isolation_level=None)) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        time.sleep(15)
        connection.execute("ROLLBACK")
    ended = command.wait()
    assert store.adapters(ended) == undisturbed
    assert server.api.state(flow_run)["type"] == "COMPLETED"


@pytest.fixture
def postgres() -> Iterator[str]:
    """Address of a PostgreSQL of the test's own, on loopback, that trusts whoever asks."""
    debian = Path(os.sep, "usr", "lib", "postgresql")  # which keeps them off the PATH
    programs = [path.parent for path in sorted(debian.glob("*/bin/initdb"))]
    if not programs:
        pytest.skip("no PostgreSQL server here; Debian's package postgresql has one")
    # Not below tmp_path: the server refuses to run as root, and no other user may look into there.
    with tempfile.TemporaryDirectory(prefix="postgres-") as folder:
        user = {"user": "postgres", "group": "postgres"} if os.getuid() == 0 else {}
        if user:
            shutil.chown(folder, "postgres", "postgres")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        subprocess.run(
            [programs[-1] / "initdb", "-D", "data", "-A", "trust", "-U", "prefect"], cwd=folder, check=True, **user
        )
        command = [programs[-1] / "postgres", "-D", "data", "-h", "127.0.0.1", "-p", str(port), "-k", folder]
        server = subprocess.Popen(command, cwd=folder, **user)
        yield f"prefect@127.0.0.1:{port}/postgres"
        server.send_signal(signal.SIGINT)
        server.wait()


@pytest.mark.faults
@pytest.mark.timeout(300)
def test_a_run_with_postgresql_as_prefects_database(encoder_folder: Folders, postgres: str, tmp_path: Path) -> None:
    tasks = [
        write_task(tmp_path / "data", "Topics", num_classes=3),
        write_task(tmp_path / "data", "Pairs", num_classes=2, seed=1),
    ]
    config = write_config(tmp_path / "config.toml", encoder_folder("bert"), tasks)
    server = Server(tmp_path / "prefect", PREFECT_SERVER_DATABASE_CONNECTION_URL=f"postgresql+asyncpg://{postgres}")
    server.start()
    try:
        ended = run("train", "--config", config, "--runs", "runs", cwd=tmp_path, PREFECT_API_URL=server.api.url)
        assert ended.code == 0, ended.err
        flow_run = server.api.newest_flow_run("train-adapters")
        assert server.api.state(flow_run)["message"] == "2 adapters trained, 0 unchanged"
        shown = server.api.artifacts(flow_run)
        rows = json.loads(shown["score-table"])
        assert [row["MTEB task"] for row in rows] == ["Topics", "Pairs"]
        assert ended.run.name in shown["score-notes"]
        assert not server.database.exists()
    finally:
        server.kill()
