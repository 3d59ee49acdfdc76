"""Workers on Ray: placement by CPU and GPU shares, replacement after a crash, and shared clusters."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from builders import CPU_FLOAT32
from commands import Command, FinishedRun, run, session_folders, write_config, write_task

from pipeline.config import ComputeConfig, RunConfig, validate_config
from pipeline.errors import ConfigError, InputError
from pipeline.records import MtebTask
from pipeline.run.plan import JobSpec
from pipeline.store.manifest import read_manifest
from pipeline.store.run_folder import RunFolder
from tasks.fleet import Fleet
from tasks.fleet_worker import FleetWorker, StoppedError, WorkerDiedError

Folders = Callable[[str], Path]
CLUSTER = """
import sys, ray
ray.init(address="local", num_cpus=2, num_gpus=1, include_dashboard=False, object_store_memory=150 * 2**20,
         _node_ip_address="127.0.0.1", logging_level="ERROR", log_to_driver=False)
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""


@dataclass(frozen=True)
class Cluster:
    """A Ray of somebody else's, with two CPUs and one GPU that exists on paper."""

    address: str
    process: subprocess.Popen[str]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """With token authentication, Ray's default. A client reads the token from the user's home folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv(
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0"
        )  # or it would give the machine's outer address for its own
        process = subprocess.Popen(
            [sys.executable, "-c", CLUSTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stdin is not None
        assert process.stdout is not None
        yield Cluster(process.stdout.readline().strip(), process)
        process.stdin.close()
        process.wait(timeout=60)


def config(**compute: Any) -> RunConfig:
    return validate_config({"mteb_tasks": [{"name": "Topics", "train": "a", "test": "b"}], "compute": compute}, "test")


def spec(name: str = "Topics") -> JobSpec:
    task = MtebTask(
        name=name, source="files", location="a", test_location="b", revision="r", max_epochs=1, samples_per_label=8
    )
    checked = {"fingerprint": "f", "encoder_revision": "e", "key": "k"}
    return JobSpec(config=config(), mteb_task=task, runtime=CPU_FLOAT32, run_id="one", runs="runs", **checked)


def begun(fleet: Fleet, name: str = "Topics") -> FleetWorker:
    worker = fleet.worker()
    worker.begin(spec(name))
    return worker


@pytest.fixture
def start(cluster: Cluster) -> Iterator[Callable[..., Fleet]]:
    """Make a fleet on the cluster; it is stopped after the test."""
    fleets = []

    def make(*, num_tasks: int = 3, **compute: Any) -> Fleet:
        fleet = Fleet(config(ray_address=cluster.address, **compute).compute, num_tasks=num_tasks, make_ahead=True)
        fleets.append(fleet)
        fleet.start()
        return fleet

    yield make
    for fleet in fleets:
        fleet.stop()


def process_of(worker: Any) -> int:
    answer: int = worker.call("process_id", timeout_seconds=60)
    return answer


@pytest.mark.faults
def test_two_workers_share_a_gpu_by_halves_and_the_third_waits(start: Callable[..., Fleet]) -> None:
    import ray

    fleet = start(gpus_per_worker=0.5, cpus_per_worker=0.5)
    fleet.ready()
    assert fleet.num_workers == 2
    assert fleet._made_ahead == []  # a cluster of others' gives no place before it is needed
    one, two, three = (begun(fleet, name) for name in ("A", "B", "C"))
    assert process_of(one) != process_of(two)
    assert ray.available_resources().get("GPU", 0) == 0
    third: list[int] = []
    waiting = threading.Thread(target=lambda: third.append(process_of(three)))
    waiting.start()
    waiting.join(timeout=2)
    assert third == []
    one.release()
    waiting.join(timeout=60)
    assert len(third) == 1


def test_no_more_workers_than_the_config_says(start: Callable[..., Fleet]) -> None:
    fleet = start(workers=1, cpus_per_worker=0.5, gpus_per_worker=0)
    fleet.ready()
    assert fleet.num_workers == 1


def test_a_whole_gpu_is_taken_where_there_is_one(start: Callable[..., Fleet]) -> None:
    fleet = start(cpus_per_worker=0.5)
    fleet.ready()
    assert (fleet.gpus_per_worker, fleet.num_workers) == (1.0, 1)


@pytest.mark.parametrize("share", [{"cpus_per_worker": 64}, {"gpus_per_worker": 2}])
def test_workers_that_do_not_fit_are_refused_with_what_is_there(
    share: dict[str, float], start: Callable[..., Fleet]
) -> None:
    with pytest.raises(ConfigError, match="but Ray has 2 and 1"):
        start(**share).ready()


def test_an_address_where_nothing_answers_is_the_callers_fault() -> None:
    fleet = Fleet(ComputeConfig(ray_address="127.0.0.1:1"), num_tasks=1)
    fleet.start()
    with pytest.raises(ConfigError, match="no Ray cluster answers there"):
        fleet.ready()
    fleet.stop()


@pytest.mark.faults
def test_a_worker_that_dies_is_an_error_once_and_the_next_call_has_a_new_one(start: Callable[..., Fleet]) -> None:
    fleet = start(gpus_per_worker=0, cpus_per_worker=0.5)
    fleet.ready()
    worker = begun(fleet)
    before = process_of(worker)
    os.kill(before, 9)
    with pytest.raises(WorkerDiedError, match="Topics: its worker died while it ran 'process_id'"):
        for _ in range(20):
            process_of(worker)
    assert process_of(worker) != before


@pytest.mark.faults
def test_an_own_rays_first_workers_are_there_before_they_are_asked_for() -> None:
    import ray

    fleet = Fleet(ComputeConfig(workers=1), num_tasks=3, make_ahead=True)
    fleet.start()
    fleet.ready()
    (actor,) = fleet._made_ahead
    ahead = ray.get(actor.process_id.remote())
    assert process_of(begun(fleet)) == ahead
    assert fleet._made_ahead == []
    fleet.stop()


def test_a_folder_for_ray_with_too_long_a_path_is_refused_before_ray_is_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setenv("RAY_TMPDIR", str(long))
    fleet = Fleet(ComputeConfig(), num_tasks=1)
    fleet.start()
    with pytest.raises(InputError, match=r"RAY_TMPDIR .*; set it to a folder with a shorter path"):
        fleet.ready()
    fleet.stop()


@pytest.mark.faults
def test_a_worker_that_cannot_start_says_why_and_is_not_tried_again(
    encoder_folder: Folders, prefect_api: str, tmp_path: Path
) -> None:
    """mteb keeps a cache in the home folder, and cannot be imported where there is none."""
    path = write_config(tmp_path / "config.toml", encoder_folder("bert"), [write_task(tmp_path / "data", "Topics")])
    ended = run("train", "--config", path, cwd=tmp_path, PREFECT_API_URL=prefect_api, HOME="/proc")
    assert ended.code == 1
    assert (
        ended.err.count("a worker cannot start: FileNotFoundError: [Errno 2] No such file or directory: '/proc/.cache'")
        == 1
    ), ended.err
    assert "Traceback" not in ended.err


# What `lorafleet doctor --start` does, in a process of its own: Ray reads the environment once.
TRIAL = [sys.executable, "-P", "-m", "tasks.checks.trial", "@ray="]


def try_ray(cwd: Path, **environment: str) -> Command:
    return Command(*TRIAL[1:], program=TRIAL[:1], cwd=cwd, **environment)


def answer_of(command: Command) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(command.wait(seconds=200).out)
    return answer


def test_a_fleet_stopped_while_its_first_workers_are_made_says_nothing(tmp_path: Path) -> None:
    """This happens if a run's input is refused as soon as Ray is up. Ray's core writes to standard error directly."""
    program = "from pipeline.config import ComputeConfig\nfrom tasks.fleet import Fleet\n"
    program += (
        "fleet = Fleet(ComputeConfig(), num_tasks=1, make_ahead=True)\nfleet.start(); fleet.ready(); fleet.stop()"
    )
    for _ in range(2):  # the complaint came two times in three
        ended = Command("-P", "-c", program, program=[sys.executable], cwd=tmp_path).wait()
        assert (ended.code, ended.out, ended.err) == (0, "", "")


@pytest.mark.faults
def test_a_local_ray_starts_where_the_path_for_temporary_files_is_long_and_the_user_has_no_home(tmp_path: Path) -> None:
    """A SLURM node or a container is like this. Nobody else can enter the folder, and nothing is left of it."""
    long = tmp_path / ("x" * 100)
    long.mkdir()
    command = try_ray(tmp_path, TMPDIR=str(long), HOME="/proc")
    command.wait_until(lambda: command.family("gcs_server"))
    (folder,) = {folder for process in command.family("gcs_server") for folder in session_folders(process)}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert answer_of(command)["facts"]["workers"] >= 1
    assert command.left(seconds=10) == []
    assert not folder.exists()


@pytest.mark.faults
@pytest.mark.timeout(300)
def test_a_ray_that_does_not_come_up_in_time_is_started_once_more(tmp_path: Path) -> None:
    """The first raylet is stopped as soon as it exists, as if the machine were busy."""
    command = try_ray(tmp_path)
    (first,) = command.wait_until(lambda: command.family("raylet/raylet"))
    first.suspend()
    assert answer_of(command)["facts"]["workers"] >= 1
    assert command.left(seconds=10) == []


@pytest.mark.faults
@pytest.mark.timeout(300)
def test_a_ray_that_never_comes_up_is_one_message_with_what_to_do(tmp_path: Path) -> None:
    command = try_ray(tmp_path)
    stopped: set[int] = set()
    while command.process.poll() is None:
        for raylet in command.family("raylet/raylet"):
            if raylet.pid not in stopped:
                raylet.suspend()
                stopped.add(raylet.pid)
        time.sleep(0.05)
    assert len(stopped) == 2
    error = answer_of(command)["error"]
    assert error.startswith("Ray does not start on this machine: The current node timed out during startup")
    assert "run the command again when the machine is less busy" in error
    assert command.left(seconds=10) == []


def test_a_stopped_fleet_starts_no_worker(start: Callable[..., Fleet]) -> None:
    fleet = start(gpus_per_worker=0, cpus_per_worker=0.5)
    fleet.ready()
    worker = begun(fleet)
    process_of(worker)
    fleet.stop()
    with pytest.raises(StoppedError):
        process_of(worker)


@pytest.mark.faults
def test_the_same_flow_on_a_cluster_gives_the_same_adapters_and_leaves_it_running(
    cluster: Cluster, finished_run: FinishedRun, prefect_api: str, tmp_path: Path
) -> None:
    """The store is new, so both train again, on half a GPU each, next to modules with our names."""
    for name in ("flows", "tasks", "pipeline"):
        (tmp_path / f"{name}.py").write_text("raise AssertionError('this is not lorafleet')", encoding="utf-8")
    compute = {"ray_address": cluster.address, "gpus_per_worker": 0.5, "cpus_per_worker": 1.0}
    path = write_config(tmp_path / "config.toml", _encoder(finished_run), finished_run.tasks, compute=compute)
    environment = {"PREFECT_API_URL": prefect_api, "RAY_AUTH_MODE": "token", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    ended = run("train", "--config", path, "--runs", "runs", cwd=tmp_path, **environment)
    assert ended.code == 0, ended.err
    manifest = read_manifest(RunFolder(tmp_path / ended.run))
    assert manifest.reused == {}
    assert manifest.adapters == read_manifest(RunFolder(finished_run.root)).adapters
    assert cluster.process.poll() is None


def _encoder(finished_run: FinishedRun) -> str:
    return read_manifest(RunFolder(finished_run.root)).config.encoder.name
