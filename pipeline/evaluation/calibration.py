"""Calibration of probabilities on validation: temperature, error, reliability and coverage."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from scipy import optimize, special

from pipeline.errors import LorafleetError
from pipeline.evaluation.scores import CONFIDENCE, Bools, Floats, Ints, check_rows, lower_end
from pipeline.records import Calibration, CoverageRow, ReliabilityBin

COVERAGE_THRESHOLDS = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.975, 0.99)
"""Smallest probability of the predicted label that keeps it, one per row of a coverage table."""

TEMPERATURE_RANGE = (0.05, 20.0)
"""Range of fitted temperatures. A head that needs one outside cannot be repaired by dividing its logits."""


def calibrate(
    validation_logits: Floats | None,
    validation_labels: Ints | None,
    test_logits: Floats,
    test_labels: Ints,
) -> Calibration:
    """Fit a temperature on validation, and measure the calibration of the probabilities on test (Guo et al. 2017).

    Args:
        validation_logits: Float (m, classes). None if no validation slice is left. The temperature is then 1.
        validation_labels: Int (m,). None if the logits are None.
        test_logits: Float (n, classes).
        test_labels: Int (n,).
    Returns: Coverage is measured at the fitted temperature on validation, or on test if there is no validation slice.
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
    """Maximum-likelihood temperature of ``softmax(logits / temperature)`` (Guo et al. 2017, section 4.2).

    If every text is labelled correctly, the likelihood has no maximum: the smallest temperature of the range would make
    every probability 1. Such a slice gives no evidence of overconfidence, so the temperature is then 1.

    Args:
        logits: Float (n, classes), n at least 1.
        labels: Int (n,).
    Returns: 0.05..20, and 1 if every text is labelled correctly.
    Raises: LorafleetError: a logit is not finite.
    """
    check_rows(logits, labels)
    assert labels.min() >= 0 and labels.max() < logits.shape[1], (
        f"labels {labels.min()}..{labels.max()}, {logits.shape[1]} classes"
    )
    precise = _finite(logits)
    shifted = precise - precise.max(axis=1, keepdims=True)
    if (shifted.argmax(axis=1) == labels).all():
        return 1.0
    true_logits = shifted[np.arange(len(labels)), labels]

    def loss(log_temperature: float) -> float:
        temperature = math.exp(log_temperature)
        return float(np.mean(np.log(np.exp(shifted / temperature).sum(axis=1)) - true_logits / temperature))

    # Over the logarithm, because 1/2 and 2 are equally far from 1. The loss is convex in 1/temperature: one minimum.
    low, high = (math.log(end) for end in TEMPERATURE_RANGE)
    return math.exp(optimize.minimize_scalar(loss, bounds=(low, high), method="bounded").x)


def softmax(logits: Floats) -> npt.NDArray[np.float64]:
    """Probabilities of the classes, float64 (n, classes). Each row sums to 1.

    Args:
        logits: Float (n, classes). Large values do not overflow.
    Raises: LorafleetError: a logit is not finite.
    """
    probabilities: npt.NDArray[np.float64] = special.softmax(_finite(logits), axis=1)
    return probabilities


def calibration_error(probabilities: Floats, labels: Ints, *, bins: int = 15) -> float:
    """Expected calibration error, 0..1: mean gap between confidence and accuracy (Guo et al. 2017, equation 3).

    Args:
        probabilities: Float (n, classes), n at least 1.
        labels: Int (n,).
        bins: Number of bins of equal width. A bin contains its upper end but not its lower.
    """
    gaps = ((b.num_texts, abs(b.accuracy - b.confidence)) for b in reliability(probabilities, labels, bins=bins))
    return sum(num_texts * gap for num_texts, gap in gaps) / len(labels)


def reliability(probabilities: Floats, labels: Ints, *, bins: int = 15) -> tuple[ReliabilityBin, ...]:
    """Mean confidence and accuracy of each bin, least confident first. Empty bins are omitted.

    Args:
        probabilities: Float (n, classes), n at least 1.
        labels: Int (n,).
        bins: Number of bins of equal width. A bin contains its upper end but not its lower.
    """
    confidence, right = _confidence(probabilities, labels)
    inner_edges = np.linspace(0.0, 1.0, bins + 1)[1:-1]
    bin_of_text = np.digitize(confidence, inner_edges, right=True)
    members = (bin_of_text == index for index in np.unique(bin_of_text))
    return tuple(
        ReliabilityBin(confidence=float(confidence[m].mean()), accuracy=float(right[m].mean()), num_texts=int(m.sum()))
        for m in members
    )


def coverage_table(probabilities: Floats, labels: Ints) -> tuple[CoverageRow, ...]:
    """Coverage and accuracy by threshold, if less confident texts get no label (Geifman & El-Yaniv 2017).

    The lower ends are one-sided (Clopper & Pearson 1934) at level 1 - 0.05 / number of rows (Bonferroni). With
    probability 0.95, the accuracy on new texts of the same kind is above all of them at once. A row may therefore be
    chosen by its lower end, for any number of target accuracies. The thresholds are fixed in advance. The same texts
    also chose the epoch and the temperature, which makes the table slightly optimistic. This is not corrected.

    Args:
        probabilities: Float (n, classes), n at least 1.
        labels: Int (n,).
    Returns: One row per entry of ``COVERAGE_THRESHOLDS``. A text exactly at a threshold keeps its label.
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
            low=lower_end(int(rest.sum()), len(rest), level=level),
        )
        for threshold, rest in kept
    )


def _finite(logits: Floats) -> npt.NDArray[np.float64]:
    """Convert logits to float64.

    Raises: LorafleetError: a logit is not finite.
    """
    if not np.isfinite(logits).all():
        bad = int(np.count_nonzero(~np.isfinite(logits).all(axis=1)))
        raise LorafleetError(
            f"logits of {bad} of {len(logits)} texts are not finite; the training diverged, lower train.learning_rate"
        )
    return logits.astype(np.float64)


def _confidence(probabilities: Floats, labels: Ints) -> tuple[npt.NDArray[np.float64], Bools]:
    check_rows(probabilities, labels)
    # float32 probabilities can exceed 1 by a rounding error.
    return np.minimum(probabilities.max(axis=1).astype(np.float64), 1.0), probabilities.argmax(axis=1) == labels
