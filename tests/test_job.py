"""One MTEB task's job: it works on what was checked, and does nothing twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import write_config, write_task

from pipeline.config import load_config
from pipeline.encoder import choose_runtime
from pipeline.errors import DataError, EncoderError
from pipeline.job import TaskJob
from pipeline.plan import JobSpec, job_spec
from pipeline.preflight import preflight

Folders = Callable[[str], Path]


@pytest.fixture
def spec(encoder_folder: Folders, tmp_path: Path) -> JobSpec:
    """Checked, and ready to be worked on."""
    evaluate = {"columns": ["frozen_full_data", "head"]}
    config = load_config(
        str(write_config(tmp_path / "c.toml", encoder_folder("bert"), [write_task(tmp_path, "Topics", num_train=60)], evaluate=evaluate))
    )
    plan = preflight(config, choose_runtime(config.train, threads=1, use_gpu=False))
    (task,) = plan.tasks
    return job_spec(plan, task, run_id="one", runs=tmp_path / "runs")


def changed(spec: JobSpec, **values: Any) -> JobSpec:
    return JobSpec.model_validate(spec.model_dump() | values)


def test_data_that_changed_after_they_were_checked_are_refused(spec: JobSpec, tmp_path: Path) -> None:
    write_task(tmp_path, "Topics", num_train=60, seed=9)
    with pytest.raises(DataError, match=r"Topics: its data are not those that this run has checked; start it again"):
        TaskJob(spec).load()


def test_an_encoder_that_changed_after_it_was_checked_is_refused(spec: JobSpec) -> None:
    with pytest.raises(EncoderError, match=r"is sha256:\w+ now, and was sha256:0 when this run checked it; start it again"):
        TaskJob(changed(spec, encoder_revision="sha256:0")).load()


@pytest.mark.faults
def test_a_worker_that_died_after_its_last_file_has_finished(spec: JobSpec) -> None:
    result = TaskJob(spec).finish()
    folder = TaskJob(spec).folder
    written = {path: path.stat().st_mtime_ns for path in folder.root.iterdir()}
    assert TaskJob(spec).finish() == result
    assert {path: path.stat().st_mtime_ns for path in folder.root.iterdir()} == written
    folder.head.write_bytes(b"cut")
    assert TaskJob(spec).finish().adapter == result.adapter  # trained again, to the same bits
