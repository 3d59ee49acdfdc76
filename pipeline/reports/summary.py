"""The summary of a run, and facts about single results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime

from pipeline.history.values import find_value, main_value, values_of
from pipeline.records import (
    ClassificationResults,
    Column,
    Difference,
    EncoderRef,
    EpochRow,
    Failure,
    MtebTask,
    ResultsAverage,
    ResultsEntry,
    RunResults,
    ScoreRow,
    TaskEntry,
    TaskResult,
    ValueColumn,
    ValueRow,
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
    entries = tuple(_entry(result) for result in results if result.has_head)
    return ClassificationResults(
        encoder=_public(encoder),
        tasks=entries,
        average=ResultsAverage(
            baseline_accuracy=_mean(e.baseline_accuracy for e in entries),
            lora_accuracy=_mean(e.lora_accuracy for e in entries),
            delta=_mean(e.delta for e in entries),
            full_data_probe_accuracy=_mean(e.full_data_probe_accuracy for e in entries),
            head_accuracy=_mean(e.head_accuracy for e in entries),
        ),
        failures=_public_failures(failures),
        run_id=run_id,
        created_at=created_at,
    )


def summarise_all(
    results: Sequence[TaskResult],
    failures: Sequence[Failure],
    *,
    encoder: EncoderRef,
    run_id: str,
    created_at: datetime,
) -> RunResults:
    """Build the content of ``results.json``. Arguments as for ``summarise``."""
    return RunResults(
        encoder=_public(encoder),
        tasks=tuple(task_entry(result) for result in results),
        failures=_public_failures(failures),
        run_id=run_id,
        created_at=created_at,
    )


def main_difference(result: TaskResult) -> Difference | None:
    """The adapted against the frozen encoder on all of test, at full width. None for a classifier."""
    return next((found for found in result.differences if found.width is None and found.slice is None), None)


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


def headline(values: Sequence[ValueRow]) -> str:
    """Accuracy of each column of a classifier, or the main metric of each other column, in words."""
    from pipeline.evaluation.metrics import title_of  # late, because it computes, and the driver starts sooner without

    whole = [row for row in values if row.slice is None and row.width is None]
    is_of_vectors = any(row.column in ("frozen", "adapted") for row in whole)
    shown = [row for row in whole if (row.main if is_of_vectors else row.metric == "accuracy")]
    metric = f" ({title_of(shown[0].metric)})" if is_of_vectors and shown else ""
    return ", ".join(f"{row.column} {percent(row.value)}" for row in shown) + metric


def selection_score(row: EpochRow) -> float | None:
    """Value of the metric that selects the epoch. None in a refit."""
    return row.validation_accuracy if row.validation_score is None else row.validation_score


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
    before = result.start_accuracy if result.start_score is None else result.start_score
    after = max((score for row in result.epochs if (score := selection_score(row)) is not None), default=None)
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


def task_entry(result: TaskResult) -> TaskEntry:
    """Entry of one MTEB task in ``results.json``."""
    values = values_of(result)
    frozen_column: ValueColumn = "frozen_full_data" if result.has_head else "frozen"
    adapted_column: ValueColumn = "head" if result.has_head else "adapted"
    frozen, adapted = (main_value(values, column) for column in (frozen_column, adapted_column))
    metric = "accuracy" if adapted is None else adapted.metric
    difference, head = main_difference(result), score_row(result, "head")
    return TaskEntry(
        task=result.mteb_task.name,
        family=result.mteb_task.objective,
        metric=metric,
        frozen=None if frozen is None else frozen.value,
        adapted=None if adapted is None else adapted.value,
        low=None if adapted is None else adapted.low,
        high=None if adapted is None else adapted.high,
        gain=None if frozen is None or adapted is None else adapted.value - frozen.value,
        gain_low=None if difference is None else difference.low,
        gain_high=None if difference is None else difference.high,
        p_value=difference.p_value if difference else head.p_value_main if head else None,
        p_value_holm=difference.p_value_holm if difference else head.p_value_main_holm if head else None,
        num_test=result.data.num_test,
        num_overlap=result.data.num_overlap,
        epochs=max(row.epoch for row in result.epochs),
        best_epoch=result.best_epoch,
        selected_on=result.selected_on,
        adapter_sha256=result.adapter.sha256,
        reused_from=result.reused_from,
    )


def _public(encoder: EncoderRef) -> EncoderRef:
    return EncoderRef(name=encoder.public_name, public_name=encoder.public_name, revision=encoder.revision)


def _public_failures(failures: Sequence[Failure]) -> tuple[Failure, ...]:
    return tuple(
        Failure(mteb_task=f.mteb_task, stage=f.stage, reason=without_local_paths(f.reason), user_fault=f.user_fault)
        for f in failures
    )


def _mean(values: Iterable[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None
