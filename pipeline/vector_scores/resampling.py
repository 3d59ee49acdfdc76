"""Cluster bootstrap over texts: intervals, and paired differences.

Texts repeat over pairs, so pairs are no independent draws. Pairs that share a text, directly or through other pairs,
form a group. A sample draws as many groups as there are, with replacement, and takes each with all its pairs (Efron
1979). All columns and widths see the same samples, so their differences are paired.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import sparse
from scipy.sparse import csgraph

from pipeline.evaluation.metrics import Estimate
from pipeline.evaluation.scores import Floats, Ints, interval_tails

Statistic = Callable[[Floats], Floats]
"""Function of weights (items, samples) that returns one number per series and sample, (series, samples)."""

FEWEST_GROUPS = 10
"""Groups below which there is no interval: resamples of so few groups vary too little."""

_CELLS_AT_ONCE = 2**19  # 4 MB of weights, which stay in the cache


@dataclass(frozen=True)
class Gain:
    """A paired difference of two series, with its 95 % interval."""

    gain: float
    low: float | None
    """Lower end. None if there are fewer than ``FEWEST_GROUPS`` groups of texts."""
    high: float | None
    p_value: float
    """Two-sided, above 0. 1 if there is no interval."""


@dataclass(frozen=True)
class Resampled:
    """A metric of several series, on all items and in samples of them."""

    values: npt.NDArray[np.float64]
    """Metric on all items, float64 (series,). nan if they do not define it."""
    drawn: npt.NDArray[np.float64]
    """Metric in each sample, float64 (series, samples). No samples if there are fewer than ``FEWEST_GROUPS`` groups."""

    @property
    def is_defined(self) -> bool:
        """Whether the items define the metric for every series."""
        return bool(np.isfinite(self.values).all())

    def estimate(self, series: int) -> Estimate:
        """Value of a series and its interval. No interval if all samples are equal, which would look certain."""
        value, ends = float(self.values[series]), interval(self.drawn[series])
        if ends is None or ends[0] == ends[1]:
            return Estimate(value)
        return Estimate(value, *ends)

    def gain(self, series: int, *, over: int) -> Gain:
        """Value of a series minus that of another, with the paired percentile interval and its test."""
        gain = float(self.values[series] - self.values[over])
        differences = self.drawn[series] - self.drawn[over]
        ends = interval(differences)
        if ends is None:
            return Gain(gain, None, None, 1.0)
        differences = differences[np.isfinite(differences)]
        # The observed difference counts as a draw on both sides, so the p-value is never 0.
        tail = min(np.count_nonzero(differences <= 0), np.count_nonzero(differences >= 0))
        return Gain(gain, *ends, min(1.0, 2 * (int(tail) + 1) / (len(differences) + 1)))


def text_groups(columns: Sequence[Sequence[str]]) -> npt.NDArray[np.int64]:
    """Number of the group of each row, int64 (rows,). Rows that share a text, directly or through others, form a group.

    Args:
        columns: Texts of the rows, one or more columns of equal length. A text is the same text in every column.
    """
    numbers: dict[str, int] = {}
    nodes = [[numbers.setdefault(text, len(numbers)) for text in column] for column in columns]
    first = nodes[0]
    ends = (np.array(first * len(nodes)), np.concatenate(nodes))
    graph = sparse.coo_array((np.ones(len(ends[0])), ends), shape=(len(numbers), len(numbers)))
    groups: npt.NDArray[np.int64] = csgraph.connected_components(graph, directed=False)[1][first].astype(np.int64)
    return groups


def resample(statistics: Mapping[str, Statistic], groups: Ints, *, draws: int, seed: int) -> dict[str, Resampled]:
    """Compute metrics on all items, and in samples that draw whole groups of them with replacement.

    Args:
        statistics: Metrics by name, all of the same items.
        groups: Group of each item, int (items,), at least one item.
        draws: Number of samples, which all metrics share.
        seed: Seed of the samples.
    """
    _, group, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    whole = np.ones((len(group), 1))
    values = {name: np.asarray(statistic(whole), dtype=np.float64)[:, 0] for name, statistic in statistics.items()}
    drawn: dict[str, list[Floats]] = {name: [found[:, np.newaxis][:, :0]] for name, found in values.items()}
    at_once = max(1, _CELLS_AT_ONCE // len(group))
    random = np.random.default_rng(seed)
    for start in range(0, draws if len(sizes) >= FEWEST_GROUPS else 0, at_once):
        chosen = random.integers(len(sizes), size=(min(at_once, draws - start), len(sizes)))
        weights = np.stack([np.bincount(row, minlength=len(sizes)) for row in chosen], axis=1)[group]
        for name, statistic in statistics.items():
            drawn[name].append(statistic(weights.astype(np.float64)))
    return {name: Resampled(found, np.concatenate(drawn[name], axis=1)) for name, found in values.items()}


def interval(drawn: Floats) -> tuple[float, float] | None:
    """Ends of the percentile interval. None without samples that define the number."""
    defined = drawn[np.isfinite(drawn)]
    if not len(defined):
        return None
    low, high = np.quantile(defined, interval_tails())
    return float(low), float(high)
