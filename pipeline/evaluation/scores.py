"""Scores, their intervals, paired tests and calibration, from arrays of labels, predictions and logits.

Knows no encoder, no data set and no file. Labels and predictions are class numbers, 0..num_classes-1; a score is 0..1.
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
"""Of every interval here."""


RANDOMISATION_ROUNDS, SWAPS_PER_ROUND = 40, 50  # in parts, because all draws at once may not fit in memory


@dataclass(frozen=True)
class Interval:
    """Both ends of a 95 % interval."""

    low: float
    high: float


@dataclass(frozen=True)
class Score:
    """How well one column of the score table classifies; the interval is the accuracy's."""

    accuracy: float
    macro_f1: float
    average_precision: float | None
    """Only for two classes."""
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
        num_classes: That the data set has; with two there is an average precision.
        positive_scores: How much each text belongs to class 1, on any scale, float (n,).
        bootstrap_draws: Resamples of the texts.
        seed: Of the resamples.
    Returns: Macro-F1 is the mean over the classes that occur in ``labels`` or ``predictions``. Average precision is None
        without ``positive_scores``, with other than two classes, or if ``labels`` holds one class only.
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
        accuracies: One per draw, 0..1, at least one.
        macro_f1s: One per draw.
        average_precisions: One per draw; None for other than two classes.
    Returns: A single draw says nothing of the spread: its interval is 0..1.
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
    """Accuracy over the texts that are not excluded; None if none is left.

    Args:
        labels: Int (n,).
        predictions: Int (n,).
        excluded: True for a text that does not count, bool (n,).
    """
    assert labels.shape == predictions.shape == excluded.shape, f"{labels.shape}, {predictions.shape}, {excluded.shape}"
    assert excluded.dtype == np.bool_, f"excluded is {excluded.dtype}, not bool"
    right = (labels == predictions)[~excluded]
    return float(right.mean()) if len(right) else None


def confusions(labels: Ints, predictions: Ints, label_names: Sequence[str], *, most: int = 10) -> tuple[Confusion, ...]:
    """The pairs of true and wrongly predicted label that occur most often.

    Args:
        labels: Int (n,).
        predictions: Int (n,).
        label_names: Name of class 0, 1, …
        most: Pairs at most.
    Returns: Most frequent first; equally frequent pairs in the order of their class numbers.
    """
    assert labels.shape == predictions.shape, f"labels {labels.shape}, predictions {predictions.shape}"
    wrong = labels != predictions
    # unique() sorts by label, then prediction; the stable sort below keeps that order among equals.
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
    # Drawing n texts with replacement and counting the right ones is one binomial draw: no index array is needed.
    resampled = np.random.default_rng(seed).binomial(num_texts, num_right / num_texts, size=draws) / num_texts
    low, high = np.quantile(resampled, interval_tails())
    return Interval(float(low), float(high))


def _clopper_pearson(num_right: int, num_texts: int) -> Interval:
    # All right or all wrong: every resample is the same and the bootstrap would claim certainty, even from one text.
    exact = stats.binomtest(num_right, num_texts).proportion_ci(CONFIDENCE, method="exact")
    return Interval(float(exact.low), float(exact.high))


def lower_end(num_right: int, num_texts: int, *, level: float) -> float:
    """The lowest share of right texts that is not refuted at the level by so many right ones: 0 where none is right."""
    return float(special.betaincinv(num_right, num_texts - num_right + 1, level)) if num_right else 0.0


def label_counts(labels: Ints, predictions: Ints, num_classes: int) -> tuple[Ints, Ints]:
    """Texts of each class that are found, and texts that each class is predicted for, both (classes,)."""
    return np.bincount(labels[labels == predictions], minlength=num_classes), np.bincount(
        predictions, minlength=num_classes
    )


def macro_f1(counts: npt.NDArray[Any], present: Ints) -> npt.NDArray[Any]:
    """Mean F1 over the classes that occur in labels or predictions, (...), from counts (2, ..., classes) as ``label_counts`` gives them."""
    found, predicted = counts
    total = predicted + present
    occurs = total > 0
    f1 = np.divide(2 * found, total, out=np.zeros(total.shape), where=occurs)
    scores: npt.NDArray[Any] = f1.sum(axis=-1) / occurs.sum(axis=-1)
    return scores


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
    """Lower and upper quantile of an interval."""
    return (1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2


def check_rows(values: Floats, labels: Ints) -> None:
    """Assert that there is one row of values for each label, and at least one."""
    assert len(labels) > 0, "no text to measure"
    assert values.ndim == 2 and labels.shape == (len(values),), (
        f"expected (n, classes) and (n,), found {values.shape} and {labels.shape}"
    )
