"""Paired tests of two predictors on the same texts, and the correction for several tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse, stats

from pipeline.evaluation.metrics import Counts, macro_f1
from pipeline.evaluation.scores import Interval, Ints, interval_tails
from pipeline.records import Comparison, MainMetric

_RANDOMISATION_ROUNDS, _SWAPS_PER_ROUND = 40, 50  # in rounds, because all draws at once may not fit in memory


def mcnemar(labels: Ints, first: Ints, second: Ints) -> Comparison:
    """Compare two predictions of the same texts by McNemar's exact test (McNemar 1947), two-sided.

    Only texts that exactly one of the two labels correctly count. If both are equally good, each such text is a fair
    coin toss.

    Args:
        labels: Int (n,).
        first: Predictions of the head, int (n,).
        second: Predictions of the probe, int (n,).
    Returns: ``p_value`` is 1 if there is no such text.
    """
    assert labels.shape == first.shape == second.shape, f"{labels.shape}, {first.shape}, {second.shape}"
    first_right, second_right = labels == first, labels == second
    only_first = int(np.count_nonzero(first_right & ~second_right))
    only_second = int(np.count_nonzero(second_right & ~first_right))
    num_discordant = only_first + only_second
    p_value = float(stats.binomtest(only_first, num_discordant, 0.5).pvalue) if num_discordant else 1.0
    # The sum over both tails of a symmetric distribution may exceed 1 by a rounding error.
    return Comparison(only_head=only_first, only_probe=only_second, p_value=min(p_value, 1.0))


def compare_paired(
    labels: Ints, first: Ints, second: Ints, *, num_classes: int, main_metric: MainMetric, seed: int
) -> Comparison:
    """Compare two predictions of the same texts by McNemar's test, and by macro-F1 if that is the main metric.

    Args:
        labels: Int (n,).
        first: Predictions of the head, int (n,).
        second: Predictions of the probe, int (n,).
        num_classes: Number of classes in the data set.
        main_metric: Metric by which the two are compared.
        seed: Seed of the randomisation test.
    """
    comparison = mcnemar(labels, first, second)
    if main_metric == "accuracy":
        return comparison
    gain, p_value = _macro_f1_test(labels, first, second, num_classes=num_classes, seed=seed)
    return comparison.model_copy(
        update={"main_metric": main_metric, "macro_f1_gain": gain, "macro_f1_p_value": p_value}
    )


def paired_difference(labels: Ints, first: Ints, second: Ints, *, draws: int = 10_000, seed: int = 0) -> Interval:
    """95 % bootstrap interval of the accuracy of ``first`` minus that of ``second``.

    Each draw takes texts with both predictions, so errors that the two share do not widen the interval.

    Args:
        labels: True class of each text, int (n,), n at least 1.
        first: Predicted class of each text, int (n,).
        second: Predicted class by the other classifier, int (n,).
    """
    gain = (first == labels).astype(np.int64) - (second == labels)
    shares = np.array([(gain > 0).mean(), (gain < 0).mean(), (gain == 0).mean()])
    drawn = np.random.default_rng(seed).multinomial(len(labels), shares, size=draws)
    low, high = np.quantile((drawn[:, 0] - drawn[:, 1]) / len(labels), interval_tails())
    return Interval(float(low), float(high))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction for several tests at once (Holm 1979).

    Args:
        p_values: P-value of each test. None for a test that was not made, which does not count.
    Returns: Corrected p-values in the same order, at most 1.
    """
    tested = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p_value, index) in enumerate(tested):
        assert 0 <= p_value <= 1, f"p value {p_value}"
        largest = max(largest, min(1.0, (len(tested) - rank) * p_value))
        corrected[index] = largest
    return corrected


def _macro_f1_test(labels: Ints, first: Ints, second: Ints, *, num_classes: int, seed: int) -> tuple[float, float]:
    """Macro-F1 of ``first`` minus that of ``second``, and a two-sided paired randomisation test of it.

    If both are equally good, predictions can be exchanged between them: each draw swaps the two predictions of every
    text with probability 1/2. The observed difference counts as a draw, so the p-value is never 0.
    Sources: Noreen 1989; Yeh 2000.
    """
    one, other = (np.stack(_label_counts(labels, predicted, num_classes)) for predicted in (first, second))
    present = np.bincount(labels, minlength=num_classes)
    observed = _macro_f1(one, present) - _macro_f1(other, present)
    differing = first != second
    labels, first, second = labels[differing], first[differing], second[differing]
    # Change of the first classifier's counts if a text is swapped. Sparse, because it affects two of many classes.
    ends = np.tile(np.arange(len(labels)), 2), np.concatenate([second, first])
    of_correct = np.concatenate([second == labels, -1 * (first == labels)])
    of_predicted = np.repeat([1, -1], len(labels))
    moved = [
        sparse.csr_array((counts, ends), shape=(len(labels), num_classes)) for counts in (of_correct, of_predicted)
    ]
    random = np.random.default_rng(seed)
    extreme = 1
    for _ in range(_RANDOMISATION_ROUNDS):
        draws = random.integers(2, size=(_SWAPS_PER_ROUND, len(labels)))
        swapped = np.stack([draws @ counts for counts in moved])  # (2, draws, classes)
        differences = _macro_f1(one[:, None] + swapped, present) - _macro_f1(other[:, None] - swapped, present)
        extreme += int(np.count_nonzero(np.abs(differences) >= abs(observed) - 1e-9))
    return float(observed), extreme / (_RANDOMISATION_ROUNDS * _SWAPS_PER_ROUND + 1)


def _label_counts(labels: Ints, predictions: Ints, num_classes: int) -> tuple[Ints, Ints]:
    """Correctly predicted texts of each class, and all texts predicted as each class, both int (classes,)."""
    correct = np.bincount(labels[labels == predictions], minlength=num_classes)
    return correct, np.bincount(predictions, minlength=num_classes)


def _macro_f1(counts: npt.NDArray[Any], present: Ints) -> npt.NDArray[Any]:
    """Macro-F1 (...) of the arrays of ``_label_counts`` (2, ..., classes), with ``present`` texts of each class."""
    correct, predicted = counts.astype(np.float64)
    return macro_f1(Counts(correct, present.astype(np.float64), predicted))
