"""Scores of text vectors: the frozen encoder beside the adapted one, with intervals and paired differences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pipeline.config import EvaluateConfig
from pipeline.data.dataset import TaskData
from pipeline.evaluation.metrics import Estimate
from pipeline.evaluation.scores import score_of_draws
from pipeline.pairs.data import PairData
from pipeline.records import Difference, ValueRow
from pipeline.vector_scores.measuring import Measured
from pipeline.vector_scores.parts import Part, parts_of_test
from pipeline.vector_scores.resampling import Resampled, resample
from pipeline.vector_scores.statistics import BothMeasured, Series


@dataclass(frozen=True)
class EmbeddingScores:
    """Scores of both encoder states on test."""

    rows: tuple[ValueRow, ...]
    """Rows of ``values.parquet``. A gain is in the column ``adapted``, under the metric's name and ``_gain``."""
    differences: tuple[Difference, ...]
    """Gains in the main metric. The first is that on all of test at full width, by which adapters are judged."""
    notes: tuple[str, ...]
    """Scores that are not given, and why, one sentence each."""


def compare(
    data: PairData | TaskData,
    frozen: Measured,
    adapted: Measured,
    *,
    run_id: str,
    config: EvaluateConfig,
    seed: int,
    learnt_validation: bool = False,
) -> EmbeddingScores:
    """Compute the scores of both encoder states, and the gain of the adapted one.

    Scores are given at every width for three test sets: all of test, without pairs that stand in train
    (``pair_in_train``), and without pairs that share a text with train (``text_in_train``). At full width they are also
    given for each value of the user's slices. Intervals are over resampled texts, see ``resampling.py``. A part of
    test uses the clusters and silhouettes that were computed on all test texts.

    Args:
        data: The data that both were measured on.
        frozen: Measurement of the frozen encoder.
        adapted: Measurement of the encoder with the adapter, at the same widths.
        run_id: Run that the rows belong to.
        config: Number of bootstrap samples.
        seed: Seed of the samples.
        learnt_validation: Whether the adapter was trained on validation too, so that it cannot choose thresholds.
    """
    divided = parts_of_test(data)
    both = BothMeasured(data, frozen, adapted, learnt_validation)
    sheet = _Sheet(both, run_id)
    rows: list[ValueRow] = []
    differences: list[Difference] = []
    notes = [*divided.notes]
    for part in divided.parts:
        groups = divided.groups[part.mask]
        found = resample(both.statistics(part), groups, draws=config.bootstrap_draws, seed=seed)
        notes += _undefined(part, found)
        found = {name: numbers for name, numbers in found.items() if numbers.is_defined}
        rows += sheet.rows(part, found)
        gains = list(sheet.differences(part, found))
        rows += [sheet.gain_row(difference) for difference in gains]
        differences += gains
    rows += sheet.rows_without_samples(divided.parts[0])
    if isinstance(data, PairData) and data.kind == "labels" and both.thresholds is None:
        why = "the adapter was trained on validation" if learnt_validation else "validation does not have both labels"
        notes.append(f"no f1 and accuracy, because {why}, so it cannot choose a threshold")
    return EmbeddingScores(tuple(rows), tuple(differences), tuple(notes))


@dataclass(frozen=True)
class _Sheet:
    """Rows of one task in one run."""

    both: BothMeasured
    run_id: str

    def rows(self, part: Part, found: Mapping[str, Resampled]) -> Iterator[ValueRow]:
        """Yield the rows of resampled metrics."""
        for name, numbers in found.items():
            for number, series in enumerate(self.both.series(part)):
                yield self._row(name, series, numbers.estimate(number), part)

    def differences(self, part: Part, found: Mapping[str, Resampled]) -> Iterator[Difference]:
        """Yield the gain in the main metric at each width, if the part defines the metric."""
        metric, widths = self.both.main_metric, self.both.widths(part)
        if metric not in found:
            return
        for number, width in enumerate(widths):
            gain = found[metric].gain(len(widths) + number, over=number)
            yield Difference(
                metric=metric,
                width=width,
                slice=part.slice,
                slice_value=part.slice_value,
                gain=gain.gain,
                low=gain.low,
                high=gain.high,
                p_value=gain.p_value,
                num_texts=part.num_items,
            )

    def gain_row(self, difference: Difference) -> ValueRow:
        """Make the row of a gain."""
        return ValueRow(
            run_id=self.run_id,
            mteb_task=self.both.data.task.name,
            column="adapted",
            metric=f"{difference.metric}_gain",
            value=difference.gain,
            main=False,
            **difference.model_dump(exclude={"metric", "gain", "p_value", "p_value_holm"}),
        )

    def rows_without_samples(self, everything: Part) -> Iterator[ValueRow]:
        """Yield thresholds, F1 at the threshold that is best on test, and accuracy by mteb's few-shot protocol."""
        both, every = self.both, self.both.series(everything)
        if isinstance(both.data, TaskData):
            draws = [row for found in (both.frozen, both.adapted) for row in found.arrays["few_shot_accuracy"]]
            for series, accuracies in zip(every, draws, strict=True):
                score = score_of_draws(accuracies.tolist(), accuracies.tolist(), None)
                estimate = Estimate(score.accuracy, score.low, score.high)
                yield self._row("few_shot_accuracy", series, estimate, everything)
            return
        if both.data.kind != "labels":
            return
        found = {f"{name}_threshold": numbers for name, numbers in (both.thresholds or {}).items()}
        found["f1_best_threshold"] = both.best_f1_on_test()
        for name, numbers in found.items():
            for series, number in zip(every, numbers.ravel().tolist(), strict=True):
                yield self._row(name, series, Estimate(number), everything)

    def _row(self, metric: str, series: Series, estimate: Estimate, part: Part) -> ValueRow:
        return ValueRow(
            run_id=self.run_id,
            mteb_task=self.both.data.task.name,
            column=series.column,
            metric=metric,
            width=series.width,
            slice=part.slice,
            slice_value=part.slice_value,
            value=estimate.value,
            low=estimate.low,
            high=estimate.high,
            num_texts=part.num_items,
            main=metric == self.both.main_metric,
        )


def _undefined(part: Part, found: Mapping[str, Resampled]) -> Iterator[str]:
    """Yield a note on the metrics that a part does not define."""
    names = [name for name, numbers in found.items() if not numbers.is_defined]
    if names:
        where = "test" if part.slice is None else f"{part.slice} {part.slice_value!r}"
        yield f"no {', '.join(names)} for {where}: all its scores or labels are equal"
