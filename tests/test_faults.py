"""Kills at any time: a restart gives the same bits, and repeats no finished work."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import Command, Ended, epochs_done, write_config, write_task
from test_embedding_job import TASKS

from pipeline.config import load_config
from pipeline.encoder.runtime import choose_runtime
from pipeline.records import TaskResult
from pipeline.run.job import TaskJob
from pipeline.run.plan import job_spec
from pipeline.run.preflight import preflight
from pipeline.store.files import read_record
from pipeline.store.manifest import read_manifest
from pipeline.store.run_folder import RunFolder

Folders = Callable[[str], Path]
EPOCHS = 20  # a worker trains on for some ten seconds after the head is gone, and must not be done by then
# What Ray leaves for a minute when its parents are killed: two agents that wait to report to a head that is gone.
AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
TITLES = {
    "a worker": ("ray::Worker",),
    "the driver": ("flows.cli",),
    "the Ray head": ("gcs_server",),
    "the Ray node": ("raylet/raylet",),
    "all of Ray": ("gcs_server", "raylet/raylet"),
}


@pytest.fixture(scope="session")
def config(request: pytest.FixtureRequest, encoder_folder: Folders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One MTEB task that is finished in no time, and one that trains for some seconds after it.

    A parameter of the test is the kind of the long task: "classified", or a key of ``TASKS``.
    """
    folder, kind = tmp_path_factory.mktemp("faults"), getattr(request, "param", "classified")
    is_classified = kind == "classified"
    long = write_task(folder, "Long", num_train=800, seed=4) if is_classified else _embedding_task(folder, kind)
    tasks = [
        write_task(folder, "Quick", num_train=60, seed=3) | {"max_epochs": 1},
        long | {"max_epochs": EPOCHS},
    ]
    train = {"batch_size": 2 if is_classified else 4, "patience": EPOCHS, "learning_rate": 0.002}
    evaluate = {"columns": ["frozen_full_data", "head"]}
    return write_config(folder / "config.toml", encoder_folder("bert"), tasks, train=train, evaluate=evaluate)


def _embedding_task(folder: Path, kind: str) -> dict[str, Any]:
    make, extra, _ = TASKS[kind]
    entry: dict[str, Any] = {"name": "Long", **extra}
    for split, number, seed in (("train", 800, 1), ("validation", 60, 2), ("test", 90, 3)):
        entry[split] = str(folder / f"Long-{split}.parquet")
        pq.write_table(pa.table(make(number, seed)), entry[split])
    return entry


@pytest.fixture(scope="session")
def undisturbed(config: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """MTEB task -> sha256 of its adapter, trained here without Prefect, without Ray and without a fault."""
    values = load_config(str(config))
    plan = preflight(values, choose_runtime(values.train, threads=1, use_gpu=False))
    runs = tmp_path_factory.mktemp("undisturbed")
    adapters = {}
    for planned in plan.tasks:
        spec = job_spec(plan, planned, run_id="undisturbed", runs=runs)
        adapters[planned.mteb_task.name] = TaskJob(spec).train(lambda row: None, lambda progress: None).sha256
    return adapters


class Store:
    """A run store, and the commands that are run on it one after another."""

    def __init__(self, cwd: Path, config: Path, api: str) -> None:
        self.cwd, self.config, self.api = cwd, config, api
        self.runs = cwd / "runs"

    def start(self) -> Command:
        """``lorafleet train``."""
        return Command("train", "--config", self.config, "--runs", "runs", cwd=self.cwd, PREFECT_API_URL=self.api)

    def start_and_wait_for(self, epochs: int, *, quick: bool = True) -> Command:
        """Start, and return in the middle of a later epoch of the long task, with the quick task finished."""
        before = self.epochs_done()
        command = self.start()
        command.wait_until(lambda: not quick or any(self.runs.glob("*/Quick/result.json")))
        command.wait_until(lambda: command.family("ray::Worker") and self.epochs_done() >= before + epochs)
        return command

    def epochs_done(self) -> int:
        """Finished epochs of the long task."""
        return max(epochs_done(self.runs).values(), default=0)

    def adapters(self, ended: Ended) -> dict[str, str]:
        """sha256 of what the run holds."""
        assert ended.code == 0, ended.err
        return read_manifest(RunFolder(self.cwd / ended.run)).adapters

    def origins(self, ended: Ended) -> dict[str, str]:
        """MTEB task -> the run that it was reused from."""
        return read_manifest(RunFolder(self.cwd / ended.run)).reused

    def result(self, ended: Ended, name: str) -> TaskResult:
        """The result of one MTEB task."""
        return read_record(RunFolder(self.cwd / ended.run).task(name).result, TaskResult)


@pytest.fixture
def store(config: Path, prefect_api: str, tmp_path: Path) -> Store:
    return Store(tmp_path, config, prefect_api)


def left(command: Command, *, seconds: float = 10) -> list[str]:
    return command.left(seconds=seconds, but=AGENTS)


@pytest.mark.timeout(600)
@pytest.mark.faults
@pytest.mark.parametrize("config", ["classified", "graded", "two adapters", "separated"], indirect=True)
def test_a_training_survives_the_kill_of_its_driver_of_the_ray_head_and_of_its_worker(
    store: Store, undisturbed: dict[str, str]
) -> None:
    """One after the other, each in the middle of an epoch; the last start recovers by itself."""
    driver = store.start_and_wait_for(1)
    (killed,) = {path.parent.parent.name for path in store.runs.glob("*/Quick/result.json")}
    driver.kill(*TITLES["the driver"])
    assert left(driver) == []
    assert driver.wait().code == -signal.SIGKILL

    head = store.start_and_wait_for(1)
    head.kill(*TITLES["the Ray head"])
    ended = head.wait(seconds=60)
    assert ended.code == 1, ended.err
    assert "GCS may have been killed" in ended.err
    assert left(head) == []

    last = store.start_and_wait_for(1)
    last.kill(*TITLES["a worker"])
    ended = last.wait()
    assert store.adapters(ended) == undisturbed
    assert store.origins(ended) == {"Quick": killed}
    assert "its worker died" in ended.err
    assert [row.epoch for row in store.result(ended, "Long").epochs] == list(range(1, EPOCHS + 1))
    assert epochs_done(store.runs) == {}
    assert left(last) == []


@pytest.mark.timeout(300)
@pytest.mark.faults
def test_an_interrupt_leaves_no_process_and_keeps_what_was_finished(store: Store) -> None:
    command = store.start_and_wait_for(1)
    command.process.send_signal(signal.SIGINT)
    ended = command.wait(seconds=30)
    assert ended.code == 130
    assert "interrupted; finished work is kept" in ended.err
    assert command.left(seconds=10) == []
    assert len(list(store.runs.glob("*/Quick/result.json"))) == 1
    assert store.epochs_done() >= 1


@pytest.mark.faults
@pytest.mark.timeout(900)
@pytest.mark.parametrize("epochs", [0, 1, 4])
@pytest.mark.parametrize("victim", TITLES)
def test_any_kill_at_any_time_ends_in_the_same_bits(
    victim: str, epochs: int, store: Store, undisturbed: dict[str, str]
) -> None:
    command = store.start_and_wait_for(epochs, quick=epochs > 0)
    command.kill(*TITLES[victim])
    ended = command.wait(seconds=240)
    assert left(command) == []
    if victim == "a worker":
        assert store.adapters(ended) == undisturbed
        return
    assert ended.code != 0
    finished = {path.parent.parent.name for path in store.runs.glob("*/Quick/result.json")}
    again = store.start().wait()
    assert store.adapters(again) == undisturbed
    if finished:
        assert store.origins(again)["Quick"] in finished


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_workers_that_die_more_often_than_they_are_replaced_are_a_failure_and_not_a_hang(store: Store) -> None:
    command = store.start_and_wait_for(1)
    for epochs in (1, 2, 3):
        command.wait_until(lambda n=epochs: store.epochs_done() > n and command.family("ray::Worker"))
        command.kill("ray::Worker")
    ended = command.wait()
    manifest = read_manifest(RunFolder(store.cwd / ended.run))
    assert ended.code == 1
    assert [(f.mteb_task, f.stage) for f in manifest.failures] == [("Long", "train")]
    assert list(manifest.adapters) == ["Quick"]
