"""The summary of a run, and facts about single results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime

from pipeline.history.values import find_value, values_of
from pipeline.records import (
    ClassificationResults,
    Column,
    EncoderRef,
    Failure,
    MtebTask,
    ResultsAverage,
    ResultsEntry,
    ScoreRow,
    TaskResult,
)
from pipeline.reports.formatting import percent, points, without_local_paths


def summarise(
    results: Sequence[TaskResult],
    failures: Sequence[Failure],
    *,
    encoder: EncoderRef,
    run_id: str,
    created_at: datetime,
) -> ClassificationResults:
    """Build the content of ``classification_results.json``. It contains no local path, because it is published.

    Args:
        results: Results of the finished MTEB tasks in the order of the table, with corrected p-values.
        failures: Failed MTEB tasks.
        encoder: The encoder of the run.
        run_id: Name of the run folder.
        created_at: Time of the run.
    """
    entries = tuple(_entry(result) for result in results)
    return ClassificationResults(
        encoder=EncoderRef(name=encoder.public_name, public_name=encoder.public_name, revision=encoder.revision),
        tasks=entries,
        average=ResultsAverage(
            baseline_accuracy=_mean(e.baseline_accuracy for e in entries),
            lora_accuracy=_mean(e.lora_accuracy for e in entries),
            delta=_mean(e.delta for e in entries),
            full_data_probe_accuracy=_mean(e.full_data_probe_accuracy for e in entries),
            head_accuracy=_mean(e.head_accuracy for e in entries),
        ),
        failures=tuple(
            Failure(mteb_task=f.mteb_task, stage=f.stage, reason=without_local_paths(f.reason), user_fault=f.user_fault)
            for f in failures
        ),
        run_id=run_id,
        created_at=created_at,
    )


def is_of_mteb(mteb_task: MtebTask) -> bool:
    """Whether mteb defines this task. False for a user's files and for data of a Python package."""
    return mteb_task.source in ("hub", "mirror")


def data_source(mteb_task: MtebTask) -> str:
    """Source and revision of the texts, without local folders."""
    origin = {
        "hub": mteb_task.location,
        "package": f"Python package {mteb_task.location}",
        "mirror": "local mirror",
        "files": "own files",
    }
    carved = "" if mteb_task.test_split is None else f", {mteb_task.test_split.fraction:.0%} of them as test"
    grouped = "" if mteb_task.group_column is None else f", split by {mteb_task.group_column}"
    revision = mteb_task.revision[: 19 if mteb_task.revision.startswith("sha256:") else 12]
    return f"{origin[mteb_task.source]}{carved}{grouped} @ {revision}"


def score_row(result: TaskResult, column: Column) -> ScoreRow | None:
    """Row of one column. None if the column was switched off."""
    return next((row for row in result.scores if row.column == column), None)


def measured(result: TaskResult, column: Column, metric: str = "accuracy") -> float | None:
    """A number of a result over all test texts. None if it was not measured."""
    row = find_value(values_of(result), column, metric)
    return None if row is None else row.value


def accuracy_change(result: TaskResult, previous: TaskResult | None) -> str:
    """Change of the head's accuracy since an earlier run in points, or words if the two cannot be compared."""
    if previous is None:
        return "first run"
    if previous.key == result.key:
        return "unchanged"
    new, old = score_row(result, "head"), score_row(previous, "head")
    assert new is not None
    assert old is not None
    hashes = {row.test_sha256 for row in (new, old)} - {None}  # rows of older versions have none
    if new.num_texts != old.num_texts or len(hashes) == 2:
        return f"test data changed (run {previous.run_id}: {percent(old.accuracy)})"
    return f"{points(new.accuracy - old.accuracy)} (run {previous.run_id})"


def warm_start_summary(result: TaskResult) -> str:
    """Effect of training on its start, if the start was a published adapter or was kept. Empty otherwise."""
    start, is_kept = result.warm_start, result.best_epoch == 0
    if start is None and not is_kept:
        return ""
    fact = "started from scratch" if start is None else f"started from published adapter {start.sha256[:12]}"
    before = result.start_accuracy
    after = max((row.validation_accuracy for row in result.epochs if row.validation_accuracy is not None), default=None)
    if before is not None and after is not None:
        split = "test" if result.selected_on == "test" else "validation"
        fact += f": {split} {percent(before)} before, {percent(after)} after training ({points(after - before)})"
    return fact + "; the start was kept" * is_kept


def _entry(result: TaskResult) -> ResultsEntry:
    baseline, lora = measured(result, "frozen_few_shot"), measured(result, "adapted_few_shot")
    head = score_row(result, "head")
    return ResultsEntry(
        task=result.mteb_task.name,
        num_classes=len(result.data.label_names),
        baseline_accuracy=baseline,
        lora_accuracy=lora,
        delta=None if baseline is None or lora is None else lora - baseline,
        full_data_probe_accuracy=measured(result, "frozen_full_data"),
        head_accuracy=measured(result, "head"),
        majority_accuracy=measured(result, "majority"),
        epochs=max(row.epoch for row in result.epochs),
        best_epoch=result.best_epoch,
        selected_on=result.selected_on,
        p_value_holm=None if head is None else head.p_value_holm,
        num_test=result.data.num_test,
        num_overlap=result.data.num_overlap,
        adapter_sha256=result.adapter.sha256,
        reused_from=result.reused_from,
        samples_per_label=result.mteb_task.samples_per_label,
        full_data_probe_macro_f1=measured(result, "frozen_full_data", "macro_f1"),
        head_macro_f1=measured(result, "head", "macro_f1"),
        main_metric=None if head is None else head.main_metric,
        p_value_main=None if head is None else head.p_value_main,
        p_value_main_holm=None if head is None else head.p_value_main_holm,
    )


def _mean(values: Iterable[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None
