"""The early check, which finds out without Ray whether a run has anything to do."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from commands import FinishedRun, write_task

from pipeline.config import RunConfig, load_config, validate_config
from pipeline.data.catalogue import files_look_wrong
from pipeline.errors import InputError
from pipeline.records import TaskResult
from pipeline.store.files import read_record
from pipeline.store.manifest import read_manifest
from pipeline.store.run_folder import RunFolder
from tasks import early_check as module
from tasks.early_check import EarlyCheck, early_check


@pytest.fixture(autouse=True)
def begun(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """The configs whose check was begun; none is."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    found: list[RunConfig] = []
    monkeypatch.setattr(module, "EarlyCheck", found.append)
    return found


def config_of(run: FinishedRun, *overrides: str) -> RunConfig:
    return load_config(str(run.config), overrides=overrides)


@pytest.mark.parametrize("override", ["compute.workers=1", "publish.to=elsewhere"])
def test_a_run_like_the_newest_one_is_checked_ahead(
    override: str, finished_run: FinishedRun, begun: list[RunConfig]
) -> None:
    """The place of the computation and the publication are no reason to train."""
    config = config_of(finished_run, override)
    early_check(config, finished_run.runs)
    assert begun == [config]


@pytest.mark.parametrize(
    "override", ["train.seed=7", "encoder.max_tokens=20", "compute.ray_address=auto", "encoder.revision=other"]
)
def test_a_run_that_will_train_or_is_on_a_cluster_is_not(
    override: str, finished_run: FinishedRun, begun: list[RunConfig]
) -> None:
    assert early_check(config_of(finished_run, override), finished_run.runs) is None
    assert begun == []


def test_nothing_is_checked_ahead_in_an_empty_store_or_after_an_upgrade_or_on_a_cluster(
    finished_run: FinishedRun, begun: list[RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(finished_run)
    assert early_check(config, tmp_path) is None
    with monkeypatch.context() as cluster:
        cluster.setenv("RAY_ADDRESS", "127.0.0.1:6379")
        assert early_check(config, finished_run.runs) is None
    monkeypatch.setattr(module, "library_versions", lambda: {"torch": "1.0"})
    assert early_check(config, finished_run.runs) is None
    assert begun == []


def test_a_process_without_ray_finds_the_keys_that_the_workers_found(finished_run: FinishedRun) -> None:
    keys = EarlyCheck(config_of(finished_run)).keys()
    folder = RunFolder(finished_run.root)
    names = [task.name for task in read_manifest(folder).mteb_tasks]
    assert keys == {name: read_record(folder.task(name).result, TaskResult).key for name in names}


def test_what_is_wrong_with_the_data_is_raised_and_a_process_that_dies_says_nothing(
    finished_run: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data: dict[str, Any] = config_of(finished_run).model_dump()
    data["mteb_tasks"][0]["train"] = str(tmp_path / "nowhere.parquet")
    with pytest.raises(InputError, match=r"nowhere\.parquet does not exist"):
        EarlyCheck(RunConfig.model_validate(data)).keys()
    monkeypatch.setattr(module.sys, "executable", shutil.which("false"))
    assert EarlyCheck(config_of(finished_run)).keys() is None


def test_neither_what_others_print_nor_the_encoding_of_the_streams_spoils_the_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = write_task(tmp_path, "Topics")
    table = pq.read_table(task["train"]).rename_columns(["text", "catégorie"])
    pq.write_table(table, tmp_path / "train.parquet")
    entry = {"name": "Topics", "train": str(tmp_path / "train.parquet"), "label_column": "catégorie"}
    config = validate_config({"mteb_tasks": [entry], "encoder": {"name": str(tmp_path / "nowhere")}}, "test")
    (tmp_path / "sitecustomize.py").write_text("print('module loaded')\nprint(7)\n", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    with pytest.raises(InputError, match="nowhere"):
        EarlyCheck(config).keys()


def test_a_file_that_is_not_there_or_has_not_the_columns_is_seen_at_a_look(tmp_path: Path) -> None:
    task = write_task(tmp_path, "Topics")

    def looks_wrong(**changes: str) -> bool:
        return files_look_wrong(validate_config({"mteb_tasks": [task | changes]}, "test"))

    assert not looks_wrong()
    assert looks_wrong(test=str(tmp_path / "nowhere.parquet"))
    assert looks_wrong(text_column="sentence")
    assert looks_wrong(train="~nobody-of-this-name/x.csv")
    assert not looks_wrong(text_column="label", label_column="text")
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1")
    assert looks_wrong(train=str(tmp_path / "damaged.parquet"))
    for elsewhere in ("s3://lake/train.parquet", str(tmp_path / "*.parquet")):  # who reads it will see
        assert not looks_wrong(train=elsewhere)
    assert not files_look_wrong(validate_config({"mteb_tasks": [{"name": "Banking77Classification"}]}, "test"))
