"""Metrics of scored pairs of texts, of many series of similarities in many weighted samples at once.

All functions take ``weights``, float (items, samples): how often each sample has each item. A metric with integer
weights equals that of repeated rows. They take ``series``, float (series, items), and return float64
(series, samples). A metric that a sample does not define is nan.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from pipeline.evaluation.scores import Bools, Floats, Ints

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Threshold:
    """Similarity from which a pair is called positive, and the metric there on the pairs that chose it."""

    threshold: float
    value: float


def spearman(weights: Floats, *, gold: Floats, series: Floats) -> Array:
    """Rank correlation of similarities with scores, -1..1. Ties get the middle of their ranks.

    0 if a sample's similarities are all equal, nan if its scores are.

    Args:
        weights: Float (items, samples).
        gold: Scores, float (items,).
        series: Similarities, float (series, items).
    """
    half = weights.sum(axis=0) / 2
    (ranked,) = _groups(gold[np.newaxis])
    centred = np.empty_like(weights)
    centred[ranked.order] = (_middles(ranked.sums(weights)) - half)[ranked.number]
    weighted = weights * centred
    gold_square = (weighted * centred).sum(axis=0)
    found = []
    for group in _groups(series):
        sums = group.sums(weights)
        rank = _middles(sums) - half
        together = np.einsum("gs,gs->s", group.sums(weighted), rank)
        square = np.einsum("gs,gs,gs->s", sums, rank, rank)
        found.append(_ratio(together, np.sqrt(square * gold_square)))
    return np.where(gold_square > 0, np.stack(found), np.nan)


def pearson(weights: Floats, *, gold: Floats, series: Floats) -> Array:
    """Linear correlation of similarities with scores, -1..1. Arguments and special cases are those of ``spearman``."""
    total = weights.sum(axis=0)
    gold, series = gold - gold.mean(), series - series.mean(axis=1, keepdims=True)
    gold_mean, means = gold @ weights / total, series @ weights / total
    gold_square = _spread(gold**2 @ weights / total, gold_mean)
    square = _spread(series**2 @ weights / total, means)
    together = (series * gold) @ weights / total - means * gold_mean
    found = np.clip(_ratio(together, np.sqrt(square * gold_square)), -1, 1)
    return np.where(gold_square > 0, found, np.nan)


def average_precision(weights: Floats, *, gold: Floats, series: Floats) -> Array:
    """Average precision of the similarities as a ranking of the positive pairs, 0..1.

    nan if a sample has one label only.

    Args:
        weights: Float (items, samples).
        gold: Labels 0 and 1, (items,).
        series: Similarities, float (series, items).
    """
    positive, num_positive, num_negative = _by_label(weights, gold)
    found = []
    for group in _groups(-series):
        right = group.sums(positive)
        precision = _ratio(right.cumsum(axis=0), group.sums(weights).cumsum(axis=0))
        found.append(_ratio((right * precision).sum(axis=0), num_positive))
    return np.where((num_positive > 0) & (num_negative > 0), np.stack(found), np.nan)


def auc(weights: Floats, *, gold: Floats, series: Floats) -> Array:
    """Probability that a positive pair is more similar than a negative one, 0..1. Equal similarities count half.

    Arguments and the special case are those of ``average_precision``.
    """
    positive, num_positive, num_negative = _by_label(weights, gold)
    found = []
    for group in _groups(series):
        # Pairs below each positive one, of which num_positive**2 / 2 are positive themselves.
        below = (group.sums(positive) * _middles(group.sums(weights))).sum(axis=0)
        found.append(_ratio(below - num_positive**2 / 2, num_positive * num_negative))
    return np.where((num_positive > 0) & (num_negative > 0), np.stack(found), np.nan)


def margin(weights: Floats, *, gold: Floats, series: Floats) -> Array:
    """Mean similarity of the positive pairs minus that of the negative ones, -2..2.

    Arguments and the special case are those of ``average_precision``.
    """
    positive, num_positive, num_negative = _by_label(weights, gold)
    found = _ratio(series @ positive, num_positive) - _ratio(series @ (weights - positive), num_negative)
    return np.where((num_positive > 0) & (num_negative > 0), found, np.nan)


def cohens_d(weights: Floats, *, gold: Floats, series: Floats) -> Array:
    """Margin in standard deviations within a label, pooled over both labels by their numbers of pairs (Cohen 1988).

    nan also if the similarities of each label are all equal. Arguments are those of ``average_precision``.
    """
    series = series - series.mean(axis=1, keepdims=True)  # exact for small deviations from a large mean
    positive, num_positive, num_negative = _by_label(weights, gold)
    within = np.zeros((len(series), weights.shape[1]))
    for part, count in ((positive, num_positive), (weights - positive, num_negative)):
        within += count * _spread(_ratio(series**2 @ part, count), _ratio(series @ part, count))
    variance = _ratio(within, num_positive + num_negative - 2)
    found = _ratio(margin(weights, gold=gold, series=series), np.sqrt(variance))
    return np.where(variance > 0, found, np.nan)


def accuracy(weights: Floats, *, gold: Floats, series: Floats, thresholds: Floats) -> Array:
    """Fraction of the pairs on the right side of a threshold, 0..1.

    Args:
        weights: Float (items, samples).
        gold: Labels 0 and 1, (items,).
        series: Similarities, float (series, items).
        thresholds: Smallest similarity of a positive pair, float (series,).
    """
    right = (series >= thresholds[:, np.newaxis]) == (gold == 1)
    return np.asarray(right.astype(np.float64) @ weights / weights.sum(axis=0))


def f1(weights: Floats, *, gold: Floats, series: Floats, thresholds: Floats) -> Array:
    """F1 of the positive label at a threshold, 0..1. nan if a sample has no positive pair.

    Arguments are those of ``accuracy``.
    """
    called = (series >= thresholds[:, np.newaxis]).astype(np.float64)
    positive = (gold == 1).astype(np.float64)
    num_positive = positive @ weights
    found = _ratio(2 * (called * positive) @ weights, called @ weights + num_positive)
    return np.where(num_positive > 0, found, np.nan)


def precision(weights: Floats, *, gold: Floats, series: Floats, thresholds: Floats) -> Array:
    """Share of positive pairs among those above a threshold, 0..1. 0 if none is above.

    Arguments are those of ``accuracy``.
    """
    called = (series >= thresholds[:, np.newaxis]).astype(np.float64)
    return _ratio((called * (gold == 1)) @ weights, called @ weights)


def recall(weights: Floats, *, gold: Floats, series: Floats, thresholds: Floats) -> Array:
    """Share of the positive pairs that are above a threshold, 0..1. nan if a sample has no positive pair.

    Arguments are those of ``accuracy``.
    """
    return _share_called(weights, gold == 1, series=series, thresholds=thresholds)


def false_positive_rate(weights: Floats, *, gold: Floats, series: Floats, thresholds: Floats) -> Array:
    """Share of the negative pairs that are above a threshold, 0..1. nan if a sample has no negative pair.

    Arguments are those of ``accuracy``.
    """
    return _share_called(weights, gold != 1, series=series, thresholds=thresholds)


def _share_called(weights: Floats, members: Bools, *, series: Floats, thresholds: Floats) -> Array:
    called = (series >= thresholds[:, np.newaxis]).astype(np.float64)
    count = members.astype(np.float64) @ weights
    return np.where(count > 0, _ratio((called * members) @ weights, count), np.nan)


def mean(weights: Floats, *, series: Floats) -> Array:
    """Mean of values of the items. ``series`` are the values, float (series, items)."""
    return np.asarray(series @ weights / weights.sum(axis=0))


def best_threshold(gold: Floats, similarities: Floats, *, metric: Literal["accuracy", "f1"]) -> Threshold | None:
    """Threshold with the largest accuracy or F1 on some pairs: the middle between two neighbours, or an end.

    Of equally good thresholds the largest is taken. Equal similarities stay on one side.

    Args:
        gold: Labels 0 and 1, (items,).
        similarities: Float (items,).
        metric: Metric to maximise.
    Returns: None if there are not both labels.
    """
    if len(np.unique(gold)) < 2:
        return None
    values, counts = np.unique(-similarities, return_counts=True)
    cuts = -values
    called = np.concatenate([[0], counts.cumsum()])
    right = np.bincount(np.searchsorted(values, -similarities), weights=gold == 1, minlength=len(values))
    hits = np.concatenate([[0], right.cumsum()])
    num_positive = hits[-1]
    scores: Array
    if metric == "f1":
        scores = 2 * hits / (called + num_positive)
    else:
        scores = (hits + (len(gold) - num_positive) - (called - hits)) / len(gold)
    best = int(scores.argmax())
    # With `best` groups called positive, the threshold lies below the last of them.
    ends = np.concatenate([[np.nextafter(cuts[0], np.inf)], (cuts[:-1] + cuts[1:]) / 2, cuts[-1:]])
    return Threshold(float(ends[best]), float(scores[best]))


def _by_label(weights: Floats, gold: Floats) -> tuple[Array, Array, Array]:
    """Weights of the positive pairs, (items, samples), and the number of positive and of negative pairs, (samples,)."""
    positive: Array = weights * (gold == 1)[:, np.newaxis]
    num_positive = positive.sum(axis=0)
    return positive, num_positive, weights.sum(axis=0) - num_positive


@dataclass(frozen=True)
class _Groups:
    """Items of one series in ascending order, equal values as one group."""

    order: Ints
    starts: Ints
    """Position in ``order`` of the first item of each group."""
    number: Ints
    """Group of each position in ``order``."""

    def sums(self, weights: Floats) -> Array:
        """Sum of the weights of each group, (groups, samples)."""
        in_order: Array = weights[self.order].astype(np.float64, copy=False)
        if len(self.starts) == len(self.order):
            return in_order
        return np.add.reduceat(in_order, self.starts, axis=0)


def _groups(series: Floats) -> Iterator[_Groups]:
    for values in series:
        order = np.argsort(values, kind="stable")
        is_start: Bools = np.concatenate([[True], np.diff(values[order]) > 0])
        yield _Groups(order, np.flatnonzero(is_start), np.cumsum(is_start) - 1)


def _middles(sums: Floats) -> Array:
    """Middle of the ranks of each group in each sample, from the sums of their weights, (groups, samples)."""
    return np.asarray(sums.cumsum(axis=0) - sums / 2)


def _ratio(part: Floats, whole: Floats) -> Array:
    """Quotient. 0 if the divisor is 0."""
    part, whole = np.broadcast_arrays(part, whole)
    return np.divide(part, whole, out=np.zeros(part.shape), where=whole > 0)


def _spread(square: Floats, mean_value: Floats) -> Array:
    """Variance from the mean of the squares. 0 if it is no more than their rounding error."""
    variance = square - mean_value**2
    return np.where(variance > 1e-12 * np.maximum(square, 1e-300), variance, 0.0)
