"""The files of a run, made from results: corrected p-values, reused tasks, and the order of writing."""

from __future__ import annotations

from pathlib import Path

import pytest
from builders import CPU_FLOAT32, ENCODER, MINILM_MODULES, WHEN, finished_run, task_result

from pipeline.config import load_config
from pipeline.history.tables import read_history, read_scores
from pipeline.records import ClassificationResults, Comparison, Failure, TaskResult
from pipeline.run.collect import collect, finish_run, reuse
from pipeline.run.outputs import correct_over_tasks
from pipeline.run.plan import Plan
from pipeline.store.files import read_record
from pipeline.store.manifest import read_manifest, write_config
from pipeline.store.run_folder import RunFolder, adapter_sha256


def with_p_value(name: str, p_value: float | None) -> TaskResult:
    result = task_result(name)
    comparison = None if p_value is None else Comparison(only_head=1, only_probe=1, p_value=p_value)
    return TaskResult.model_validate(result.model_dump() | {"comparison": comparison})


def corrected(*p_values: float | None) -> list[float | None]:
    results = correct_over_tasks([with_p_value(f"T{i}", p) for i, p in enumerate(p_values)])
    return [row.p_value_holm for result in results for row in result.scores if row.column == "head"]


def test_p_values_are_corrected_over_the_tasks_that_have_one() -> None:
    assert corrected(0.01, 0.04, 0.03) == pytest.approx([0.03, 0.06, 0.06])
    assert corrected(0.01, None, 0.04) == [pytest.approx(0.02), None, pytest.approx(0.04)]
    assert corrected(0.01) == [0.01]


def test_the_p_value_of_the_main_metric_is_corrected_by_itself() -> None:
    """One task is judged by macro-F1; McNemar's p-values are corrected over all tasks as ever."""
    by_macro_f1 = Comparison(
        only_head=1, only_probe=1, p_value=0.5, main_metric="macro_f1", macro_f1_gain=0.1, macro_f1_p_value=0.001
    )
    first, second = with_p_value("A", 0.04), with_p_value("B", 0.5)
    results = correct_over_tasks([first, TaskResult.model_validate(second.model_dump() | {"comparison": by_macro_f1})])
    heads = [row for result in results for row in result.scores if row.column == "head"]
    assert [row.p_value_holm for row in heads] == pytest.approx([0.08, 0.5])
    assert [row.p_value_main_holm for row in heads] == pytest.approx([0.04, 0.002])


def test_a_reused_task_keeps_its_times_and_names_the_run_that_trained_it(tmp_path: Path) -> None:
    first = finished_run(tmp_path / "one", [task_result("Topics")])
    original = read_record(first.task("Topics").result, TaskResult)
    second = reuse(first.task("Topics"), original, run_id="two", folder=RunFolder(tmp_path / "two"))
    assert (second.run_id, second.reused_from) == ("two", original.run_id)
    assert {(row.run_id, row.reused_from, row.created_at) for row in second.scores} == {("two", original.run_id, WHEN)}
    assert read_record(tmp_path / "two" / "Topics" / "result.json", TaskResult) == second
    assert adapter_sha256(tmp_path / "two" / "Topics") == original.adapter.sha256
    third = reuse(
        RunFolder(tmp_path / "two").task("Topics"), second, run_id="three", folder=RunFolder(tmp_path / "three")
    )
    assert (third.run_id, third.reused_from) == ("three", original.run_id)
    assert {row.reused_from for row in third.scores} == {original.run_id}


def test_a_copy_that_a_kill_cut_short_is_made_again(tmp_path: Path) -> None:
    first = finished_run(tmp_path / "one", [task_result("Topics")])
    (tmp_path / "two" / ".Topics.copying").mkdir(parents=True)
    (tmp_path / "two" / ".Topics.copying" / "half").write_text("half")
    reuse(
        first.task("Topics"),
        read_record(first.task("Topics").result, TaskResult),
        run_id="two",
        folder=RunFolder(tmp_path / "two"),
    )
    assert [path.name for path in (tmp_path / "two").iterdir()] == ["Topics"]
    assert not (tmp_path / "two" / "Topics" / "half").exists()


def test_collect_writes_all_but_the_manifest_and_finish_enters_the_history_before_it(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "runs" / "one", [task_result("A"), task_result("B")])
    results = [
        TaskResult.model_validate(
            r.model_dump() | {"run_id": "one", "scores": [row.model_dump() | {"run_id": "one"} for row in r.scores]}
        )
        for r in (read_record(run.task(name).result, TaskResult) for name in "AB")
    ]
    failures = [Failure(mteb_task="C", stage="train", reason="it did not want to")]
    for path in (run.manifest, *run.published()):
        path.unlink()
    plan = Plan(load_config("quickstart"), ENCODER, MINILM_MODULES, CPU_FLOAT32, ())
    summary, rows = collect(plan, results, failures, run_id="one", folder=run)
    assert not run.manifest.exists()
    assert all(path.stat().st_size for path in run.published())
    assert read_record(run.results, ClassificationResults) == summary
    assert summary.failures == tuple(failures)
    assert read_scores(run.scores) == [row for result in rows for row in result.scores]
    assert not (tmp_path / "runs" / "metrics" / "scores-one.parquet").exists()
    finish_run(plan, rows, failures, run_id="one", folder=run, seconds=2.0)
    assert read_manifest(run).failures == tuple(failures)
    assert {row.run_id for row in read_history(tmp_path / "runs")} == {"one"}
    assert (tmp_path / "runs" / "metrics" / "scores-one.parquet").stat().st_mtime_ns <= run.manifest.stat().st_mtime_ns


@pytest.mark.parametrize("preset", ["quickstart", "mteb8"])
def test_the_written_config_is_the_config(preset: str, tmp_path: Path) -> None:
    write_config(load_config(preset), RunFolder(tmp_path))
    assert load_config(str(tmp_path / "config.toml")) == load_config(preset)
