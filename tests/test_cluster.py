"""A user's Ray cluster of two nodes: how workers spread, a lost node, a lost head, and a submitted job."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster import Cluster
from commands import LORAFLEET, Command
from trainings import Store, epochs_told, train_undisturbed, write_training

from pipeline.store.manifest import read_manifest
from pipeline.store.run_folder import RunFolder

EPOCHS = 12
pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def config(encoder_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two MTEB tasks that train long, one for each node."""
    return write_training(tmp_path_factory.mktemp("cluster-data"), encoder_folder("bert"), "One", "Two", epochs=EPOCHS)


@pytest.fixture(scope="module")
def undisturbed(config: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return train_undisturbed(config, tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path)
    yield cluster
    cluster.stop()


def store_on(cluster: Cluster, cwd: Path, config: Path, api: str) -> Store:
    return Store(cwd, config, PREFECT_API_URL=api, RAY_ADDRESS=cluster.address, **cluster.environment)


@pytest.mark.timeout(600)
def test_a_node_that_is_lost_in_the_middle_of_a_training_costs_its_worker_an_epoch_and_nothing_else(
    cluster: Cluster, config: Path, undisturbed: dict[str, str], prefect_api: str, tmp_path: Path
) -> None:
    store = store_on(cluster, tmp_path, config, prefect_api)
    command = store.start_in_the_middle()
    assert len(cluster.nodes_at_work()) == 2
    cluster.kill_node()
    ended = command.wait()
    assert store.adapters(ended) == undisturbed
    assert ended.err.count("its worker died") == 1
    for name in ("One", "Two"):
        assert store.epochs(ended, name) == list(range(1, EPOCHS + 1))
        assert epochs_told(ended.err, name) == sorted(set(epochs_told(ended.err, name)))
    assert cluster.process.poll() is None


@pytest.mark.timeout(600)
def test_a_head_that_is_restarted_ends_the_run_with_a_message_and_the_next_start_goes_on(
    cluster: Cluster, config: Path, undisturbed: dict[str, str], prefect_api: str, tmp_path: Path
) -> None:
    store = store_on(cluster, tmp_path, config, prefect_api)
    command = store.start_in_the_middle()
    cluster.restart_head()
    ended = command.wait(seconds=60)
    assert ended.code != 0
    assert "accessing GCS after it has restarted" in ended.err  # Ray's words, and Ray ends the process
    cluster.complete()
    again = store.start().wait()
    assert store.adapters(again) == undisturbed
    for name in ("One", "Two"):
        assert epochs_told(again.err, name)[0] > 1


@pytest.mark.timeout(600)
def test_a_submitted_job_trains_on_the_cluster_that_it_was_submitted_to(
    config: Path, undisturbed: dict[str, str], prefect_api: str, tmp_path: Path
) -> None:
    """The config names no address: the job's environment does."""
    cluster = Cluster(tmp_path, dashboard=True)
    try:
        store = Store(tmp_path, config)
        train = (*LORAFLEET, "train", "--config", config, "--runs", store.runs)
        submit = (
            "submit",
            "--address",
            cluster.dashboard,
            "--runtime-env-json",
            json.dumps({"env_vars": {"PREFECT_API_URL": prefect_api}}),
        )
        ray = (str(Path(sys.executable).with_name("ray")), "job")
        command = Command(*submit, "--", *train, program=ray, cwd=tmp_path, **cluster.environment)
        command.wait_until(store.in_the_middle)
        assert len(cluster.nodes_at_work()) == 2
        assert len(cluster.processes("gcs_server")) == 1
        ended = command.wait()
        assert ended.code == 0, ended.out + ended.err
        assert "succeeded" in ended.out + ended.err
        (manifest,) = store.runs.glob("*/manifest.json")
        assert read_manifest(RunFolder(manifest.parent)).adapters == undisturbed
    finally:
        cluster.stop()
