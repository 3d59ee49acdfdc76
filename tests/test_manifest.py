"""Inputs of a key, and what counts as finished."""

from __future__ import annotations

import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from builders import CPU_FLOAT32, ENCODER, WHEN, finished_run, task_result

import pipeline
from pipeline.config import RunConfig, validate_config
from pipeline.errors import DataError
from pipeline.records import EncoderRef, Failure, MtebTask, Runtime
from pipeline.store.finished import find_finished, find_unchanged, finished_runs, latest_results
from pipeline.store.key import imported_files, sources_sha256, task_key
from pipeline.store.lock import oldest_first
from pipeline.store.manifest import RunManifest, read_manifest, write_manifest
from pipeline.store.run_folder import RunFolder

PIPELINE = Path(pipeline.__file__).parent
TASK = MtebTask(
    name="Topics",
    source="files",
    location="a",
    test_location="b",
    revision="sha256:1",
    max_epochs=3,
    samples_per_label=8,
)
KEY = "d" * 64


def config(**sections: dict[str, Any]) -> RunConfig:
    return validate_config({"mteb_tasks": [{"name": "Topics", "train": "a", "test": "b"}], **sections}, "test")


def key(**changes: Any) -> str:
    given: dict[str, Any] = {
        "mteb_task": TASK,
        "fingerprint": "f",
        "encoder": ENCODER,
        "runtime": CPU_FLOAT32,
        "versions": {"torch": "1"},
    }
    settings = changes.pop("config", {})
    return task_key(config(**settings), **given | changes)


def changed(record: Any, **values: Any) -> Any:
    return type(record).model_validate(record.model_dump() | values)


@pytest.mark.parametrize(
    "changes",
    [
        {"config": {"train": {"learning_rate": 0.1}}},
        {"config": {"train": {"seed": 1}}},
        {"config": {"train": {"warm_start": "out"}}},
        {"config": {"adapter": {"rank": 4}}},
        {"config": {"evaluate": {"bootstrap_draws": 200}}},
        {"config": {"encoder": {"max_tokens": 64}}},
        {"config": {"encoder": {"pooling": "cls"}}},
        {"fingerprint": "g"},
        {"mteb_task": changed(TASK, max_epochs=4)},
        {"mteb_task": changed(TASK, objective="separation")},
        {"mteb_task": changed(TASK, loss="infonce")},
        {"mteb_task": changed(TASK, prefixes=("query: ", "passage: "))},
        {"mteb_task": changed(TASK, slices=("genre",))},
        {"encoder": changed(ENCODER, revision="sha256:2")},
        {"runtime": changed(CPU_FLOAT32, dtype="bfloat16")},
        {"versions": {"torch": "2"}},
    ],
)
def test_what_can_change_a_weight_or_a_score_changes_the_key(changes: dict[str, Any]) -> None:
    assert key(**changes) != key()


@pytest.mark.parametrize(
    "changes",
    [
        {"config": {"compute": {"workers": 7, "retries": 0, "ray_address": "auto"}}},
        {"config": {"publish": {"to": "out"}}},
        {"config": {"data": {"offline": True, "mirror": "elsewhere"}}},
        {"config": {"encoder": {"name": "elsewhere/same"}}},
        {"config": {"train": {"max_epochs": 9}}},
        {"mteb_task": changed(TASK, location="elsewhere", test_location="elsewhere too", source="mirror")},
        {"runtime": changed(CPU_FLOAT32, threads=2)},
        {"encoder": EncoderRef(name="elsewhere", public_name="other", revision=ENCODER.revision)},
    ],
)
def test_where_things_lie_and_how_the_work_is_spread_does_not(changes: dict[str, Any]) -> None:
    """``train.max_epochs`` is only the default of the task's own number, which counts."""
    assert key(**changes) == key()


def test_all_that_python_loads_for_the_workers_job_counts() -> None:
    program = (
        "import sys, pipeline.run.job\n"
        "print(*(m.__file__ for n, m in sys.modules.items() if n.split('.')[0] == 'pipeline'))"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", program], cwd=PIPELINE.parent, capture_output=True, text=True, check=True
    )
    rooms = {path for path in map(Path, loaded.stdout.split()) if path.name != "__init__.py"}
    assert len(rooms) > 20
    assert rooms <= set(imported_files())


def test_an_import_inside_a_function_counts_and_so_does_a_module_named_as_an_attribute(tmp_path: Path) -> None:
    package = tmp_path / "pipeline"
    for name, text in {
        "run/job.py": "def f():\n    from pipeline.data import late\n",
        "data/late.py": "from pipeline.records import X\n",
        "records.py": "import json\n",
        "reports/page.py": "from pipeline.records import X\n",
    }.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text, encoding="utf-8")
    assert [path.relative_to(package).as_posix() for path in imported_files(package)] == [
        "data/late.py",
        "records.py",
        "run/job.py",
    ]


def test_which_published_adapter_is_gone_on_from_does_not_count() -> None:
    assert key(config={"train": {"warm_start": "out"}}) == key(config={"train": {"warm_start": "other"}})


def test_the_code_that_trains_and_scores_counts_and_the_report_does_not(tmp_path: Path) -> None:
    copy = tmp_path / "pipeline"
    shutil.copytree(PIPELINE, copy)

    def changed_by(name: str) -> bool:
        before = sources_sha256(copy)
        sources_sha256.cache_clear()
        with (copy / name).open("a", encoding="utf-8") as file:
            file.write("# changed\n")
        return sources_sha256(copy) != before

    for name in (
        "reports/report.py",
        "reports/model_card.py",
        "publishing/hub.py",
        "run/collect.py",
        "bulk/worker.py",
        "export/export.py",
    ):
        assert not changed_by(name), name
    for name in (
        *(
            "run/job.py",
            "data/catalogue.py",
            "data/table_checks.py",
            "data/dataset.py",
            "encoder/encoder.py",
            "encoder/loading.py",
        ),
        *(
            "encoder/tokeniser.py",
            "encoder/attention.py",
            "encoder/frozen_linear.py",
            "adapter/adapter.py",
            "adapter/lora.py",
        ),
        *(
            "training/train.py",
            "training/flat_weights.py",
            "evaluation/classification.py",
            "evaluation/scores.py",
            "evaluation/probe.py",
        ),
    ):
        assert changed_by(name), name


def test_the_newest_finished_task_with_the_key_is_found_also_in_a_run_that_was_killed(tmp_path: Path) -> None:
    for name in ("20260101", "20260103", "20260102"):
        finished_run(tmp_path / name, [task_result("Topics")])
    (tmp_path / "20260103" / "manifest.json").unlink()
    ((found, (folder, result)),) = find_finished(tmp_path, {KEY}).items()
    assert (found, folder.root, result.mteb_task.name) == (KEY, tmp_path / "20260103" / "Topics", "Topics")


@pytest.mark.parametrize("file", ["result.json", "head.safetensors", "adapter_model.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "lost"])
def test_a_damaged_one_is_passed_over(file: str, damage: str, tmp_path: Path) -> None:
    for name in ("20260101", "20260102"):
        finished_run(tmp_path / name, [task_result("Topics")])
    path = tmp_path / "20260102" / "Topics" / file
    if damage == "lost":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-3])
    assert find_finished(tmp_path, {KEY})[KEY][0].root == tmp_path / "20260101" / "Topics"


def test_a_copy_that_was_cut_short_and_one_that_lacks_a_file_are_passed_over(tmp_path: Path) -> None:
    for name in ("20260101", "20260102", "20260103"):
        finished_run(tmp_path / name, [task_result("Topics")])
    (tmp_path / "20260102" / "Topics" / "labels.json").unlink()
    (tmp_path / "20260103" / "Topics").rename(tmp_path / "20260103" / ".Topics.copying")
    assert find_finished(tmp_path, {KEY})[KEY][0].root == tmp_path / "20260101" / "Topics"


def test_another_key_and_an_empty_store_hold_nothing(tmp_path: Path) -> None:
    assert find_finished(tmp_path / "nowhere", {KEY}) == {}
    finished_run(tmp_path / "20260101", [task_result("Topics")])
    assert find_finished(tmp_path, {"another"}) == {}


def run_manifest() -> RunManifest:
    return RunManifest(
        run_id="one",
        created_at=WHEN,
        config=config(),
        encoder=ENCODER,
        runtime=Runtime.model_validate(CPU_FLOAT32.model_dump()),
        mteb_tasks=(TASK,),
        adapters={"Topics": "a" * 64},
        reused={},
        failures=(),
        versions={"torch": "1"},
        lorafleet_version="0.1.0",
        sources_sha256=sources_sha256(),
        seconds=1.5,
    )


def test_a_manifest_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    write_manifest(run_manifest(), RunFolder(tmp_path))
    assert read_manifest(RunFolder(tmp_path)) == run_manifest()


def test_a_folder_without_a_manifest_is_not_a_finished_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a finished run"):
        read_manifest(RunFolder(tmp_path))


# --- which run is the newest ---


def test_runs_are_in_the_order_of_their_times_and_one_whose_time_has_not_come_is_the_oldest() -> None:
    now = datetime.now(UTC)
    times = [now + timedelta(days=days) for days in (-400, -1, 0, 1, 27_000)]
    before, yesterday, today, tomorrow, far = (f"{time:%Y%m%d-%H%M%S}-abcd" for time in times)
    assert oldest_first([far, today, before, tomorrow, yesterday]) == [tomorrow, far, before, yesterday, today]
    assert oldest_first(["copy of a run", today, "~old"]) == ["copy of a run", "~old", today]


FUTURE = "20990101-000000-abcd"


def test_a_run_from_a_clock_that_was_ahead_hides_no_newer_one(tmp_path: Path) -> None:
    """Its data and config were others; by its name it would be the newest for ever."""
    for run_id, keys in ((FUTURE, "e"), ("20260101-000000-abcd", "d")):
        result = changed(task_result("Topics"), run_id=run_id, key=keys * 64)
        finished_run(tmp_path / run_id, [result], run_id=run_id)
    found = find_unchanged(tmp_path, {"Topics": KEY})
    assert found is not None
    assert found.root.name == "20260101-000000-abcd"
    assert latest_results(tmp_path, ["Topics"])["Topics"].run_id == "20260101-000000-abcd"
    assert [folder.root.name for folder, _ in finished_runs(tmp_path)] == ["20260101-000000-abcd", FUTURE]


def test_what_only_a_run_from_the_future_has_finished_is_found_all_the_same(tmp_path: Path) -> None:
    finished_run(tmp_path / FUTURE, [task_result("Topics")], run_id=FUTURE)
    assert find_finished(tmp_path, {KEY})[KEY][0].root == tmp_path / FUTURE / "Topics"
    finished_run(tmp_path / "20260101-000000-abcd", [task_result("Topics")])
    assert find_finished(tmp_path, {KEY})[KEY][0].root == tmp_path / "20260101-000000-abcd" / "Topics"


# --- nothing to do ---


def test_the_newest_run_of_these_tasks_is_unchanged_if_it_holds_exactly_them_for_these_keys(tmp_path: Path) -> None:
    for name, tasks in (("20260101", ["Topics", "Pairs"]), ("20260102", ["Topics", "Pairs"]), ("20260103", ["Else"])):
        finished_run(tmp_path / name, [task_result(task) for task in tasks], run_id=name)
    found = find_unchanged(tmp_path, {"Topics": KEY, "Pairs": KEY})
    assert found is not None
    assert found.root.name == "20260102"
    assert find_unchanged(tmp_path, {"Topics": KEY}) is None  # a run of fewer tasks has another table
    assert find_unchanged(tmp_path, {"Topics": KEY, "Pairs": "e" * 64}) is None
    assert find_unchanged(tmp_path, {"Nobody": KEY}) is None


def test_an_older_run_of_the_same_inputs_does_not_count_once_they_were_others(tmp_path: Path) -> None:
    """Data that were changed and changed back: what is published by now came from the run between."""
    finished_run(tmp_path / "20260101", [task_result("Topics")])
    between = finished_run(tmp_path / "20260102", [task_result("Topics")])
    path = between.task("Topics").result
    path.write_text(path.read_text(encoding="utf-8").replace(KEY, "e" * 64), encoding="utf-8")
    assert find_unchanged(tmp_path, {"Topics": KEY}) is None


@pytest.mark.parametrize("file", ["labels.json", "head.safetensors", "result.json"])
def test_a_damaged_run_is_not_unchanged(file: str, tmp_path: Path) -> None:
    finished_run(tmp_path / "20260101", [task_result("Topics")])
    (tmp_path / "20260101" / "Topics" / file).unlink()
    assert find_unchanged(tmp_path, {"Topics": KEY}) is None


def test_a_run_with_a_failure_is_not_unchanged(tmp_path: Path) -> None:
    failure = Failure(mteb_task="Pairs", stage="train", reason="killed")
    finished_run(tmp_path / "20260101", [task_result("Topics")], failures=[failure])
    assert find_unchanged(tmp_path, {"Topics": KEY}) is None
    assert find_unchanged(tmp_path, {"Topics": KEY, "Pairs": KEY}) is None


def test_what_is_known_of_a_task_is_that_of_its_newest_finished_run(tmp_path: Path) -> None:
    for name, tasks in (("20260101", ["Topics", "Pairs"]), ("20260102", ["Topics"]), ("20260103", ["Topics"])):
        finished_run(tmp_path / name, [changed(task_result(task), run_id=name) for task in tasks], run_id=name)
    (tmp_path / "20260103" / "manifest.json").unlink()
    assert {name: result.run_id for name, result in latest_results(tmp_path, ["Topics", "Pairs", "None"]).items()} == {
        "Topics": "20260102",
        "Pairs": "20260101",
    }
