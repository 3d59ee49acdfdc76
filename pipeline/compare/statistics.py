"""Metrics of the arms of a comparison, as functions of the weights of the test items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse

from pipeline.data.dataset import TaskData
from pipeline.evaluation.calibration import fit_temperature, softmax
from pipeline.evaluation.metrics import METRICS, Counts
from pipeline.evaluation.scores import Floats, Ints
from pipeline.pairs.data import PairData
from pipeline.vector_scores import cluster_metrics, pair_metrics
from pipeline.vector_scores.parts import Part
from pipeline.vector_scores.resampling import Statistic
from pipeline.vector_scores.statistics import statistics_of

_BINS = 15


@dataclass(frozen=True)
class Series:
    """Measured arrays of one arm with one seed."""

    arm: str
    seed: int
    arrays: Mapping[str, npt.NDArray[Any]]


def arm_statistics(data: PairData | TaskData, series: Sequence[Series], part: Part) -> dict[str, Statistic]:
    """Metrics by name, of all series on a part of test."""
    if isinstance(data, TaskData) and data.task.objective == "classification":
        return _of_classifiers(data, series, part)

    def arrays(name: str) -> npt.NDArray[Any]:
        return np.stack([one.arrays[name][0] for one in series])

    thresholds = thresholds_of(series)
    statistics = statistics_of(data, part, arrays, thresholds, times_drawn=series[0].arrays.get("times_drawn"))
    if thresholds is not None and isinstance(data, PairData) and data.test.scores is not None:
        gold, similarity = data.test.scores[part.mask], arrays("similarity")[:, part.mask]
        given = {"gold": gold, "series": similarity, "thresholds": thresholds["f1"]}
        statistics["precision"] = partial(pair_metrics.precision, **given)
        statistics["recall"] = partial(pair_metrics.recall, **given)
        statistics["false_positive_rate"] = partial(pair_metrics.false_positive_rate, **given)
    if "clusters" in series[0].arrays and isinstance(data, PairData) and not part.is_user_slice:
        statistics |= _of_clusters(data, arrays("clusters")[:, part.mask], part)
    return statistics


def thresholds_of(series: Sequence[Series]) -> dict[str, npt.NDArray[np.float64]] | None:
    """Thresholds of F1 and accuracy that are best on each seed's validation pairs, (series,). None without such."""
    found: dict[str, list[float]] = {"f1": [], "accuracy": []}
    for one in series:
        gold = one.arrays.get("validation_gold")
        for metric, row in found.items():
            similarity = one.arrays.get("validation_similarity")
            best = None
            if gold is not None and similarity is not None:
                best = pair_metrics.best_threshold(gold, similarity[0], metric=metric)  # type: ignore[arg-type]
            if best is None:
                return None
            row.append(best.threshold)
    return {metric: np.array(row) for metric, row in found.items()}


def _of_clusters(data: PairData, clusters: Ints, part: Part) -> dict[str, Statistic]:
    """Purity and V-measure of the clusters of labelled pairs."""
    assert data.test.scores is not None, "labelled pairs have labels"
    labels = (data.test.scores[part.mask] == 1).astype(np.int64)
    once = np.ones((1, len(labels)), dtype=np.int32)
    return {
        "purity": partial(cluster_metrics.purity, labels=labels, clusters=clusters),
        "v_measure": partial(
            cluster_metrics.v_measure, labels=labels, clusters=clusters[:, np.newaxis], times_drawn=once
        ),
    }


def _of_classifiers(data: TaskData, series: Sequence[Series], part: Part) -> dict[str, Statistic]:
    labels = data.test_labels[part.mask]
    probabilities = [_probabilities(one)[part.mask] for one in series]
    predictions = np.stack([rows.argmax(axis=1) for rows in probabilities])
    confidences = np.stack([rows.max(axis=1) for rows in probabilities])
    right = (predictions == labels).astype(np.float64)
    num_classes = len(data.label_names)
    statistics: dict[str, Statistic] = {
        name: partial(_of_counts, name=name, labels=labels, predictions=predictions, num_classes=num_classes)
        for name in METRICS
    }
    statistics["calibration_error"] = partial(_calibration_error, right=right, confidences=confidences)
    # The same seed of full: the arms of a seed have learnt from the same texts.
    of_full = {one.seed: predictions[number] for number, one in enumerate(series) if one.arm == "full"}
    if of_full:
        same = np.stack([row == of_full[one.seed] for one, row in zip(series, predictions, strict=True)])
        statistics["agreement_with_full"] = partial(pair_metrics.mean, series=same.astype(np.float64))
    return statistics


def _probabilities(one: Series) -> npt.NDArray[np.float64]:
    """Probabilities at the temperature that the seed's validation texts give."""
    logits = one.arrays["logits"]
    temperature = 1.0
    if "validation_logits" in one.arrays:
        temperature = fit_temperature(one.arrays["validation_logits"], one.arrays["validation_labels"])
    return softmax(logits / temperature)


def _of_counts(
    weights: Floats, *, name: str, labels: Ints, predictions: Ints, num_classes: int
) -> npt.NDArray[np.float64]:
    """A metric of ``METRICS`` of each series in each sample."""

    def sums(classes: Ints, chosen: npt.NDArray[np.bool_] | None = None) -> npt.NDArray[np.float64]:
        kept = np.arange(len(classes)) if chosen is None else np.flatnonzero(chosen)
        members = sparse.csr_array((np.ones(len(kept)), (classes[kept], kept)), shape=(num_classes, len(classes)))
        return np.asarray((members @ weights).T)

    by_label, metric = sums(labels), METRICS[name].function
    return np.stack([metric(Counts(sums(labels, row == labels), by_label, sums(row))) for row in predictions])


def _calibration_error(weights: Floats, *, right: Floats, confidences: Floats) -> npt.NDArray[np.float64]:
    """Expected calibration error of each series in each sample (Guo et al. 2017, equation 3)."""
    inner_edges = np.linspace(0.0, 1.0, _BINS + 1)[1:-1]
    found = []
    for hits, sure in zip(right, confidences, strict=True):
        bins = np.digitize(sure, inner_edges, right=True)
        gap = np.zeros(weights.shape[1])
        for number in np.unique(bins):
            members = bins == number
            gap += np.abs((hits[members] - sure[members]) @ weights[members])
        found.append(gap / weights.sum(axis=0))
    return np.stack(found)
