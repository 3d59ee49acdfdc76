"""A bulk job from S3 to S3, against moto's server on this machine: killed, and started again."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import PLANTED, Command, Ended, FinishedRun, run, write_bulk_input

from pipeline.config import load_config

SECRET = "wJalrXUtnFEMI-this-is-no-key-of-anybody"
UNITS = 12


@dataclass(frozen=True)
class Lake:
    """A bucket with Parquet in it, and the command that labels it."""

    cwd: Path
    fs: Any
    environment: dict[str, str]
    options: tuple[str, ...]
    server: subprocess.Popen[bytes]

    def start(self, *arguments: str, **environment: str) -> Command:
        """``lorafleet classify``."""
        given = self.environment | {"PYTHONPATH": str(PLANTED)} | environment
        return Command(
            "classify", *arguments, "--rows-per-unit", "20", "--cpus", "1", *self.options, cwd=self.cwd, **given
        )

    def objects(self, folder: str) -> dict[str, bytes]:
        """Name -> content of all that can be seen."""
        self.fs.invalidate_cache()
        found = self.fs.find(f"lake/{folder}")
        # Attempts come and go, and while there is nothing else s3fs may name the folder itself.
        found = [path for path in found if path.startswith(f"lake/{folder}/") and "/_attempts/" not in path]
        return {path.removeprefix(f"lake/{folder}/"): self.fs.cat_file(path) for path in found}

    def units(self, folder: str) -> dict[str, bytes]:
        """Those objects that are a unit's output."""
        return {name: content for name, content in self.objects(folder).items() if not name.startswith("_")}


@contextmanager
def serve_lake(cwd: Path, finished_run: FinishedRun, prefect_api: str) -> Iterator[Lake]:
    """A server of its own, with three files of 80 rows."""
    import s3fs

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with (cwd / "server.log").open("wb") as log:
        command = [sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", str(port)]
        server = subprocess.Popen(command, stdout=log, stderr=log, cwd=cwd)
    address = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 120
    while True:
        try:
            urllib.request.urlopen(address, timeout=5).close()
            break
        except (urllib.error.URLError, OSError):
            assert server.poll() is None, (cwd / "server.log").read_text()
            assert time.monotonic() < deadline, "moto's server did not answer"
            time.sleep(0.1)
    fs = s3fs.S3FileSystem(endpoint_url=address, key="somebody", secret=SECRET)
    fs.mkdir("lake")
    folder = write_bulk_input(cwd / "in", num_files=3, rows=80, group=20)
    for path in folder.iterdir():
        fs.put_file(str(path), f"lake/in/day={path.stem[-1]}/{path.name}")
    keys = {"AWS_ACCESS_KEY_ID": "somebody", "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1"}
    environment = keys | {"AWS_ENDPOINT_URL": address, "PREFECT_API_URL": prefect_api}
    encoder = load_config(str(finished_run.config)).encoder.name
    yield Lake(
        cwd, fs, environment, ("--adapter", f"{finished_run.root}#Topics", "--encoder", encoder, "--offline"), server
    )
    server.kill()
    server.wait()


@pytest.fixture(scope="module")
def lake(finished_run: FinishedRun, prefect_api: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lake]:
    with serve_lake(tmp_path_factory.mktemp("s3"), finished_run, prefect_api) as lake:
        yield lake


@pytest.fixture(scope="module")
def undisturbed(lake: Lake) -> Path:
    """The output of the same job on local files, of the same adapter."""
    arguments = ("classify", "in", "out", "--where", "process", "--rows-per-unit", "20", "--cpus", "1", *lake.options)
    ended = run(*arguments, cwd=lake.cwd, **lake.environment)
    assert ended.code == 0, ended.err
    return lake.cwd / "out"


def check_secret(lake: Lake, folder: str, *all_ended: Ended) -> None:
    for ended in all_ended:
        assert SECRET not in ended.out + ended.err
        assert "Traceback" not in ended.err
    assert not any(SECRET.encode() in content for content in lake.objects(folder).values())


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_a_job_on_s3_is_killed_on_ray_and_ended_by_the_next_start(lake: Lake, undisturbed: Path) -> None:
    killed = lake.start("s3://lake/in", "s3://lake/out", "--where", "ray")
    seen: dict[str, bytes] = {}
    while len(seen) < 3:
        seen = killed.wait_until(lambda: lake.units("out"))
        for content in seen.values():
            pq.read_table(pa.BufferReader(content))  # whatever can be seen is whole
    killed.kill("flows.cli")
    ended_first = killed.wait()
    assert ended_first.code == -signal.SIGKILL
    assert killed.left(seconds=20, but=("ray::DashboardAgent", "ray::RuntimeEnvAgent")) == []
    seen = lake.units("out")
    assert len(seen) < UNITS

    ended = lake.start("s3://lake/in", "s3://lake/out", "--where", "process", PLANTED_SECONDS="0").wait()
    assert ended.code == 0, ended.err
    assert ended.out.splitlines()[-1] == "output: s3://lake/out"
    objects = lake.objects("out")
    names = [(file, f"part-{file}-{unit:05d}.parquet") for file in range(3) for unit in range(UNITS // 3)]
    units = {f"day={file}/{name}": undisturbed / name for file, name in names}
    assert sorted(objects) == sorted(["_SUCCESS", "_job.json", "_plan.json", *units])
    assert not lake.fs.exists("lake/out/_attempts")
    for name, local in units.items():
        assert pq.ParquetFile(pa.BufferReader(objects[name])).read().equals(pq.ParquetFile(local).read())
        assert name not in seen or objects[name] == seen[name]
    facts = json.loads(objects["_job.json"])
    assert (facts["rows_out"], facts["units_done_before"], facts["failures"]) == (240, len(seen), 0)
    check_secret(lake, "out", ended_first, ended)


@pytest.mark.faults
def test_another_job_takes_the_place_of_one_on_s3_when_asked(lake: Lake) -> None:
    arguments = ("s3://lake/in/day=0/*.parquet", "s3://lake/twice", "--where", "process")
    assert lake.start(*arguments, PLANTED_SECONDS="0").wait().code == 0
    ended = lake.start(*arguments, "--top-k", "2", "--overwrite", PLANTED_SECONDS="0").wait()
    assert ended.code == 0, ended.err
    after = lake.units("twice")
    assert all("Topics_top_k" in pq.read_schema(pa.BufferReader(content)).names for content in after.values())
    assert sorted(lake.objects("twice")) == sorted(["_SUCCESS", "_job.json", "_plan.json", *after])
    assert len(after) == 4
    check_secret(lake, "twice", ended)


@pytest.mark.faults
@pytest.mark.parametrize("where", ["process", "ray"])
def test_an_s3_that_is_lost_stops_the_job_with_what_was_finished(
    where: str, finished_run: FinishedRun, prefect_api: str, tmp_path: Path
) -> None:
    with serve_lake(tmp_path, finished_run, prefect_api) as lake:
        job = lake.start("s3://lake/in", "s3://lake/out", "--where", where, AWS_MAX_ATTEMPTS="2")
        job.wait_until(lambda: len(lake.units("out")) >= 2)
        lake.server.kill()
        ended = job.wait(seconds=120)
    assert ended.code == 1, ended.err
    assert "Traceback" not in ended.err
    assert re.search(
        r"error: stopped: output s3://lake/out: .*; fix that and run the command again, \d+ of 12 units are kept",
        ended.err,
    )
    assert SECRET not in ended.out + ended.err


@pytest.mark.parametrize(
    ("arguments", "changes", "words"),
    [
        (
            ("s3://nowhere/in", "s3://lake/bad"),
            {},
            "input s3://nowhere/in: cannot be read: The specified bucket does not exist",
        ),
        (("s3://lake/in", "s3://lake/in/out"), {}, "lies inside the input"),
        (("s3://lake/in", "s3://nowhere/out"), {}, "s3://nowhere/out"),
        (
            ("s3://lake/in", "s3://lake/bad"),
            {"AWS_ENDPOINT_URL": "http://127.0.0.1:1", "AWS_MAX_ATTEMPTS": "1"},
            "s3://lake/in",
        ),
        (
            ("s3://lake/in", "s3://lake/bad"),
            {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "AWS_EC2_METADATA_DISABLED": "true"},
            "credentials",
        ),
    ],
    ids=["no such bucket", "output inside input", "no such bucket to write to", "nobody answers", "no key"],
)
@pytest.mark.faults
def test_what_s3_refuses_is_one_message(
    arguments: tuple[str, ...], changes: dict[str, str], words: str, lake: Lake
) -> None:
    ended = lake.start(*arguments, "--where", "process", PLANTED_SECONDS="0", **changes).wait()
    assert ended.code == 2, ended.err
    assert words in ended.err
    assert ended.out == ""
    check_secret(lake, "bad", ended)
