"""The score table of a run, which the terminal, the model card and the report show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.history.values import find_value, values_of
from pipeline.records import (
    SIGNIFICANCE,
    ClassificationResults,
    Column,
    MainMetric,
    ResultsAverage,
    ResultsEntry,
    TaskResult,
)
from pipeline.reports.formatting import percent, points
from pipeline.reports.summary import is_of_mteb

Verdict = Literal["above", "below", "within noise"]
"""The head against the full-data probe on the same test texts.

``within noise`` unless the Holm-corrected p-value is below 0.05."""

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
"""Headings of ``ScoreLine.cells``, from left to right."""

HOW_IT_WAS_MADE = (
    (
        "Majority",
        "Every test text gets the most frequent label of train. A score close to it means that nothing was learnt.",
    ),
    (
        "Frozen, few-shot",
        "mteb's own protocol on the frozen encoder: the mean of a logistic regression on a few texts per label over "
        "random draws. The interval is over the draws. Scores with different numbers of texts per label cannot be "
        "compared.",
    ),
    (
        "LoRA, few-shot",
        "The same protocol on the encoder with the adapter attached. Delta is this column minus the one before.",
    ),
    (
        "Frozen, full-data probe",
        "A logistic regression on the frozen encoder's vectors of all training texts. Its regularisation was chosen on "
        "validation. The adapter has to beat this column, because both learn from the same texts.",
    ),
    ("LoRA, own head", "The adapter with the head that was trained with it. It classifies when the adapter is used."),
    (
        "Macro-F1, probe / head",
        "Mean F1 over the classes, of the full-data probe and of the own head. "
        "Rare classes count as much as frequent ones.",
    ),
    (
        "Head against probe",
        "McNemar's exact test on the same test texts, or a paired randomisation test if macro-F1 is the main metric. "
        "Above or below only if p < 0.05 after Holm's step-down correction over the tasks of the run, within noise "
        "otherwise. The correction often makes several p-values equal.",
    ),
    (
        "Best epoch",
        "The epoch with the highest accuracy on the texts that choose it, or the latest of several. The start of "
        "training competes as epoch 0. It is the initial head on LoRA pairs without effect, or the published adapter "
        "of a warm start.",
    ),
    (
        "Intervals",
        "95 % intervals, over the draws for the few-shot columns and over resampled test texts for the others. They do "
        "not cover another training seed or other data.",
    ),
    (
        "Test",
        "The epoch was chosen on a validation slice, and test was read once, at the end. Rows marked † are exceptions: "
        "their epoch was chosen on test.",
    ),
)
"""Names of the columns and explanations of their numbers."""


@dataclass(frozen=True)
class Accuracy:
    """An accuracy, 0..1, with the ends of its 95 % interval if they are known."""

    accuracy: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Cell:
    """Text of a cell: per cent with one decimal, and ``–`` if nothing was computed."""

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
    """Metric of the verdict."""
    verdict: Verdict | None
    """Head against probe. None if one of them was not computed."""
    p_value: float | None
    """P-value of the verdict's test, before Holm's correction. None for runs of older versions."""
    p_value_holm: float | None
    """``p_value`` with Holm's correction over the MTEB tasks."""
    samples_per_label: int | None
    """Texts per label in the few-shot columns. None without these columns, and for runs of older versions."""
    best_epoch: int
    epochs: int
    selected_on_test: bool
    reused_from: str | None

    @property
    def marks(self) -> str:
        """``†`` if the epoch was chosen on test, ``↺`` if an earlier run computed the row."""
        return "†" * self.selected_on_test + "↺" * (self.reused_from is not None)

    def cells(self) -> tuple[Cell, ...]:
        """One cell per entry of ``SCORE_HEADINGS``."""
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
    """The score table of a run, as numbers and as text."""

    lines: tuple[ScoreLine, ...]
    average: ResultsAverage

    def average_cells(self) -> tuple[Cell, ...]:
        """Cells of the last line, one per entry of ``SCORE_HEADINGS``. Empty if a mean would be meaningless."""
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
        """Notes below the table: texts per few-shot draw, kept starts, and a legend of the marks that occur."""
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
                "↺ Nothing that this row depends on had changed, so it was reused from an earlier run "
                f"({', '.join(runs)})."
            )
        return tuple(notes)


def score_table(summary: ClassificationResults, results: Sequence[TaskResult] = ()) -> ScoreTable:
    """Make the score table of a run.

    Args:
        summary: Lines of the table, in order.
        results: Results with the intervals. Empty for a published repository, whose table has no intervals.
    """
    by_name = {result.mteb_task.name: result for result in results}
    return ScoreTable(
        lines=tuple(_line(entry, by_name.get(entry.task)) for entry in summary.tasks), average=summary.average
    )


def task_heading(results: Sequence[TaskResult]) -> str:
    """Heading for the tasks of a run on published pages."""
    return SCORE_HEADINGS[0] if all(is_of_mteb(result.mteb_task) for result in results) else "Data set"


def _line(entry: ResultsEntry, result: TaskResult | None) -> ScoreLine:
    def score(accuracy: float | None, column: Column) -> Accuracy | None:
        row = None if result is None else find_value(values_of(result), column)
        if accuracy is None:
            return None
        return Accuracy(accuracy) if row is None else Accuracy(accuracy, row.low, row.high)

    has_few_shot = entry.baseline_accuracy is not None or entry.lora_accuracy is not None
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
        samples_per_label=entry.samples_per_label if has_few_shot else None,
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
    """P-value of the verdict. Entries of older versions have only that of accuracy."""
    return entry.p_value_holm if entry.main_metric is None else entry.p_value_main_holm


def _cell(score: Accuracy | None) -> Cell:
    if score is None:
        return Cell("–")
    if score.low is None or score.high is None:
        return Cell(percent(score.accuracy))
    return Cell(percent(score.accuracy), f"{percent(score.low)}–{percent(score.high)}")
