"""One MTEB task's job: it works on what was checked, and does nothing twice."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bulk import save_bulk_adapter
from commands import write_config, write_task

from pipeline.config import RunConfig, load_config
from pipeline.encoder.runtime import choose_runtime
from pipeline.errors import AdapterError, ConfigError, DataError, EncoderError
from pipeline.run.job import TaskJob
from pipeline.run.plan import JobSpec, job_spec
from pipeline.run.preflight import preflight

Folders = Callable[[str], Path]


@pytest.fixture
def spec(encoder_folder: Folders, tmp_path: Path) -> JobSpec:
    """Checked, and ready to be worked on."""
    evaluate = {"columns": ["frozen_full_data", "head"]}
    config = load_config(
        str(
            write_config(
                tmp_path / "c.toml",
                encoder_folder("bert"),
                [write_task(tmp_path, "Topics", num_train=60)],
                evaluate=evaluate,
            )
        )
    )
    plan = preflight(config, choose_runtime(config.train, threads=1, use_gpu=False))
    (task,) = plan.tasks
    return job_spec(plan, task, run_id="one", runs=tmp_path / "runs")


def job_of(folder: Path, encoder: Path, counts: Sequence[int], **sections: Any) -> TaskJob:
    """A job on so many training texts of each label, all different, and one test text of each."""
    words = ["ship", "harbour", "wave", "sailor", "soup", "oven", "pepper", "knife", "flower", "soil", "tree", "seed"]
    rows = [
        (f"{words[number % 12]} {words[copy % 12]} label{number}", f"label{number:02}")
        for number, n in enumerate(counts)
        for copy in range(n)
    ]
    tests = {label: f"{text} old" for text, label in rows}
    entry = {"name": "Small", "train": str(folder / "train.parquet"), "test": str(folder / "test.parquet")}
    pq.write_table(
        pa.table({"text": [text for text, _ in rows], "label": [label for _, label in rows]}), entry["train"]
    )
    pq.write_table(pa.table({"text": list(tests.values()), "label": list(tests)}), entry["test"])
    config = load_config(str(write_config(folder / "c.toml", encoder, [entry], **sections)))
    plan = preflight(config, choose_runtime(config.train, threads=1, use_gpu=False))
    return TaskJob(job_spec(plan, plan.tasks[0], run_id="one", runs=folder / "runs"))


@pytest.mark.parametrize("counts", [(1, 2), (2, 2), (1, 1, 2), (3,) * 14])
def test_whatever_is_lawful_can_be_trained_however_little_it_is(
    counts: tuple[int, ...], encoder_folder: Folders, tmp_path: Path
) -> None:
    job = job_of(tmp_path, encoder_folder("bert"), counts)
    measured = dict.fromkeys(row.column for row in job.evaluate_frozen())
    assert list(measured) == ["majority", "frozen_full_data", "frozen_few_shot"]
    assert TaskJob(job.spec).evaluate_frozen() == job.evaluate_frozen(), "read back from its file"
    assert len(job.train(lambda row: None, lambda progress: None).sha256) == 64


def test_a_run_of_three_classes_that_selects_on_test_is_trained_and_evaluated(
    encoder_folder: Folders, tmp_path: Path
) -> None:
    result = job_of(tmp_path, encoder_folder("bert"), (20, 20, 20), train={"early_stopping_split": "test"}).finish()
    assert {row.selected_on for row in result.scores} == {None, "test"}
    assert result.calibration.fitted_on == "none"


def test_a_start_that_no_epoch_beats_is_a_finished_adapter_without_effect(
    encoder_folder: Folders, tmp_path: Path
) -> None:
    job = job_of(tmp_path, encoder_folder("bert"), (20, 20), train={"learning_rate": 1.0, "validation_fraction": 0.4})
    result = job.finish()
    assert (result.best_epoch, result.start_accuracy) == (0, 1.0)
    assert max(row.validation_accuracy or 0 for row in result.epochs) < 1
    accuracy = {row.column: row.accuracy for row in result.scores}
    assert accuracy["head"] == accuracy["frozen_full_data"]
    assert accuracy["adapted_few_shot"] == accuracy["frozen_few_shot"]
    frozen = {row.column: row.value for row in job.family.frozen() if row.metric == "accuracy" and row.slice is None}
    assert frozen["frozen_few_shot"] == accuracy["frozen_few_shot"]
    assert json.loads(job.folder.meta.read_text(encoding="utf-8"))["best_epoch"] == 0


def test_a_mirror_that_is_not_there_is_told_once(encoder_folder: Folders, tmp_path: Path) -> None:
    tasks = [{"name": "Banking77Classification"}, {"name": "MTOPDomainClassification"}]
    path = write_config(tmp_path / "c.toml", encoder_folder("bert"), tasks, data={"mirror": str(tmp_path / "gone")})
    config = load_config(str(path))
    with pytest.raises(DataError) as told:
        preflight(config, choose_runtime(config.train, threads=1, use_gpu=False))
    assert str(told.value).startswith(f"data.mirror: there is no folder {tmp_path / 'gone'}; expected a folder")


def test_every_fault_of_pairs_is_told_before_the_first_worker(encoder_folder: Folders, tmp_path: Path) -> None:
    """The encoder has vectors of 32 dimensions."""
    pairs = {"sentence1": ["a", "b"], "sentence2": ["c", "d"], "score": [2.0, 2.0]}
    pq.write_table(pa.table(pairs), tmp_path / "constant.parquet")
    pq.write_table(pa.table(pairs | {"genre": ["x", "y"]}), tmp_path / "extra.parquet")
    entries = [{"name": name, "train": str(tmp_path / f"{name}.parquet")} for name in ("constant", "extra")]
    config = load_config(str(write_config(tmp_path / "c.toml", encoder_folder("bert"), entries)))
    with pytest.raises(DataError) as told:
        preflight(config, choose_runtime(config.train, threads=1, use_gpu=False))
    constant, extra = told.value.args
    assert constant.startswith("constant: train has the score 2 for all 2 pairs")
    assert extra.startswith("extra: train: ")
    assert "has 'genre' beside" in extra
    path = write_config(tmp_path / "w.toml", encoder_folder("bert"), entries, train={"widths": [16, 64]})
    config = load_config(str(path))
    with pytest.raises(ConfigError, match=r"train\.widths: 64 is larger than 32"):
        preflight(config, choose_runtime(config.train, threads=1, use_gpu=False))


def test_pairs_are_planned_with_their_number_and_without_labels(encoder_folder: Folders, tmp_path: Path) -> None:
    pairs = {side: [f"{side} {i}" for i in range(40)] for side in ("query", "passage")}
    pq.write_table(pa.table(pairs), tmp_path / "a.parquet")
    entry = {"name": "Search", "train": str(tmp_path / "a.parquet")}
    config = load_config(str(write_config(tmp_path / "c.toml", encoder_folder("bert"), [entry])))
    (task,) = preflight(config, choose_runtime(config.train, threads=1, use_gpu=False)).tasks
    assert (task.num_train, task.label_names, task.mteb_task.objective) == (29, (), "retrieval")


def changed(spec: JobSpec, **values: Any) -> JobSpec:
    return JobSpec.model_validate(spec.model_dump() | values)


def test_data_that_changed_after_they_were_checked_are_refused(spec: JobSpec, tmp_path: Path) -> None:
    write_task(tmp_path, "Topics", num_train=60, seed=9)
    with pytest.raises(DataError, match=r"Topics: the data have changed since this run checked them; start it again"):
        TaskJob(spec).load()


def test_a_set_of_three_texts_for_each_of_two_labels_in_a_csv_file_ends_as_an_adapter(
    encoder_folder: Folders, tmp_path: Path
) -> None:
    """Without a test file and too small for a validation slice; through the reload in a fresh process."""
    rows = [f"{word} {number};{label}" for label, word in (("fox", "red"), ("whale", "blue")) for number in range(3)]
    (tmp_path / "a.csv").write_text("\n".join(["body;kind", *rows]), encoding="utf-8")
    entry = {"name": "Animals", "train": str(tmp_path / "a.csv"), "text_column": "body", "label_column": "kind"}
    config = load_config(str(write_config(tmp_path / "c.toml", encoder_folder("bert"), [entry])))
    plan = preflight(config, choose_runtime(config.train, threads=1, use_gpu=False))
    (task,) = plan.tasks
    result = TaskJob(job_spec(plan, task, run_id="one", runs=tmp_path / "runs")).finish()
    data, split = result.data, result.mteb_task.test_split
    assert (data.num_train, data.num_validation, data.num_test, data.num_overlap) == (4, 0, 2, 0)
    assert split is not None
    assert (split.fraction, split.seed, result.selected_on) == (0.2, 0, "last_epoch")
    assert data.notes[0].startswith("test is 2 of 6 texts of train (test_fraction 0.2, test_seed 0)")


def test_an_encoder_that_changed_after_it_was_checked_is_refused(spec: JobSpec) -> None:
    with pytest.raises(
        EncoderError, match=r"is sha256:\w+ now, and was sha256:0 when this run checked it; start it again"
    ):
        TaskJob(changed(spec, encoder_revision="sha256:0")).load()


# --- starting from an existing adapter ---


def warm(tmp_path: Path, encoder: Path, /, **sections: Any) -> RunConfig:
    """A config of ``Topics`` that goes on from the adapters in ``published``."""
    tasks, train = [write_task(tmp_path, "Topics", num_train=60)], {"warm_start": str(tmp_path / "published")}
    return load_config(str(write_config(tmp_path / "c.toml", encoder, tasks, train=train, **sections)))


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"adapter": {"rank": 4}}, "rank"),
        ({"adapter": {"alpha": 1.5}}, "alpha"),
        ({"adapter": {"layers": "last:1"}}, "adapted_modules"),
        ({"encoder": {"pooling": "cls"}}, "pooling"),
        ({"adapter": {"rank": 4, "alpha": 1.5}}, "rank and another alpha"),
    ],
)
def test_an_adapter_of_another_shape_is_not_started_from(
    sections: dict[str, Any], told: str, encoder_folder: Folders, tmp_path: Path
) -> None:
    save_bulk_adapter(tmp_path / "published" / "Topics", encoder_folder("bert"))
    config = warm(tmp_path, encoder_folder("bert"), **sections)
    (task,) = preflight(config, choose_runtime(config.train, threads=1, use_gpu=False)).tasks
    assert task.warm_start is None
    assert task.notes[-1].startswith("trained from scratch: ")
    assert task.notes[-1].endswith(f"published#Topics has another {told}")


def test_an_adapter_that_changed_after_it_was_checked_is_not_started_from(
    encoder_folder: Folders, tmp_path: Path
) -> None:
    save_bulk_adapter(tmp_path / "published" / "Topics", encoder_folder("bert"))
    config = warm(tmp_path, encoder_folder("bert"))
    plan = preflight(config, choose_runtime(config.train, threads=1, use_gpu=False))
    assert plan.tasks[0].warm_start is not None
    save_bulk_adapter(tmp_path / "published" / "Topics", encoder_folder("bert"), seed=2)
    with pytest.raises(AdapterError, match="Topics has changed since this run checked it; start it again"):
        TaskJob(job_spec(plan, plan.tasks[0], run_id="one", runs=tmp_path / "runs")).train(
            lambda row: None, lambda progress: None
        )


@pytest.mark.faults
def test_a_worker_that_died_after_its_last_file_has_finished(spec: JobSpec) -> None:
    result = TaskJob(spec).finish()
    folder = TaskJob(spec).folder
    written = {path: path.stat().st_mtime_ns for path in folder.root.iterdir()}
    assert TaskJob(spec).finish() == result
    assert {path: path.stat().st_mtime_ns for path in folder.root.iterdir()} == written
    folder.head.write_bytes(b"cut")
    assert TaskJob(spec).finish().adapter == result.adapter  # trained again, to the same bits
