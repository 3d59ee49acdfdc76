"""Metrics of a classifier, from the numbers of right, true and predicted texts of each class.

A new metric is one function here, marked with ``@metric``. Its value and its interval then stand in ``values.parquet``,
in the report and in the history, because all of them are made of whatever is in ``METRICS``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.evaluation.scores import CONFIDENCE, Floats, Ints, interval_tails

_DRAWS_AT_ONCE = 200


@dataclass(frozen=True)
class Counts:
    """Texts of each class in one sample, or in several: float64 (classes,) or (samples, classes)."""

    right: Floats
    """Texts of the class that were predicted as it."""
    labels: Floats
    """Texts of the class."""
    predicted: Floats
    """Texts that were predicted as the class."""

    @property
    def num_texts(self) -> Floats:
        """Texts of the sample, or of each."""
        return np.asarray(self.labels.sum(axis=-1))


@dataclass(frozen=True)
class Metric:
    """A number between -1 and 1 that says how well labels were predicted. Larger is better."""

    title: str
    """As people read it."""
    function: Callable[[Counts], Floats]
    """One number for each sample."""


@dataclass(frozen=True)
class Estimate:
    """A measured number with the ends of its 95 % interval, where one was computed."""

    value: float
    low: float | None = None
    high: float | None = None


METRICS: dict[str, Metric] = {}
"""Name of a metric in ``values.parquet`` -> how it is computed."""


def metric(title: str) -> Callable[[Callable[[Counts], Floats]], Callable[[Counts], Floats]]:
    """Add a function to ``METRICS`` under its own name."""

    def add(function: Callable[[Counts], Floats]) -> Callable[[Counts], Floats]:
        METRICS[function.__name__] = Metric(title, function)
        return function

    return add


@metric("accuracy")
def accuracy(counts: Counts) -> Floats:
    """Share of the texts that were predicted right, 0..1."""
    return np.asarray(counts.right.sum(axis=-1) / counts.num_texts)


@metric("macro-F1")
def macro_f1(counts: Counts) -> Floats:
    """Mean F1 of the classes that occur among the labels or the predictions, 0..1."""
    either = counts.labels + counts.predicted
    f1 = np.divide(2 * counts.right, either, out=np.zeros_like(either), where=either > 0)
    return np.asarray(f1.sum(axis=-1) / (either > 0).sum(axis=-1))


@metric("Matthews correlation")
def matthews(counts: Counts) -> Floats:
    """Correlation of labels and predictions over several classes, -1..1; 0 where one of them has a single class.

    Source: Gorodkin (2004), Comparing two K-category assignments by a K-category correlation coefficient.
    """
    texts = counts.num_texts
    covariance = counts.right.sum(axis=-1) * texts - (counts.labels * counts.predicted).sum(axis=-1)
    of_labels, of_predictions = (texts**2 - (part**2).sum(axis=-1) for part in (counts.labels, counts.predicted))
    norm = np.sqrt(of_labels * of_predictions)
    return np.asarray(np.divide(covariance, norm, out=np.zeros_like(norm), where=norm > 0))


def measure(labels: Ints, predictions: Ints, *, num_classes: int, draws: int, seed: int) -> dict[str, Estimate]:
    """Every metric of ``METRICS``, with a percentile interval over resampled texts (Efron 1979).

    Args:
        labels: True class of each text, int (n,), n at least 1.
        predictions: Predicted class of each text, int (n,).
        num_classes: Classes of the data set.
        draws: Resamples of the texts.
        seed: Of the resamples. All metrics are measured on the same ones.
    Returns: Name of the metric -> its estimate.
    """
    assert len(labels) > 0, "no text to measure"
    pairs, texts = np.unique(labels.astype(np.int64) * num_classes + predictions, return_counts=True)
    whole = _counts_of(texts[np.newaxis, :], pairs, num_classes)
    values = {name: float(known.function(whole)[0]) for name, known in METRICS.items()}
    drawn: dict[str, list[Floats]] = {name: [] for name in METRICS}
    for sample in _resamples(texts, draws=draws, seed=seed):
        counts = _counts_of(sample, pairs, num_classes)
        for name, known in METRICS.items():
            drawn[name].append(known.function(counts))
    ends = {name: np.quantile(np.concatenate(of_metric), interval_tails()) for name, of_metric in drawn.items()}
    return {name: Estimate(value, *map(float, ends[name])) for name, value in values.items()}


def title_of(name: str) -> str:
    """Name of a metric as people read it."""
    return METRICS[name].title if name in METRICS else name.replace("_", " ")


def _resamples(texts: npt.NDArray[Any], *, draws: int, seed: int) -> Iterator[npt.NDArray[np.int64]]:
    """Texts of each pair of label and prediction in resamples, int64 (samples, pairs), some at a time."""
    random = np.random.default_rng(seed)
    total = int(texts.sum())
    for start in range(0, draws, _DRAWS_AT_ONCE):
        yield random.multinomial(total, texts / total, size=min(_DRAWS_AT_ONCE, draws - start))


def _counts_of(sample: npt.NDArray[Any], pairs: npt.NDArray[np.int64], num_classes: int) -> Counts:
    """Counts of samples (samples, pairs), where a pair is ``label * num_classes + prediction``."""
    of_label, of_prediction = np.divmod(pairs, num_classes)
    classes = np.arange(num_classes)
    by_label, by_prediction = (
        (part[:, np.newaxis] == classes).astype(np.float64) for part in (of_label, of_prediction)
    )
    texts = sample.astype(np.float64)
    return Counts(texts @ (by_label * by_prediction), texts @ by_label, texts @ by_prediction)


assert CONFIDENCE == 0.95, "Estimate names the 95 % interval"
