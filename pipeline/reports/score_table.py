"""What a run found, in one record and one table. The terminal, the card and the report all show this table, and no other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from pipeline.records import (
    SIGNIFICANCE,
    ClassificationResults,
    Column,
    EncoderRef,
    Failure,
    MainMetric,
    MtebTask,
    ResultsAverage,
    ResultsEntry,
    ScoreRow,
    TaskResult,
)
from pipeline.reports.formatting import percent, points, without_local_paths
from pipeline.store.values import find_value, values_of

Verdict = Literal["above", "below", "within noise"]
"""The head against the full-data probe on the same test texts; ``within noise`` unless the Holm-corrected p is below 0.05."""


SCORE_HEADINGS = (
    "MTEB task",
    "Classes",
    "Majority",
    "Frozen, few-shot",
    "LoRA, few-shot",
    "Delta",
    "Frozen, full-data probe",
    "LoRA, own head",
    "Macro-F1, probe / head",
    "Head against probe",
    "Best epoch",
)
"""Above the cells of ``ScoreLine.cells``, left to right."""

HOW_IT_WAS_MADE = (
    ("Majority", "Every test text gets the most frequent label of train. A score near this one has learnt nothing."),
    (
        "Frozen, few-shot",
        "mteb's own protocol on the frozen encoder: a logistic regression on a few texts per label, repeated over random draws; "
        "the mean over the draws. The interval is over the draws. Scores with another number of texts per label cannot be compared.",
    ),
    (
        "LoRA, few-shot",
        "The same protocol on the encoder with the adapter attached. Delta is this column minus the one before.",
    ),
    (
        "Frozen, full-data probe",
        "A logistic regression on the frozen encoder's vectors of all training texts; its regularisation was chosen on validation. "
        "What the adapter has to beat, because it sees the same texts.",
    ),
    ("LoRA, own head", "The adapter with the head it was trained with: what classifies when the adapter is used."),
    (
        "Macro-F1, probe / head",
        "Mean of the classes' F1, in which a rare class counts as much as a frequent one, of the full-data probe and of the own head.",
    ),
    (
        "Head against probe",
        "McNemar's exact test on the same test texts; where macro-F1 is the main metric, a paired randomisation test of it. "
        "Above or below only where p < 0.05 after Holm's step-down correction over the tasks of the run, otherwise within noise. "
        "The correction often makes several p-values equal.",
    ),
    (
        "Best epoch",
        "The one with the highest accuracy on the texts that choose it, the latest of equals. The start of training competes as epoch 0: "
        "the head that training begins with, on LoRA pairs that do nothing yet, or the published adapter of a warm start.",
    ),
    (
        "Intervals",
        "95 %. Over the draws for the few-shot columns, over resampled test texts for the others. "
        "They do not cover another training seed or other data.",
    ),
    (
        "Test",
        "The epoch was chosen on a validation slice and test was read once, at the end, except where a row is marked † (chosen on test).",
    ),
)
"""How each number was made: (name, explanation)."""


@dataclass(frozen=True)
class Accuracy:
    """One accuracy, 0..1, with the ends of its 95 % interval where they are known."""

    accuracy: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Cell:
    """One cell as people read it: per cent, one decimal, ``–`` where nothing was computed."""

    text: str
    interval: str = ""


@dataclass(frozen=True)
class ScoreLine:
    """One MTEB task in the score table."""

    task: str
    num_classes: int
    majority: Accuracy | None
    few_shot: Accuracy | None
    lora_few_shot: Accuracy | None
    delta: float | None
    """``lora_few_shot - few_shot``, 0..1."""
    probe: Accuracy | None
    head: Accuracy | None
    probe_macro_f1: float | None
    head_macro_f1: float | None
    main_metric: MainMetric
    """The score that the verdict is about."""
    verdict: Verdict | None
    """None where head or probe was not computed."""
    p_value: float | None
    """Of the test behind the verdict, before Holm's correction; None for runs of older versions."""
    p_value_holm: float | None
    samples_per_label: int | None
    """Texts per label in the few-shot columns; None where there are none, and for runs of older versions."""
    best_epoch: int
    epochs: int
    selected_on_test: bool
    reused_from: str | None

    @property
    def marks(self) -> str:
        """``†`` chosen on test, ``↺`` computed by an earlier run."""
        return "†" * self.selected_on_test + "↺" * (self.reused_from is not None)

    def cells(self) -> tuple[Cell, ...]:
        """One per entry of ``SCORE_HEADINGS``."""
        return (
            Cell(f"{self.task} {self.marks}".rstrip()),
            Cell(str(self.num_classes)),
            _cell(self.majority),
            _cell(self.few_shot),
            _cell(self.lora_few_shot),
            Cell(points(self.delta)),
            _cell(self.probe),
            _cell(self.head),
            Cell(f"{percent(self.probe_macro_f1)} / {percent(self.head_macro_f1)}"),
            Cell((self.verdict or "–") + " (macro-F1)" * (self.verdict is not None and self.main_metric == "macro_f1")),
            Cell(f"{self.best_epoch} of {self.epochs}"),
        )


@dataclass(frozen=True)
class ScoreTable:
    """The score table of a run: numbers, and the same as text."""

    lines: tuple[ScoreLine, ...]
    average: ResultsAverage

    def average_cells(self) -> tuple[Cell, ...]:
        """The last line, one cell per entry of ``SCORE_HEADINGS``; empty where a mean says nothing."""
        mean, nothing = self.average, Cell("")
        return (
            Cell("Average"),
            nothing,
            nothing,
            Cell(percent(mean.baseline_accuracy)),
            Cell(percent(mean.lora_accuracy)),
            Cell(points(mean.delta)),
            Cell(percent(mean.full_data_probe_accuracy)),
            Cell(percent(mean.head_accuracy)),
            nothing,
            nothing,
            nothing,
        )

    def notes(self) -> tuple[str, ...]:
        """What the lines do not say of themselves: texts per few-shot draw, kept starts, and the legend of the marks that occur."""
        notes = []
        samples = {line.task: line.samples_per_label for line in self.lines if line.samples_per_label is not None}
        if samples:
            numbers = set(samples.values())
            each = (
                ", ".join(f"{task} {number}" for task, number in samples.items())
                if len(numbers) > 1
                else str(numbers.pop())
            )
            notes.append(f"Few-shot texts per label: {each}.")
        if kept := [line.task for line in self.lines if line.best_epoch == 0]:
            notes.append(
                f"Best epoch 0: no epoch was as good as the start of training, which was kept: {', '.join(kept)}."
            )
        if any(line.selected_on_test for line in self.lines):
            notes.append("† The epoch was chosen on the test split itself, so this row's scores are optimistic.")
        runs = sorted({line.reused_from for line in self.lines if line.reused_from is not None})
        if runs:
            notes.append(
                f"↺ Nothing this row depends on had changed, so it was taken over from an earlier run ({', '.join(runs)})."
            )
        return tuple(notes)


def summarise(
    results: Sequence[TaskResult],
    failures: Sequence[Failure],
    *,
    encoder: EncoderRef,
    run_id: str,
    created_at: datetime,
) -> ClassificationResults:
    """Build the content of ``classification_results.json``, which is published: it names no local path.

    Args:
        results: The finished MTEB tasks in table order; the Holm-corrected p is read from their ``head`` rows.
        failures: The others.
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


def score_table(summary: ClassificationResults, results: Sequence[TaskResult] = ()) -> ScoreTable:
    """The score table of a run.

    Args:
        summary: Decides which lines there are, and their order.
        results: Where the intervals come from; without them (a published repository) there are none.
    """
    by_name = {result.mteb_task.name: result for result in results}
    return ScoreTable(
        lines=tuple(_line(entry, by_name.get(entry.task)) for entry in summary.tasks), average=summary.average
    )


def score_row(result: TaskResult, column: Column) -> ScoreRow | None:
    """The row of one column, or none where it was switched off."""
    return next((row for row in result.scores if row.column == column), None)


def measured(result: TaskResult, column: Column, metric: str = "accuracy") -> float | None:
    """One number of a result over all test texts; None if it was not measured."""
    row = find_value(values_of(result), column, metric)
    return None if row is None else row.value


def accuracy_change(result: TaskResult, before: TaskResult | None) -> str:
    """How far the own head's accuracy is from that of an earlier run, in points; in words where the two cannot be compared."""
    if before is None:
        return "first run"
    if before.key == result.key:
        return "unchanged"
    now, then = score_row(result, "head"), score_row(before, "head")
    assert now is not None
    assert then is not None
    hashes = {row.test_sha256 for row in (now, then)} - {None}  # rows of older versions have none
    if now.num_texts != then.num_texts or len(hashes) == 2:
        return f"test data changed (run {before.run_id}: {percent(then.accuracy)})"
    return f"{points(now.accuracy - then.accuracy)} (run {before.run_id})"


def warm_start_summary(result: TaskResult) -> str:
    """What training made of its start, if that was a published adapter or was kept; empty otherwise."""
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


def is_of_mteb(mteb_task: MtebTask) -> bool:
    """Whether mteb knows these data; false for own files and for those of a Python package."""
    return mteb_task.source in ("hub", "mirror")


def task_heading(results: Sequence[TaskResult]) -> str:
    """What published pages call the tasks of a run."""
    return SCORE_HEADINGS[0] if all(is_of_mteb(result.mteb_task) for result in results) else "Data set"


def data_source(mteb_task: MtebTask) -> str:
    """Where the texts came from and at which revision, without the folder that a mirror or a file lies in."""
    place = {
        "hub": mteb_task.location,
        "package": f"Python package {mteb_task.location}",
        "mirror": "local mirror",
        "files": "own files",
    }
    carved = "" if mteb_task.test_split is None else f", {mteb_task.test_split.fraction:.0%} of them as test"
    grouped = "" if mteb_task.group_column is None else f", split by {mteb_task.group_column}"
    return f"{place[mteb_task.source]}{carved}{grouped} @ {mteb_task.revision[: 19 if mteb_task.revision.startswith('sha256:') else 12]}"


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
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _line(entry: ResultsEntry, result: TaskResult | None) -> ScoreLine:
    def score(accuracy: float | None, column: Column) -> Accuracy | None:
        row = None if result is None else find_value(values_of(result), column)
        if accuracy is None:
            return None
        return Accuracy(accuracy) if row is None else Accuracy(accuracy, row.low, row.high)

    return ScoreLine(
        task=entry.task,
        num_classes=entry.num_classes,
        majority=score(entry.majority_accuracy, "majority"),
        few_shot=score(entry.baseline_accuracy, "frozen_few_shot"),
        lora_few_shot=score(entry.lora_accuracy, "adapted_few_shot"),
        delta=entry.delta,
        probe=score(entry.full_data_probe_accuracy, "frozen_full_data"),
        head=score(entry.head_accuracy, "head"),
        probe_macro_f1=entry.full_data_probe_macro_f1,
        head_macro_f1=entry.head_macro_f1,
        main_metric=entry.main_metric or "accuracy",
        verdict=_verdict(entry),
        p_value=entry.p_value_main,
        p_value_holm=_corrected_p_value(entry),
        samples_per_label=None
        if entry.baseline_accuracy is None and entry.lora_accuracy is None
        else entry.samples_per_label,
        best_epoch=entry.best_epoch,
        epochs=entry.epochs,
        selected_on_test=entry.selected_on == "test",
        reused_from=entry.reused_from,
    )


def _verdict(entry: ResultsEntry) -> Verdict | None:
    head, probe = entry.head_accuracy, entry.full_data_probe_accuracy
    if entry.main_metric == "macro_f1":
        head, probe = entry.head_macro_f1, entry.full_data_probe_macro_f1
    p_value = _corrected_p_value(entry)
    if head is None or probe is None or p_value is None:
        return None
    if p_value >= SIGNIFICANCE or head == probe:
        return "within noise"
    # On the same test texts the sign of the accuracies is the sign of only_head - only_probe.
    return "above" if head > probe else "below"


def _corrected_p_value(entry: ResultsEntry) -> float | None:
    """The p-value behind the verdict; older versions had only that of accuracy."""
    return entry.p_value_holm if entry.main_metric is None else entry.p_value_main_holm


def _cell(score: Accuracy | None) -> Cell:
    if score is None:
        return Cell("–")
    if score.low is None or score.high is None:
        return Cell(percent(score.accuracy))
    return Cell(percent(score.accuracy), f"{percent(score.low)}–{percent(score.high)}")
