"""Scores of all arms on test, with intervals over resampled texts and seeds, and paired differences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.config import EvaluateConfig
from pipeline.data.dataset import TaskData
from pipeline.evaluation.calibration import fit_temperature, softmax
from pipeline.evaluation.metrics import METRICS, Counts
from pipeline.evaluation.scores import Floats, Ints, interval_tails
from pipeline.pairs.data import PairData
from pipeline.records import Record
from pipeline.vector_scores import pair_metrics
from pipeline.vector_scores.measuring import MAIN_METRICS, kind_of
from pipeline.vector_scores.parts import Part, parts_of_test
from pipeline.vector_scores.resampling import Resampled, Statistic, resample
from pipeline.vector_scores.statistics import statistics_of

_BINS = 15


@dataclass(frozen=True)
class Series:
    """Measured arrays of one arm with one seed."""

    arm: str
    seed: int
    arrays: Mapping[str, npt.NDArray[Any]]


class ArmValue(Record):
    """A metric of an arm: the mean over its seeds, with a 95 % interval over texts and seeds."""

    arm: str
    metric: str
    slice: str | None
    """Column that selects a part of test. None: all of test."""
    slice_value: str | None
    value: float
    low: float | None
    high: float | None
    num_items: int
    """Pairs, queries or texts."""
    by_seed: tuple[float, ...]
    """The metric of each seed."""
    main: bool
    """Whether it is the metric that the task is judged by."""
    optimistic: bool = False
    """Whether test itself chose a threshold."""


class ArmDifference(Record):
    """A metric of an arm minus that of another one, on the same texts and seeds."""

    arm: str
    over: str
    """Arm that is subtracted."""
    metric: str
    slice: str | None
    slice_value: str | None
    gain: float
    low: float | None
    high: float | None
    p_value: float
    share: float | None
    """Quotient of both metrics. None unless the other is above 0."""
    share_low: float | None
    share_high: float | None
    num_items: int


@dataclass(frozen=True)
class Scores:
    """Everything that test says of the arms."""

    values: tuple[ArmValue, ...]
    differences: tuple[ArmDifference, ...]
    notes: tuple[str, ...]


def main_metric(data: PairData | TaskData) -> str:
    """Metric that a data set is judged by."""
    return "accuracy" if data.task.objective == "classification" else MAIN_METRICS[kind_of(data)]


def score_arms(data: PairData | TaskData, series: Sequence[Series], *, config: EvaluateConfig, seed: int) -> Scores:
    """Compute all metrics of all arms.

    The bootstrap has two levels: each sample draws seeds with replacement, and groups of texts (``resampling.py``). All
    arms see the same samples, so their differences are paired.

    Args:
        data: The data set.
        series: Measurement of each arm and seed. An arm without seeds counts as equal for all of them.
        config: Number of samples.
        seed: Seed of the samples.
    """
    divided = parts_of_test(data)
    arms = list(dict.fromkeys(one.arm for one in series))
    values: list[ArmValue] = []
    differences: list[ArmDifference] = []
    notes = [*divided.notes]
    for part in divided.parts:
        found = resample(
            _statistics(data, series, part), divided.groups[part.mask], draws=config.bootstrap_draws, seed=seed
        )
        undefined = sorted(name for name, numbers in found.items() if not numbers.is_defined)
        if undefined:
            where = "test" if part.slice is None else f"{part.slice} {part.slice_value!r}"
            notes.append(f"no {', '.join(undefined)} for {where}: all its scores or labels are equal")
        sheet = _Sheet(data, series, part, seed)
        for name, numbers in found.items():
            if name in undefined:
                continue
            by_arm = {arm: sheet.of_arm(numbers, arm) for arm in arms}
            values += [sheet.value(name, arm, by_arm[arm]) for arm in arms]
            differences += [
                sheet.difference(name, arm, over, by_arm)
                for over in ("frozen", "full")
                for arm in arms
                if over in by_arm and arm != over
            ]
    values += _optimistic(data, series)
    if isinstance(data, PairData) and data.kind == "labels":
        positive = float((data.test.scores == 1).mean()) if data.test.scores is not None else 0.0
        ceiling = (3 * positive * (1 - positive)) ** 0.5
        notes.append(
            "with 0/1 labels Spearman is a rescaled AUC, (2 AUC - 1) · √(3 p (1 - p)); "
            f"{positive:.3f} of the test pairs are positive, so it is at most {ceiling:.4f} here"
        )
    return Scores(tuple(values), tuple(differences), tuple(notes))


def thresholds_of(series: Sequence[Series]) -> dict[str, npt.NDArray[np.float64]] | None:
    """Thresholds of F1 and accuracy that are best on each seed's validation pairs, (series,). None without such."""
    found: dict[str, list[float]] = {"f1": [], "accuracy": []}
    for one in series:
        gold = one.arrays.get("validation_gold")
        for metric, row in found.items():
            similarity = one.arrays.get("validation_similarity")
            best = None
            if gold is not None and similarity is not None:
                best = pair_metrics.best_threshold(gold, similarity[0], metric=metric)  # type: ignore[arg-type]
            if best is None:
                return None
            row.append(best.threshold)
    return {metric: np.array(row) for metric, row in found.items()}


@dataclass(frozen=True)
class _OfArm:
    """A metric of one arm: mean over its seeds, by seed, and in each sample."""

    value: float
    by_seed: tuple[float, ...]
    drawn: npt.NDArray[np.float64]


@dataclass(frozen=True)
class _Sheet:
    """Rows of one part of test."""

    data: PairData | TaskData
    series: Sequence[Series]
    part: Part
    seed: int

    def of_arm(self, numbers: Resampled, arm: str) -> _OfArm:
        """Average an arm's series, in each sample over the seeds that the sample draws."""
        rows = [number for number, one in enumerate(self.series) if one.arm == arm]
        values = numbers.values[rows]
        draws = numbers.drawn.shape[1]
        # The same seeds for every arm.
        chosen = np.random.default_rng([self.seed, 1]).integers(len(rows), size=(draws, len(rows)))
        drawn = np.take_along_axis(numbers.drawn[rows].T, chosen, axis=1).mean(axis=1)
        return _OfArm(float(values.mean()), tuple(map(float, values)), drawn)

    def value(self, metric: str, arm: str, found: _OfArm) -> ArmValue:
        """Row of a metric."""
        low, high = _ends(found.drawn)
        if low == high:
            low = high = None
        return ArmValue(
            arm=arm,
            metric=metric,
            slice=self.part.slice,
            slice_value=self.part.slice_value,
            value=found.value,
            low=low,
            high=high,
            num_items=self.part.num_items,
            by_seed=found.by_seed,
            main=metric == main_metric(self.data),
        )

    def difference(self, metric: str, arm: str, over: str, by_arm: Mapping[str, _OfArm]) -> ArmDifference:
        """Row of a paired difference."""
        one, other = by_arm[arm], by_arm[over]
        drawn = one.drawn - other.drawn
        drawn = drawn[np.isfinite(drawn)]
        tail = min(np.count_nonzero(drawn <= 0), np.count_nonzero(drawn >= 0)) if len(drawn) else 0
        low, high = _ends(drawn)
        ratio = other.value > 0
        with np.errstate(divide="ignore", invalid="ignore"):
            shares = _ends(one.drawn / other.drawn) if ratio else (None, None)
        return ArmDifference(
            arm=arm,
            over=over,
            metric=metric,
            slice=self.part.slice,
            slice_value=self.part.slice_value,
            gain=one.value - other.value,
            low=low,
            high=high,
            # The observed difference counts as a draw, so the p-value is never 0.
            p_value=min(1.0, 2 * (int(tail) + 1) / (len(drawn) + 1)),
            share=one.value / other.value if ratio else None,
            share_low=shares[0],
            share_high=shares[1],
            num_items=self.part.num_items,
        )


def _ends(drawn: npt.NDArray[np.float64]) -> tuple[float, float] | tuple[None, None]:
    defined = drawn[np.isfinite(drawn)]
    if not len(defined):
        return None, None
    low, high = np.quantile(defined, interval_tails())
    return float(low), float(high)


def _statistics(data: PairData | TaskData, series: Sequence[Series], part: Part) -> dict[str, Statistic]:
    if isinstance(data, TaskData) and data.task.objective == "classification":
        return _of_classifiers(data, series, part)

    def arrays(name: str) -> npt.NDArray[Any]:
        return np.stack([one.arrays[name][0] for one in series])

    thresholds = thresholds_of(series)
    statistics = statistics_of(data, part, arrays, thresholds, times_drawn=series[0].arrays.get("times_drawn"))
    if thresholds is not None and isinstance(data, PairData) and data.test.scores is not None:
        gold, similarity = data.test.scores[part.mask], arrays("similarity")[:, part.mask]
        given = {"gold": gold, "series": similarity, "thresholds": thresholds["f1"]}
        statistics["precision"] = partial(pair_metrics.precision, **given)
        statistics["recall"] = partial(pair_metrics.recall, **given)
        statistics["false_positive_rate"] = partial(pair_metrics.false_positive_rate, **given)
    return statistics


def _of_classifiers(data: TaskData, series: Sequence[Series], part: Part) -> dict[str, Statistic]:
    labels = data.test_labels[part.mask]
    probabilities = [_probabilities(one)[part.mask] for one in series]
    predictions = np.stack([rows.argmax(axis=1) for rows in probabilities])
    confidences = np.stack([rows.max(axis=1) for rows in probabilities])
    right = (predictions == labels).astype(np.float64)
    num_classes = len(data.label_names)
    statistics: dict[str, Statistic] = {
        name: partial(_of_counts, name=name, labels=labels, predictions=predictions, num_classes=num_classes)
        for name in METRICS
    }
    statistics["calibration_error"] = partial(_calibration_error, right=right, confidences=confidences)
    # The same seed of full: the arms of a seed have learnt from the same texts.
    of_full = {one.seed: predictions[number] for number, one in enumerate(series) if one.arm == "full"}
    if of_full:
        same = np.stack([row == of_full[one.seed] for one, row in zip(series, predictions, strict=True)])
        statistics["agreement_with_full"] = partial(pair_metrics.mean, series=same.astype(np.float64))
    return statistics


def _probabilities(one: Series) -> npt.NDArray[np.float64]:
    """Probabilities at the temperature that the seed's validation texts give."""
    logits = one.arrays["logits"]
    temperature = 1.0
    if "validation_logits" in one.arrays:
        temperature = fit_temperature(one.arrays["validation_logits"], one.arrays["validation_labels"])
    return softmax(logits / temperature)


def _of_counts(
    weights: Floats, *, name: str, labels: Ints, predictions: Ints, num_classes: int
) -> npt.NDArray[np.float64]:
    """A metric of ``METRICS`` of each series in each sample."""
    from scipy import sparse

    def sums(classes: Ints, chosen: npt.NDArray[np.bool_] | None = None) -> npt.NDArray[np.float64]:
        kept = np.arange(len(classes)) if chosen is None else np.flatnonzero(chosen)
        members = sparse.csr_array((np.ones(len(kept)), (classes[kept], kept)), shape=(num_classes, len(classes)))
        return np.asarray((members @ weights).T)

    by_label, metric = sums(labels), METRICS[name].function
    return np.stack([metric(Counts(sums(labels, row == labels), by_label, sums(row))) for row in predictions])


def _calibration_error(weights: Floats, *, right: Floats, confidences: Floats) -> npt.NDArray[np.float64]:
    """Expected calibration error of each series in each sample (Guo et al. 2017, equation 3)."""
    inner_edges = np.linspace(0.0, 1.0, _BINS + 1)[1:-1]
    found = []
    for hits, sure in zip(right, confidences, strict=True):
        bins = np.digitize(sure, inner_edges, right=True)
        gap = np.zeros(weights.shape[1])
        for number in np.unique(bins):
            members = bins == number
            gap += np.abs((hits[members] - sure[members]) @ weights[members])
        found.append(gap / weights.sum(axis=0))
    return np.stack(found)


def _optimistic(data: PairData | TaskData, series: Sequence[Series]) -> Iterator[ArmValue]:
    """F1 and false positives at the threshold that is best on test itself."""
    if not isinstance(data, PairData) or data.kind != "labels" or data.test.scores is None:
        return
    gold = data.test.scores
    rows: dict[tuple[str, str], list[float]] = {}
    for one in series:
        similarity = one.arrays["similarity"][0]
        best = pair_metrics.best_threshold(gold, similarity, metric="f1")
        if best is None:
            return
        false_positives = np.count_nonzero((similarity >= best.threshold) & (gold == 0))
        rows.setdefault((one.arm, "f1_best_threshold"), []).append(best.value)
        rows.setdefault((one.arm, "false_positives_best_threshold"), []).append(float(false_positives))
    for (arm, metric), numbers in rows.items():
        yield ArmValue(
            arm=arm,
            metric=metric,
            slice=None,
            slice_value=None,
            value=float(np.mean(numbers)),
            low=None,
            high=None,
            num_items=len(gold),
            by_seed=tuple(numbers),
            main=False,
            optimistic=True,
        )
