"""Scores with intervals, from arrays of labels and predictions.

Labels and predictions are class numbers, 0..num_classes-1. Scores are 0..1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import special, stats
from sklearn import metrics

from pipeline.records import Confusion

Ints = npt.NDArray[np.integer[Any]]
Floats = npt.NDArray[np.floating[Any]]
Bools = npt.NDArray[np.bool_]

CONFIDENCE = 0.95
"""Confidence level of all intervals."""


@dataclass(frozen=True)
class Interval:
    """Both ends of a 95 % interval."""

    low: float
    high: float


@dataclass(frozen=True)
class Score:
    """Scores of one column of the score table, with the interval of its accuracy."""

    accuracy: float
    macro_f1: float
    average_precision: float | None
    """Average precision, for two classes only."""
    low: float
    high: float


def score_predictions(
    labels: Ints,
    predictions: Ints,
    *,
    num_classes: int,
    positive_scores: Floats | None = None,
    bootstrap_draws: int,
    seed: int,
) -> Score:
    """Score one prediction per test text, with a bootstrap interval over the texts (Efron 1979).

    Args:
        labels: True class of each text, int (n,), n at least 1.
        predictions: Predicted class of each text, int (n,).
        num_classes: Number of classes of the data set.
        positive_scores: Score of class 1 for each text, on any scale, float (n,).
        bootstrap_draws: Number of resamples of the texts.
        seed: Seed of the resamples.
    Returns: Macro-F1 is the mean over the classes that occur in ``labels`` or ``predictions``. Average precision is
        None without ``positive_scores``, unless there are two classes, or if ``labels`` has a single class.
    """
    assert len(labels) > 0, "no text to score"
    assert labels.shape == predictions.shape == (len(labels),), (
        f"labels {labels.shape}, predictions {predictions.shape}"
    )
    lowest, highest = min(labels.min(), predictions.min()), max(labels.max(), predictions.max())
    assert 0 <= lowest <= highest < num_classes, f"classes {lowest}..{highest} in a data set of {num_classes}"
    num_right = int(np.count_nonzero(labels == predictions))
    interval = _accuracy_interval(num_right, len(labels), draws=bootstrap_draws, seed=seed)
    return Score(
        accuracy=num_right / len(labels),
        macro_f1=float(metrics.f1_score(labels, predictions, average="macro", zero_division=0.0)),
        average_precision=_average_precision(labels, positive_scores) if num_classes == 2 else None,
        low=interval.low,
        high=interval.high,
    )


def score_of_draws(
    accuracies: Sequence[float], macro_f1s: Sequence[float], average_precisions: Sequence[float] | None
) -> Score:
    """Mean scores over few-shot draws, with Student's t-interval of the mean accuracy, cut to 0..1.

    Args:
        accuracies: Accuracy of each draw, 0..1, at least one.
        macro_f1s: Macro-F1 of each draw.
        average_precisions: Average precision of each draw. None unless there are two classes.
    Returns: The interval is 0..1 if there is a single draw, because the spread is unknown.
    """
    assert len(accuracies) > 0, "no draw to average"
    assert len(accuracies) == len(macro_f1s), f"{len(accuracies)} accuracies, {len(macro_f1s)} macro-F1s"
    assert average_precisions is None or len(average_precisions) == len(accuracies), (
        "not one average precision per draw"
    )
    interval = _mean_interval(np.asarray(accuracies, dtype=np.float64))
    return Score(
        accuracy=float(np.mean(accuracies)),
        macro_f1=float(np.mean(macro_f1s)),
        average_precision=None if average_precisions is None else float(np.mean(average_precisions)),
        low=interval.low,
        high=interval.high,
    )


def accuracy_without(labels: Ints, predictions: Ints, excluded: Bools) -> float | None:
    """Accuracy over the texts that are not excluded. None if no text is left.

    Args:
        labels: Int (n,).
        predictions: Int (n,).
        excluded: True for texts that do not count, bool (n,).
    """
    assert labels.shape == predictions.shape == excluded.shape, f"{labels.shape}, {predictions.shape}, {excluded.shape}"
    assert excluded.dtype == np.bool_, f"excluded is {excluded.dtype}, not bool"
    right = (labels == predictions)[~excluded]
    return float(right.mean()) if len(right) else None


def confusions(labels: Ints, predictions: Ints, label_names: Sequence[str], *, most: int = 10) -> tuple[Confusion, ...]:
    """Most frequent pairs of a true and a wrongly predicted label.

    Args:
        labels: Int (n,).
        predictions: Int (n,).
        label_names: Names of classes 0, 1, …
        most: Maximum number of pairs.
    Returns: Most frequent pair first. Equally frequent pairs are in the order of their class numbers.
    """
    assert labels.shape == predictions.shape, f"labels {labels.shape}, predictions {predictions.shape}"
    wrong = labels != predictions
    # unique() sorts by label, then prediction. The stable sort below keeps that order among equals.
    pairs, counts = np.unique(np.stack([labels[wrong], predictions[wrong]], axis=1), axis=0, return_counts=True)
    ranking = np.argsort(-counts, kind="stable")[:most]
    return tuple(
        Confusion(
            label=label_names[pairs[i, 0]],
            predicted=label_names[pairs[i, 1]],
            num_texts=int(counts[i]),
            num_of_label=int(np.count_nonzero(labels == pairs[i, 0])),
        )
        for i in ranking
    )


def _accuracy_interval(num_right: int, num_texts: int, *, draws: int, seed: int) -> Interval:
    if num_right in (0, num_texts):
        return _clopper_pearson(num_right, num_texts)
    # The number of correct texts among n drawn with replacement is binomial, so no index array is needed.
    resampled = np.random.default_rng(seed).binomial(num_texts, num_right / num_texts, size=draws) / num_texts
    low, high = np.quantile(resampled, interval_tails())
    return Interval(float(low), float(high))


def _clopper_pearson(num_right: int, num_texts: int) -> Interval:
    # If all texts are correct or all are wrong, every resample is the same, and a bootstrap would claim certainty.
    exact = stats.binomtest(num_right, num_texts).proportion_ci(CONFIDENCE, method="exact")
    return Interval(float(exact.low), float(exact.high))


def lower_end(num_right: int, num_texts: int, *, level: float) -> float:
    """Lower end of the one-sided exact interval of an accuracy, with error probability ``level``."""
    return float(special.betaincinv(num_right, num_texts - num_right + 1, level)) if num_right else 0.0


def _average_precision(labels: Ints, positive_scores: Floats | None) -> float | None:
    if positive_scores is None or len(np.unique(labels)) < 2:
        return None
    assert positive_scores.shape == labels.shape, f"scores {positive_scores.shape}, labels {labels.shape}"
    return float(metrics.average_precision_score(labels == 1, positive_scores))


def _mean_interval(values: npt.NDArray[np.float64]) -> Interval:
    if len(values) == 1:
        return Interval(0.0, 1.0)
    standard_error = values.std(ddof=1) / math.sqrt(len(values))
    half = float(special.stdtrit(len(values) - 1, interval_tails()[1]) * standard_error)
    mean = float(values.mean())
    return Interval(max(0.0, mean - half), min(1.0, mean + half))


def interval_tails() -> tuple[float, float]:
    """Quantiles at the lower and upper end of an interval."""
    return (1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2


def check_rows(values: Floats, labels: Ints) -> None:
    """Assert that there is one row of values per label, and at least one row."""
    assert len(labels) > 0, "no text to measure"
    assert values.ndim == 2 and labels.shape == (len(values),), (
        f"expected (n, classes) and (n,), found {values.shape} and {labels.shape}"
    )
