"""Metrics of a classifier, computed from the numbers of correct, true and predicted texts of each class.

A new metric is one function here, marked with ``@metric``. Its value and interval then appear in ``values.parquet``,
in the report and in the history, because all of them use every entry of ``METRICS``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.evaluation.scores import Floats, Ints, interval_tails

_DRAWS_AT_ONCE = 200


@dataclass(frozen=True)
class Counts:
    """Numbers of texts of each class, in one sample or in several: float64 (classes,) or (samples, classes)."""

    right: Floats
    """Texts of the class that were predicted as this class."""
    labels: Floats
    """Texts of the class."""
    predicted: Floats
    """Texts that were predicted as the class."""

    @property
    def num_texts(self) -> Floats:
        """Number of texts in the sample, or in each sample."""
        return np.asarray(self.labels.sum(axis=-1))


@dataclass(frozen=True)
class Metric:
    """A measure of the predictions between -1 and 1. Larger is better."""

    title: str
    """Name in reports."""
    function: Callable[[Counts], Floats]
    """Function that computes one number per sample."""


@dataclass(frozen=True)
class Estimate:
    """A measured number and the ends of its 95 % interval. The ends are None if no interval was computed."""

    value: float
    low: float | None = None
    high: float | None = None


METRICS: dict[str, Metric] = {}
"""Metrics by their names in ``values.parquet``."""

_TITLES_OF_VECTORS = {
    "spearman": "Spearman",
    "pearson": "Pearson",
    "average_precision": "average precision",
    "auc": "AUC",
    "margin": "margin of the cosines",
    "cohens_d": "Cohen's d",
    "f1": "F1",
    "f1_best_threshold": "F1 at the best threshold on test, optimistic",
    "false_positives_best_threshold": "false positives at the best threshold on test, optimistic",
    "map_purity": "purity on the map",
    "map_noise": "share of noise on the map",
    "ndcg_at_10": "nDCG@10",
    "recall_at_1": "recall@1",
    "recall_at_10": "recall@10",
    "mrr_at_10": "MRR@10",
    "v_measure": "V-measure",
}


def metric(title: str) -> Callable[[Callable[[Counts], Floats]], Callable[[Counts], Floats]]:
    """Add a function to ``METRICS`` under its own name."""

    def add(function: Callable[[Counts], Floats]) -> Callable[[Counts], Floats]:
        METRICS[function.__name__] = Metric(title, function)
        return function

    return add


@metric("accuracy")
def accuracy(counts: Counts) -> Floats:
    """Fraction of the texts that were predicted correctly, 0..1."""
    return np.asarray(counts.right.sum(axis=-1) / counts.num_texts)


@metric("macro-F1")
def macro_f1(counts: Counts) -> Floats:
    """Mean F1 of the classes that occur among the labels or the predictions, 0..1."""
    either = counts.labels + counts.predicted
    f1 = np.divide(2 * counts.right, either, out=np.zeros_like(either), where=either > 0)
    return np.asarray(f1.sum(axis=-1) / (either > 0).sum(axis=-1))


@metric("Matthews correlation")
def matthews(counts: Counts) -> Floats:
    """Correlation of labels and predictions over several classes, -1..1. 0 if either has a single class.

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
        num_classes: Number of classes of the data set.
        draws: Number of resamples of the texts.
        seed: Seed of the resamples, which all metrics share.
    Returns: Estimates by the name of the metric.
    """
    assert len(labels) > 0, "no text to measure"
    pairs, texts = np.unique(labels.astype(np.int64) * num_classes + predictions, return_counts=True)
    whole = _counts_of(texts[np.newaxis, :], pairs, num_classes)
    values = {name: float(entry.function(whole)[0]) for name, entry in METRICS.items()}
    drawn: dict[str, list[Floats]] = {name: [] for name in METRICS}
    for sample in _resamples(texts, draws=draws, seed=seed):
        counts = _counts_of(sample, pairs, num_classes)
        for name, entry in METRICS.items():
            drawn[name].append(entry.function(counts))
    ends = {name: np.quantile(np.concatenate(numbers), interval_tails()) for name, numbers in drawn.items()}
    return {name: Estimate(value, *map(float, ends[name])) for name, value in values.items()}


def title_of(name: str) -> str:
    """Name of a metric in reports."""
    return METRICS[name].title if name in METRICS else _TITLES_OF_VECTORS.get(name, name.replace("_", " "))


def _resamples(texts: npt.NDArray[Any], *, draws: int, seed: int) -> Iterator[npt.NDArray[np.int64]]:
    """Number of texts of each pair of label and prediction in resamples, int64 (samples, pairs), in chunks."""
    random = np.random.default_rng(seed)
    total = int(texts.sum())
    for start in range(0, draws, _DRAWS_AT_ONCE):
        yield random.multinomial(total, texts / total, size=min(_DRAWS_AT_ONCE, draws - start))


def _counts_of(sample: npt.NDArray[Any], pairs: npt.NDArray[np.int64], num_classes: int) -> Counts:
    """Counts of samples (samples, pairs). A pair is ``label * num_classes + prediction``."""
    of_label, of_prediction = np.divmod(pairs, num_classes)
    classes = np.arange(num_classes)
    by_label, by_prediction = (
        (part[:, np.newaxis] == classes).astype(np.float64) for part in (of_label, of_prediction)
    )
    texts = sample.astype(np.float64)
    return Counts(texts @ (by_label * by_prediction), texts @ by_label, texts @ by_prediction)
