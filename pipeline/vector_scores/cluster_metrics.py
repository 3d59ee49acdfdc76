"""Metrics of texts with labels in the space of their vectors: V-measure of clusters, and silhouette."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import sparse, special

from pipeline.encoder.encoder import FloatArray
from pipeline.evaluation.scores import Floats, Ints


def v_measure(weights: Floats, *, labels: Ints, clusters: Ints, times_drawn: Ints) -> npt.NDArray[np.float64]:
    """Mean V-measure of several clusterings in weighted samples of the texts (Rosenberg & Hirschberg 2007).

    mteb clusters several random samples of the texts, and takes the mean of their V-measures. A text counts in each as
    often as mteb drew it, times its weight. With weights of 1 this is mteb's score. The clusterings stay as they are.

    Args:
        weights: How often each sample has each text, float (texts, samples).
        labels: True class of each text, int (texts,).
        clusters: Cluster of each text, int (series, clusterings, texts). Any number for a text that was not drawn.
        times_drawn: How often mteb drew each text for each clustering, int (clusterings, texts).
    Returns: float64 (series, samples), 0..1, over the clusterings that drew any of the texts. nan if a sample has one
        label only, or if no clustering drew a text.
    """
    found = np.zeros((len(clusters), weights.shape[1]))
    used = np.flatnonzero(times_drawn.any(axis=1))
    for number in used:
        times = times_drawn[number]
        drawn = np.flatnonzero(times)
        counts = weights[drawn] * times[drawn, np.newaxis]
        of_labels = _entropy(labels[drawn], counts)
        for row, assigned in zip(found, clusters[:, number, drawn], strict=True):
            of_clusters = _entropy(assigned, counts)
            jointly = _entropy(labels[drawn].astype(np.int64) * (int(assigned.max()) + 1) + assigned, counts)
            both = of_labels + of_clusters
            shared = np.maximum(both - jointly, 0.0)
            row += np.divide(2 * shared, both, out=np.ones_like(both), where=both > 1e-12)
    is_defined = (_entropy(labels, weights) > 1e-12) & bool(len(used))
    return np.where(is_defined, found / max(1, len(used)), np.nan)


def purity(weights: Floats, *, labels: Ints, clusters: Ints) -> npt.NDArray[np.float64]:
    """Share of the items that have the most frequent label of their cluster, in weighted samples.

    Source: Manning, Raghavan & Schütze (2008), Introduction to Information Retrieval, section 16.3.

    Args:
        weights: How often each sample has each item, float (items, samples).
        labels: True class of each item, int (items,).
        clusters: Cluster of each item, int (series, items).
    Returns: float64 (series, samples), 0..1. nan if a sample has one label only.
    """
    _, classes = np.unique(labels, return_inverse=True)
    found = []
    for assigned in clusters:
        _, groups = np.unique(assigned, return_inverse=True)
        best = np.zeros((groups.max() + 1, weights.shape[1]))
        for label in range(classes.max() + 1):
            members = np.flatnonzero(classes == label)
            rows = sparse.csr_array((np.ones(len(members)), (groups[members], members)), (len(best), len(groups)))
            best = np.maximum(best, rows @ weights)
        found.append(best.sum(axis=0) / weights.sum(axis=0))
    return np.where(_entropy(labels, weights) > 1e-12, np.stack(found), np.nan)


def silhouettes(vectors: FloatArray, labels: Ints) -> npt.NDArray[np.float64]:
    """Silhouette of each text among the true labels by cosine distance, -1..1 (Rousseeuw 1987).

    Equal to ``sklearn.metrics.silhouette_samples``, which needs the distances of all pairs of texts. For unit vectors,
    the mean distance to a class is that to the mean of its vectors. 0 for the only text of a label.

    Args:
        vectors: Unit vectors, float32 (texts, width).
        labels: True class of each text, int (texts,), at least two classes.
    """
    _, classes, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    members = sparse.csr_array((np.ones(len(labels)), (classes, np.arange(len(labels)))))
    precise = vectors.astype(np.float64)
    distances = 1.0 - precise @ (members @ precise / sizes[:, np.newaxis]).T
    rows = np.arange(len(labels))
    size = sizes[classes]
    # The mean over the text's own class includes the text itself, at a distance of 0 (or 1 from a zero vector).
    itself = 1.0 - (precise**2).sum(axis=1)
    inside = (distances[rows, classes] * size - itself) / np.maximum(size - 1, 1)
    distances[rows, classes] = np.inf
    nearest = distances.min(axis=1)
    largest = np.maximum(inside, nearest)
    found = np.divide(nearest - inside, largest, out=np.zeros(len(labels)), where=largest > 1e-12)
    return np.where(size > 1, found, 0.0)


def _entropy(numbers: Ints, weights: Floats) -> npt.NDArray[np.float64]:
    """Entropy in nats of small numbers (items,) in samples with weights (items, samples), float64 (samples,)."""
    _, group = np.unique(numbers, return_inverse=True)
    members = sparse.csr_array((np.ones(len(group)), (group, np.arange(len(group)))))
    sums = members @ weights
    total = np.maximum(sums.sum(axis=0), 1e-300)
    return np.asarray(np.log(total) - special.xlogy(sums, sums).sum(axis=0) / total)
