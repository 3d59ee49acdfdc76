"""Kill anything of a bulk job at any time: in the end every row is there once, labelled as if nothing had happened."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
from commands import PLANTED, Command, Ended, FinishedRun, bulk_rows, run, write_bulk_input

from pipeline.config import load_config

NUM_FILES, ROWS, GROUP = 10, 80, 20
UNITS = NUM_FILES * ROWS // GROUP
ON_CLUSTER = {"RAY_AUTH_MODE": "token", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
CLUSTER = """
import sys
from ray.cluster_utils import Cluster
head = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 100 * 2**20}
cluster = Cluster(initialize_head=True, head_node_args=head)
print(cluster.address, flush=True)
for line in sys.stdin:
    node = cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
    print(node.all_processes["raylet"][0].process.pid, flush=True)
"""


class Cluster:
    """A Ray of two nodes with one CPU each, on this machine; the second node may be killed."""

    def __init__(self, cwd: Path) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        environment |= ON_CLUSTER | {
            "PYTHONPATH": str(PLANTED),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_health_check_failure_threshold": "2",
        }
        with (cwd / "cluster.err").open("wb") as err:
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": err, "text": True}
            self.process = subprocess.Popen([sys.executable, "-c", CLUSTER], env=environment, cwd=cwd, **pipes)
        self.address = self._line()
        self._node: psutil.Process | None = None

    def actors(self) -> list[psutil.Process]:
        """The processes in which units are labelled."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if (
                    any("ray::MapWorker" in part for part in process.cmdline())
                    and process.status() != psutil.STATUS_ZOMBIE
                ):
                    found.append(process)
        return found

    def complete(self) -> None:
        """Have two nodes."""
        if self._node is None:
            assert self.process.stdin is not None
            self.process.stdin.write("add\n")
            self.process.stdin.flush()
            self._node = psutil.Process(int(self._line()))

    def kill_node(self) -> None:
        """``kill -9`` of the second node's raylet; its workers follow it."""
        assert self._node is not None
        self._node.kill()
        self._node = None

    def stop(self) -> None:
        """End all of it."""
        family = [*psutil.Process(self.process.pid).children(recursive=True), psutil.Process(self.process.pid)]
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


@dataclass(frozen=True)
class Bench:
    """A place to start and kill bulk jobs."""

    cwd: Path
    api: str
    options: tuple[str, ...]

    def start(self, output: str, *arguments: str, source: str = "in", **environment: str) -> Command:
        """``lorafleet classify`` on Ray."""
        environment |= {"PREFECT_API_URL": self.api, "PYTHONPATH": str(PLANTED)}
        options = ("--where", "ray", "--cpus", "1", "--rows-per-unit", str(GROUP), *self.options)
        return Command("classify", source, output, *options, *arguments, cwd=self.cwd, **environment)

    def done(self, output: str) -> int:
        """Units with output."""
        return len(list((self.cwd / output).glob("*-*.parquet")))


@pytest.fixture(scope="module")
def bench(finished_run: FinishedRun, prefect_api: str, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    cwd = tmp_path_factory.mktemp("bulk-faults")
    write_bulk_input(cwd / "in", num_files=NUM_FILES, rows=ROWS, group=GROUP)
    adapters = [part for task in ("Topics", "Pairs") for part in ("--adapter", f"{finished_run.root}#{task}")]
    options = (*adapters, "--encoder", load_config(str(finished_run.config)).encoder.name, "--offline")
    return Bench(cwd, prefect_api, options)


@pytest.fixture(scope="module")
def undisturbed(bench: Bench) -> Path:
    """The output of the same job in one process, without a fault."""
    options = ("--where", "process", "--cpus", "1", "--rows-per-unit", str(GROUP), *bench.options)
    ended = run("classify", "in", "undisturbed", *options, cwd=bench.cwd, PREFECT_API_URL=bench.api)
    assert ended.code == 0, ended.err
    return bench.cwd / "undisturbed"


@pytest.fixture(scope="module")
def started_cluster(bench: Bench) -> Iterator[Cluster]:
    cluster = Cluster(bench.cwd)
    yield cluster
    cluster.stop()


@pytest.fixture
def cluster(started_cluster: Cluster) -> Cluster:
    """With two nodes."""
    started_cluster.complete()
    return started_cluster


def on(cluster: Cluster) -> tuple[str, ...]:
    return ("--ray-address", cluster.address)


def check_whole(output: Path, undisturbed: Path) -> dict[str, Any]:
    """Every row once and labelled as ever, and nothing else in the folder; returns the summary."""
    assert bulk_rows(output).equals(bulk_rows(undisturbed))
    found = sorted(path.relative_to(output).as_posix() for path in output.rglob("*"))
    assert found == sorted(path.relative_to(undisturbed).as_posix() for path in undisturbed.rglob("*"))
    facts: dict[str, Any] = json.loads((output / "_job.json").read_text())
    assert (facts["rows_in"], facts["rows_out"], facts["failures"]) == (NUM_FILES * ROWS, NUM_FILES * ROWS, 0)
    return facts


def test_a_job_in_one_process_goes_on_where_it_was_killed(bench: Bench, undisturbed: Path) -> None:
    job = bench.start("one", "--where", "process")
    job.wait_until(lambda: bench.done("one") >= 2)
    job.kill("flows.cli")
    assert job.wait().code == -signal.SIGKILL
    done = bench.done("one")
    assert 2 <= done < UNITS
    ended = bench.start("one", "--where", "process").wait()
    assert ended.code == 0, ended.err
    assert check_whole(bench.cwd / "one", undisturbed)["units_done_before"] >= done


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_a_job_survives_the_kill_of_an_actor_of_a_node_and_of_its_driver(
    bench: Bench, cluster: Cluster, undisturbed: Path
) -> None:
    """One after the other; the first two in one start, which goes on by itself."""
    job = bench.start("killed", *on(cluster), **ON_CLUSTER)
    job.wait_until(lambda: bench.done("killed") >= 2)
    cluster.actors()[0].kill()
    for kill in (cluster.kill_node, lambda: job.kill("flows.cli")):
        before = bench.done("killed")
        job.wait_until(lambda before=before: bench.done("killed") >= before + 4)
        kill()
    assert job.wait().code == -signal.SIGKILL
    done = bench.done("killed")
    assert 10 <= done < UNITS

    ended = bench.start("killed", *on(cluster), **ON_CLUSTER).wait()
    assert ended.code == 0, ended.err
    assert check_whole(bench.cwd / "killed", undisturbed)["units_done_before"] >= done


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_units_that_kill_their_worker_or_ask_for_too_much_memory_end_in_quarantine(
    bench: Bench, cluster: Cluster
) -> None:
    write_bulk_input(
        bench.cwd / "bad",
        num_files=2,
        rows=3 * GROUP,
        group=GROUP,
        changes={GROUP + 3: "poison", 4 * GROUP + 3: "flood"},
    )
    ended = bench.start("bad-out", *on(cluster), source="bad", **ON_CLUSTER).wait()
    assert ended.code == 1, ended.err
    assert "Traceback" not in ended.err
    assert "poison" not in ended.err + ended.out
    output = bench.cwd / "bad-out"
    reasons = {row["unit"]: row["reason"] for row in pq.read_table(output / "_failures.parquet").to_pylist()}
    assert reasons == {1: "killed the worker 3 times", 4: "out of memory; choose a smaller --rows-per-unit"}
    bad = {*range(GROUP, 2 * GROUP), *range(4 * GROUP, 5 * GROUP)}
    assert bulk_rows(output).column("id").to_pylist() == [id for id in range(6 * GROUP) if id not in bad]
    names = sorted(path.relative_to(output).as_posix() for path in output.rglob("*"))
    units = [f"part-{unit // 3}-{unit % 3:05d}.parquet" for unit in (0, 2, 3, 5)]
    assert names == ["_failures.parquet", "_job.json", "_plan.json", *units]


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_a_unit_that_kills_the_whole_process_is_left_out_by_the_fourth_start(bench: Bench) -> None:
    write_bulk_input(bench.cwd / "deadly", num_files=1, rows=3 * GROUP, group=GROUP, changes={GROUP + 3: "poison"})
    codes = []
    for _ in range(5):
        ended = bench.start("deadly-out", "--where", "process", source="deadly").wait()
        codes.append(ended.code)
    assert codes == [-signal.SIGKILL] * 3 + [1, -signal.SIGKILL]  # the one after it tries again
    assert (bench.cwd / "deadly-out" / "part-0-00002.parquet").exists()


@pytest.mark.faults
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "victim", [("flows.cli",), ("raylet/raylet",), ("gcs_server",), ("gcs_server", "raylet/raylet")]
)
def test_a_job_on_a_ray_of_its_own_goes_on_where_it_was_killed(
    victim: tuple[str, ...], bench: Bench, undisturbed: Path
) -> None:
    output = "-".join(["local", *victim]).replace("/", "-")
    job = bench.start(output)
    job.wait_until(lambda: bench.done(output) >= 4)
    job.kill(*victim)
    ended = job.wait(seconds=120)
    assert ended.code in (1, -signal.SIGKILL), ended.err
    assert job.left(seconds=20, but=("ray::DashboardAgent", "ray::RuntimeEnvAgent")) == []
    done = bench.done(output)
    assert done < UNITS
    ended = bench.start(output).wait()
    assert ended.code == 0, ended.err
    assert check_whole(bench.cwd / output, undisturbed)["units_done_before"] == done


@pytest.mark.faults
@pytest.mark.timeout(1800)
def test_twenty_kills_at_random_moments_change_nothing(bench: Bench, cluster: Cluster, undisturbed: Path) -> None:
    """The kills hit actors, the second node and drivers, over as many jobs as it takes."""
    chance = random.Random(20)
    kills = ["actor"] * 9 + ["node"] * 4 + ["driver"] * 7
    chance.shuffle(kills)
    jobs = 0
    while kills:
        jobs += 1
        check = _disturbed(bench, cluster, f"soak-{jobs}", kills, chance)
        assert check.code == 0, check.err
        check_whole(bench.cwd / f"soak-{jobs}", undisturbed)


def _disturbed(bench: Bench, cluster: Cluster, output: str, kills: list[str], chance: random.Random) -> Ended:
    """One job to its end, started again as often as needed; takes its kills off the list."""
    for _ in range(30):
        cluster.complete()
        job = bench.start(output, *on(cluster), **ON_CLUSTER)
        while kills and _comes_further(job, bench, output, cluster):
            time.sleep(chance.uniform(0, 3))
            if job.process.poll() is not None:
                break
            _kill(kills.pop(), job, cluster, chance)
        ended = job.wait()
        if ended.code == 0:
            return ended
        assert ended.code == -signal.SIGKILL or "killed the worker 3 times" in ended.err, ended.err
    raise AssertionError(f"{output} does not come to its end")


def _comes_further(job: Command, bench: Bench, output: str, cluster: Cluster) -> bool:
    """Wait for a few more units; false if the command ends before."""
    before = bench.done(output)
    deadline = time.monotonic() + 150
    while bench.done(output) < before + 3 or not cluster.actors():
        if job.process.poll() is not None:
            return False
        assert time.monotonic() < deadline, "no unit was finished in a long time"
        time.sleep(0.1)
    return True


def _kill(what: str, job: Command, cluster: Cluster, chance: random.Random) -> None:
    killers: dict[str, Callable[[], None]] = {"driver": lambda: job.kill("flows.cli"), "node": cluster.kill_node}
    if what == "actor":
        with contextlib.suppress(psutil.NoSuchProcess, IndexError):
            chance.choice(cluster.actors()).kill()
    else:
        cluster.complete()
        killers[what]()
