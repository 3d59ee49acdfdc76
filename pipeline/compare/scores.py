"""Scores of all arms on test, with intervals over resampled texts and seeds, and paired differences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.compare.statistics import Series, arm_statistics
from pipeline.config import EvaluateConfig
from pipeline.data.dataset import TaskData
from pipeline.pairs.data import PairData
from pipeline.records import Record
from pipeline.vector_scores import cluster_metrics, pair_metrics
from pipeline.vector_scores.measuring import MAIN_METRICS, kind_of
from pipeline.vector_scores.parts import Part, parts_of_test
from pipeline.vector_scores.resampling import Resampled, interval, resample


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
        series: Measurement of each arm and seed.
        config: Number of samples.
        seed: Seed of the samples.
    """
    divided = parts_of_test(data)
    values: list[ArmValue] = []
    differences: list[ArmDifference] = []
    notes = [*divided.notes]
    for part in divided.parts:
        found = resample(
            arm_statistics(data, series, part), divided.groups[part.mask], draws=config.bootstrap_draws, seed=seed
        )
        undefined = sorted(name for name, numbers in found.items() if not numbers.is_defined)
        if undefined:
            where = "test" if part.slice is None else f"{part.slice} {part.slice_value!r}"
            notes.append(f"no {', '.join(undefined)} for {where}: all its scores or labels are equal")
        for metric, numbers in found.items():
            if metric not in undefined:
                sheet = _Sheet(metric, series, part, numbers, seed)
                values += sheet.values(is_main=metric == main_metric(data))
                differences += sheet.differences()
    if isinstance(data, PairData) and data.kind == "labels" and data.test.scores is not None:
        values += _without_interval(data, series)
        positive = float((data.test.scores == 1).mean())
        ceiling = (3 * positive * (1 - positive)) ** 0.5
        notes.append(
            "with 0/1 labels Spearman is a rescaled AUC, (2 AUC - 1) · √(3 p (1 - p)); "
            f"{positive:.3f} of the test pairs are positive, so it is at most {ceiling:.4f} here"
        )
    return Scores(tuple(values), tuple(differences), tuple(notes))


class _Sheet:
    """Rows of one metric on one part of test. Every arm is the mean over its seeds."""

    def __init__(self, metric: str, series: Sequence[Series], part: Part, numbers: Resampled, seed: int) -> None:
        self.arms = list(dict.fromkeys(one.arm for one in series))
        self._metric, self._part = metric, part
        rows = [[number for number, one in enumerate(series) if one.arm == arm] for arm in self.arms]
        self._by_seed = [tuple(map(float, numbers.values[of_arm])) for of_arm in rows]
        # The same seeds for every arm.
        chosen = np.random.default_rng([seed, 1]).integers(len(rows[0]), size=(numbers.drawn.shape[1], len(rows[0])))
        drawn = [np.take_along_axis(numbers.drawn[of_arm].T, chosen, axis=1).mean(axis=1) for of_arm in rows]
        self._numbers = Resampled(np.array([np.mean(found) for found in self._by_seed]), np.stack(drawn))

    def values(self, *, is_main: bool) -> Iterator[ArmValue]:
        """Yield a row for each arm."""
        for number, arm in enumerate(self.arms):
            found = self._numbers.estimate(number)
            yield ArmValue(
                arm=arm,
                metric=self._metric,
                slice=self._part.slice,
                slice_value=self._part.slice_value,
                value=found.value,
                low=found.low,
                high=found.high,
                num_items=self._part.num_items,
                by_seed=self._by_seed[number],
                main=is_main,
            )

    def differences(self) -> Iterator[ArmDifference]:
        """Yield a row for each arm and each of ``frozen`` and ``full``."""
        for over in ("frozen", "full"):
            if over in self.arms:
                yield from (self._difference(arm, over) for arm in self.arms if arm != over)

    def _difference(self, arm: str, over: str) -> ArmDifference:
        one, other = self.arms.index(arm), self.arms.index(over)
        found = self._numbers.gain(one, over=other)
        values, drawn = self._numbers.values, self._numbers.drawn
        share, ends = None, None
        if values[other] > 0:
            share = float(values[one] / values[other])
            with np.errstate(divide="ignore", invalid="ignore"):
                ends = interval(drawn[one] / drawn[other])
        return ArmDifference(
            arm=arm,
            over=over,
            metric=self._metric,
            slice=self._part.slice,
            slice_value=self._part.slice_value,
            gain=found.gain,
            low=found.low,
            high=found.high,
            p_value=found.p_value,
            share=share,
            share_low=None if ends is None else ends[0],
            share_high=None if ends is None else ends[1],
            num_items=self._part.num_items,
        )


def _without_interval(data: PairData, series: Sequence[Series]) -> Iterator[ArmValue]:
    """Yield what has no honest interval: numbers at the threshold that is best on test, and those of the map."""
    gold = data.test.scores
    assert gold is not None, "labelled pairs have labels"
    rows: dict[tuple[str, str], list[float]] = {}
    for one in series:
        similarity = one.arrays["similarity"][0]
        found: dict[str, float] = {}
        if best := pair_metrics.best_threshold(gold, similarity, metric="f1"):
            found["f1_best_threshold"] = best.value
            called = similarity >= best.threshold
            found["false_positives_best_threshold"] = float(np.count_nonzero(called & (gold == 0)))
        if "map_items" in one.arrays:
            clusters, labels = one.arrays["map_clusters"], (gold[one.arrays["map_items"]] == 1).astype(np.int64)
            kept = clusters >= 0
            found["map_noise"] = float(1 - kept.mean())
            if kept.any():
                once = np.ones((int(kept.sum()), 1))
                own = cluster_metrics.purity(once, labels=labels[kept], clusters=clusters[kept][np.newaxis])[0, 0]
                found["map_purity"] = float(own)
        for metric, value in found.items():
            rows.setdefault((one.arm, metric), []).append(value)
    for (arm, metric), numbers in rows.items():
        if np.isfinite(numbers).all() and len(numbers) == sum(one.arm == arm for one in series):
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
                optimistic=metric.endswith("_best_threshold"),
            )
