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
from scipy import optimize, sparse, special, stats
from sklearn import metrics

from pipeline.errors import LorafleetError
from pipeline.records import Calibration, Comparison, Confusion, CoverageRow, MainMetric, ReliabilityBin

Ints = npt.NDArray[np.integer[Any]]
Floats = npt.NDArray[np.floating[Any]]
Bools = npt.NDArray[np.bool_]

CONFIDENCE = 0.95
"""Of every interval here."""

COVERAGE_THRESHOLDS = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.975, 0.99)
"""Least probability of the predicted label, one per row of a coverage table."""

_RANDOMISATION_ROUNDS, _SWAPS_PER_ROUND = 40, 50  # in parts, because all draws at once may not fit in memory

TEMPERATURE_RANGE = (0.05, 20.0)
"""Where a temperature is looked for; a head that needs one outside is not repaired by dividing its logits."""


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
    assert labels.shape == predictions.shape == (len(labels),), f"labels {labels.shape}, predictions {predictions.shape}"
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


def score_of_draws(accuracies: Sequence[float], macro_f1s: Sequence[float], average_precisions: Sequence[float] | None) -> Score:
    """Mean scores over few-shot draws, with Student's t-interval of the mean accuracy, cut to 0..1.

    Args:
        accuracies: One per draw, 0..1, at least one.
        macro_f1s: One per draw.
        average_precisions: One per draw; None for other than two classes.
    Returns: A single draw says nothing of the spread: its interval is 0..1.
    """
    assert len(accuracies) > 0, "no draw to average"
    assert len(accuracies) == len(macro_f1s), f"{len(accuracies)} accuracies, {len(macro_f1s)} macro-F1s"
    assert average_precisions is None or len(average_precisions) == len(accuracies), "not one average precision per draw"
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


def compare_paired(labels: Ints, first: Ints, second: Ints, *, num_classes: int, main_metric: MainMetric, seed: int) -> Comparison:
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
    return comparison.model_copy(update={"main_metric": main_metric, "macro_f1_gain": gain, "macro_f1_p_value": p_value})


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
    low, high = np.quantile((drawn[:, 0] - drawn[:, 1]) / len(labels), _tails())
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


def calibrate(
    validation_logits: Floats | None,
    validation_labels: Ints | None,
    test_logits: Floats,
    test_labels: Ints,
) -> Calibration:
    """Fit a temperature on validation and measure on test how far probabilities can be believed (Guo et al. 2017).

    Args:
        validation_logits: Float (m, classes); None if no validation slice is left, then the temperature is 1.
        validation_labels: Int (m,); None together with the logits.
        test_logits: Float (n, classes).
        test_labels: Int (n,).
    Returns: Coverage is measured at the fitted temperature, on validation, or on test where there is none.
    Raises: LorafleetError: a logit is not finite.
    """
    assert (validation_logits is None) == (validation_labels is None), "validation logits and labels belong together"
    before = softmax(test_logits)
    if validation_logits is None or validation_labels is None:
        temperature, after = 1.0, before
        coverage = coverage_table(before, test_labels)
    else:
        temperature = fit_temperature(validation_logits, validation_labels)
        after = softmax(test_logits / temperature)
        coverage = coverage_table(softmax(validation_logits / temperature), validation_labels)
    return Calibration(
        temperature=temperature,
        fitted_on="none" if validation_logits is None else "validation",
        error_before=calibration_error(before, test_labels),
        error_after=calibration_error(after, test_labels),
        coverage=coverage,
        reliability=reliability(after, test_labels),
    )


def fit_temperature(logits: Floats, labels: Ints) -> float:
    """The temperature that makes ``softmax(logits / temperature)`` most likely (Guo et al. 2017, section 4.2).

    If every text is right there is no such temperature: the smaller, the likelier, and the end of the range would make
    every probability 1. Such a validation slice gives no evidence of overconfidence, so the logits stay as they are.

    Args:
        logits: Float (n, classes), n at least 1.
        labels: Int (n,).
    Returns: 0.05..20; 1 if every text is right.
    Raises: LorafleetError: a logit is not finite.
    """
    _check_rows(logits, labels)
    assert labels.min() >= 0 and labels.max() < logits.shape[1], f"labels {labels.min()}..{labels.max()}, {logits.shape[1]} classes"
    shifted = _below_largest(logits)
    if (shifted.argmax(axis=1) == labels).all():
        return 1.0
    true_logits = shifted[np.arange(len(labels)), labels]

    def loss(log_temperature: float) -> float:
        temperature = math.exp(log_temperature)
        return float(np.mean(np.log(np.exp(shifted / temperature).sum(axis=1)) - true_logits / temperature))

    # Over the logarithm, because 1/2 and 2 are equally far from 1; convex in 1/temperature, so one valley.
    low, high = (math.log(end) for end in TEMPERATURE_RANGE)
    return math.exp(optimize.minimize_scalar(loss, bounds=(low, high), method="bounded").x)


def softmax(logits: Floats) -> npt.NDArray[np.float64]:
    """Probabilities of the classes, float64 (n, classes); each row sums to 1.

    Args:
        logits: Float (n, classes), of any size: the largest of a row is subtracted first.
    Raises: LorafleetError: a logit is not finite.
    """
    powers = np.exp(_below_largest(logits))
    return powers / powers.sum(axis=1, keepdims=True)


def calibration_error(probabilities: Floats, labels: Ints, *, bins: int = 15) -> float:
    """Expected calibration error, 0..1: mean gap between confidence and accuracy (Guo et al. 2017, equation 3).

    Args:
        probabilities: Float (n, classes), n at least 1.
        labels: Int (n,).
        bins: Of equal width, each with its upper end but not its lower.
    """
    gaps = ((b.num_texts, abs(b.accuracy - b.confidence)) for b in reliability(probabilities, labels, bins=bins))
    return sum(num_texts * gap for num_texts, gap in gaps) / len(labels)


def reliability(probabilities: Floats, labels: Ints, *, bins: int = 15) -> tuple[ReliabilityBin, ...]:
    """Confidence against accuracy, bin by bin, least confident first; a bin without a text is left out.

    Args:
        probabilities: Float (n, classes), n at least 1.
        labels: Int (n,).
        bins: Of equal width, each with its upper end but not its lower.
    """
    confidence, right = _confidence(probabilities, labels)
    inner_edges = np.linspace(0.0, 1.0, bins + 1)[1:-1]
    bin_of_text = np.digitize(confidence, inner_edges, right=True)
    members = (bin_of_text == index for index in np.unique(bin_of_text))
    return tuple(
        ReliabilityBin(confidence=float(confidence[m].mean()), accuracy=float(right[m].mean()), num_texts=int(m.sum())) for m in members
    )


def coverage_table(probabilities: Floats, labels: Ints) -> tuple[CoverageRow, ...]:
    """What is left, and how right it is, if less confident texts get no label (Geifman & El-Yaniv 2017).

    The lower ends are one-sided (Clopper & Pearson 1934), at level 1 - 0.05 / number of rows (Bonferroni): with probability 0.95 the
    accuracy on new texts of the same kind is above all of them at once. So a row may be chosen by its lower end, for any number of
    target accuracies that are tried on the table. The thresholds are fixed beforehand. That these texts have also chosen the epoch
    and the temperature, which flatters them a little, is not corrected for.

    Args:
        probabilities: Float (n, classes), n at least 1.
        labels: Int (n,).
    Returns: One row per ``COVERAGE_THRESHOLDS``; a text exactly at a threshold keeps its label.
    """
    confidence, right = _confidence(probabilities, labels)
    level = (1 - CONFIDENCE) / len(COVERAGE_THRESHOLDS)
    kept = [(threshold, right[confidence >= threshold]) for threshold in COVERAGE_THRESHOLDS]
    return tuple(
        CoverageRow(
            threshold=threshold,
            coverage=len(rest) / len(right),
            accuracy=float(rest.mean()) if len(rest) else None,
            num_texts=len(rest),
            low=_lower_end(int(rest.sum()), len(rest), level=level),
        )
        for threshold, rest in kept
    )


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


def overlap(train_texts: Sequence[str], test_texts: Sequence[str]) -> Bools:
    """Which test texts also occur in train, character for character; bool (number of test texts,)."""
    known = set(train_texts)
    return np.fromiter((text in known for text in test_texts), dtype=np.bool_, count=len(test_texts))


def _accuracy_interval(num_right: int, num_texts: int, *, draws: int, seed: int) -> Interval:
    if num_right in (0, num_texts):
        return _clopper_pearson(num_right, num_texts)
    # Drawing n texts with replacement and counting the right ones is one binomial draw: no index array is needed.
    resampled = np.random.default_rng(seed).binomial(num_texts, num_right / num_texts, size=draws) / num_texts
    low, high = np.quantile(resampled, _tails())
    return Interval(float(low), float(high))


def _clopper_pearson(num_right: int, num_texts: int) -> Interval:
    # All right or all wrong: every resample is the same and the bootstrap would claim certainty, even from one text.
    exact = stats.binomtest(num_right, num_texts).proportion_ci(CONFIDENCE, method="exact")
    return Interval(float(exact.low), float(exact.high))


def _lower_end(num_right: int, num_texts: int, *, level: float) -> float:
    """The lowest share of right texts that is not refuted at the level by so many right ones: 0 where none is right."""
    return float(special.betaincinv(num_right, num_texts - num_right + 1, level)) if num_right else 0.0


def _macro_f1_test(labels: Ints, first: Ints, second: Ints, *, num_classes: int, seed: int) -> tuple[float, float]:
    """How much higher the macro-F1 of ``first`` is, and the p-value of a paired randomisation test (Noreen 1989; Yeh 2000), two-sided.

    If both are equally good, it does not matter which of the two a prediction comes from: each draw swaps the two predictions of every
    text with probability 1/2. The observed difference counts as a draw, so the p-value is never 0.
    """
    one, other = (np.stack(_counts(labels, predicted, num_classes)) for predicted in (first, second))
    present = np.bincount(labels, minlength=num_classes)
    observed = _macro_f1(one, present) - _macro_f1(other, present)
    differing = first != second
    labels, first, second = labels[differing], first[differing], second[differing]
    # What a swap of each text adds to the counts of the first; sparse, because it touches two of perhaps thousands of classes.
    ends = np.tile(np.arange(len(labels)), 2), np.concatenate([second, first])
    of_found = np.concatenate([second == labels, -1 * (first == labels)])
    of_predicted = np.repeat([1, -1], len(labels))
    moved = [sparse.csr_array((counts, ends), shape=(len(labels), num_classes)) for counts in (of_found, of_predicted)]
    random = np.random.default_rng(seed)
    extreme = 1
    for _ in range(_RANDOMISATION_ROUNDS):
        draws = random.integers(2, size=(_SWAPS_PER_ROUND, len(labels)))
        swapped = np.stack([draws @ counts for counts in moved])  # (2, draws, classes)
        differences = _macro_f1(one[:, None] + swapped, present) - _macro_f1(other[:, None] - swapped, present)
        extreme += int(np.count_nonzero(np.abs(differences) >= abs(observed) - 1e-9))
    return float(observed), extreme / (_RANDOMISATION_ROUNDS * _SWAPS_PER_ROUND + 1)


def _counts(labels: Ints, predictions: Ints, num_classes: int) -> tuple[Ints, Ints]:
    """Texts of each class that are found, and texts that each class is predicted for, both (classes,)."""
    return np.bincount(labels[labels == predictions], minlength=num_classes), np.bincount(predictions, minlength=num_classes)


def _macro_f1(counts: npt.NDArray[Any], present: Ints) -> npt.NDArray[Any]:
    """Mean F1 over the classes that occur in labels or predictions, (...), from counts (2, ..., classes) as ``_counts`` gives them."""
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
    half = float(special.stdtrit(len(values) - 1, _tails()[1]) * standard_error)
    mean = float(values.mean())
    return Interval(max(0.0, mean - half), min(1.0, mean + half))


def _tails() -> tuple[float, float]:
    return (1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2


def _below_largest(logits: Floats) -> npt.NDArray[np.float64]:
    if not np.isfinite(logits).all():
        bad = int(np.count_nonzero(~np.isfinite(logits).all(axis=1)))
        raise LorafleetError(
            f"logits: {bad} of {len(logits)} texts have one that is not a finite number; the training diverged, lower train.learning_rate"
        )
    precise = logits.astype(np.float64)
    return precise - precise.max(axis=1, keepdims=True)


def _confidence(probabilities: Floats, labels: Ints) -> tuple[npt.NDArray[np.float64], Bools]:
    _check_rows(probabilities, labels)
    # float32 probabilities can exceed 1 by a rounding error.
    return np.minimum(probabilities.max(axis=1).astype(np.float64), 1.0), probabilities.argmax(axis=1) == labels


def _check_rows(values: Floats, labels: Ints) -> None:
    assert len(labels) > 0, "no text to measure"
    assert values.ndim == 2 and labels.shape == (len(values),), f"expected (n, classes) and (n,), found {values.shape} and {labels.shape}"
