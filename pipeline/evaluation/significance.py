"""Paired tests of two predictors on the same texts, and the correction for several tests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import sparse, stats

from pipeline.evaluation.scores import (
    RANDOMISATION_ROUNDS,
    SWAPS_PER_ROUND,
    Interval,
    Ints,
    interval_tails,
    label_counts,
    macro_f1,
)
from pipeline.records import Comparison, MainMetric


def mcnemar(labels: Ints, first: Ints, second: Ints) -> Comparison:
    """Compare two predictions of the same texts by McNemar's exact test (McNemar 1947), two-sided.

    Only texts that exactly one of the two gets right count: if both are equally good, each of these is a fair coin.

    Args:
        labels: Int (n,).
        first: The head's predictions, int (n,).
        second: The probe's, int (n,).
    Returns: ``p_value`` is 1 if there is no such text.
    """
    assert labels.shape == first.shape == second.shape, f"{labels.shape}, {first.shape}, {second.shape}"
    first_right, second_right = labels == first, labels == second
    only_first = int(np.count_nonzero(first_right & ~second_right))
    only_second = int(np.count_nonzero(second_right & ~first_right))
    num_discordant = only_first + only_second
    p_value = float(stats.binomtest(only_first, num_discordant, 0.5).pvalue) if num_discordant else 1.0
    # The sum over both tails of a symmetric distribution may come out a rounding error above 1.
    return Comparison(only_head=only_first, only_probe=only_second, p_value=min(p_value, 1.0))


def compare_paired(
    labels: Ints, first: Ints, second: Ints, *, num_classes: int, main_metric: MainMetric, seed: int
) -> Comparison:
    """Compare two predictions of the same texts by McNemar's test and, where that is the main metric, by their macro-F1.

    Args:
        labels: Int (n,).
        first: The head's predictions, int (n,).
        second: The probe's, int (n,).
        num_classes: Number of classes in the data set.
        main_metric: The score by which the two are judged.
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
    """95 % interval of how much higher the accuracy of ``first`` is than that of ``second``, by a bootstrap over the texts.

    Each draw takes texts with both their predictions, so what is common to the two does not widen the interval.

    Args:
        labels: True class of each text, int (n,), n at least 1.
        first: Predicted class of each text, int (n,).
        second: The same of the other classifier.
    """
    gain = (first == labels).astype(np.int64) - (second == labels)
    shares = np.array([(gain > 0).mean(), (gain < 0).mean(), (gain == 0).mean()])
    drawn = np.random.default_rng(seed).multinomial(len(labels), shares, size=draws)
    low, high = np.quantile((drawn[:, 0] - drawn[:, 1]) / len(labels), interval_tails())
    return Interval(float(low), float(high))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction for several tests at once (Holm 1979).

    Args:
        p_values: One per test, in any order; None where no test was made, which does not count as one.
    Returns: In the same order; never below the value given, at most 1.
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
    """How much higher the macro-F1 of ``first`` is, and the p-value of a paired randomisation test (Noreen 1989; Yeh 2000), two-sided.

    If both are equally good, it does not matter which of the two a prediction comes from: each draw swaps the two predictions of every
    text with probability 1/2. The observed difference counts as a draw, so the p-value is never 0.
    """
    one, other = (np.stack(label_counts(labels, predicted, num_classes)) for predicted in (first, second))
    present = np.bincount(labels, minlength=num_classes)
    observed = macro_f1(one, present) - macro_f1(other, present)
    differing = first != second
    labels, first, second = labels[differing], first[differing], second[differing]
    # What a swap of each text adds to the counts of the first; sparse, because it touches two of perhaps thousands of classes.
    ends = np.tile(np.arange(len(labels)), 2), np.concatenate([second, first])
    of_found = np.concatenate([second == labels, -1 * (first == labels)])
    of_predicted = np.repeat([1, -1], len(labels))
    moved = [sparse.csr_array((counts, ends), shape=(len(labels), num_classes)) for counts in (of_found, of_predicted)]
    random = np.random.default_rng(seed)
    extreme = 1
    for _ in range(RANDOMISATION_ROUNDS):
        draws = random.integers(2, size=(SWAPS_PER_ROUND, len(labels)))
        swapped = np.stack([draws @ counts for counts in moved])  # (2, draws, classes)
        differences = macro_f1(one[:, None] + swapped, present) - macro_f1(other[:, None] - swapped, present)
        extreme += int(np.count_nonzero(np.abs(differences) >= abs(observed) - 1e-9))
    return float(observed), extreme / (RANDOMISATION_ROUNDS * SWAPS_PER_ROUND + 1)
