"""Clusters and a 2-D map of the test set, as the vectors of one arm show it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.cluster import HDBSCAN, KMeans
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits

from pipeline.config import MapMethod
from pipeline.encoder.encoder import FloatArray

NUM_CLUSTERS = 12
"""Number of clusters of the pairs: as many as HDBSCAN found on the dating pairs in the comparison that is repeated."""

_MOST_MAPPED = 500
_FEWEST_MAPPED = 20
_SEED = 42


def pair_groupings(first: FloatArray, second: FloatArray, *, method: MapMethod) -> dict[str, npt.NDArray[Any]]:
    """Group labelled pairs by the mean of their two vectors, in full width and on a map.

    Args:
        first: Unit vectors of the first texts, float32 (pairs, width).
        second: Those of the second texts.
        method: Method of the map.
    Returns: Arrays by name.
        ``clusters``: cluster of each pair by k-means, int32 (1, pairs).
        ``map_items``: rows of the pairs on the map, at most 500, int64 (mapped,).
        ``map_points``: the middle between a pair's two texts on the map, float32 (mapped, 2).
        ``map_clusters``: cluster on the map by HDBSCAN, -1 for noise, int32 (mapped,).
        The last three are absent if there are fewer than 20 pairs, or if all vectors are equal.
    """
    means = (first + second) / 2
    count = min(NUM_CLUSTERS, len(np.unique(means, axis=0)))
    with threadpool_limits(1):
        clusters = KMeans(count, n_init=10, random_state=_SEED).fit_predict(means)
    found: dict[str, npt.NDArray[Any]] = {"clusters": clusters[np.newaxis].astype(np.int32)}
    if _can_be_mapped(means):
        rows = _mapped_rows(len(first))
        points = _points(np.concatenate([first[rows], second[rows]]), method)
        middles = (points[: len(rows)] + points[len(rows) :]) / 2
        on_map = HDBSCAN(min_cluster_size=10, min_samples=5, copy=True).fit_predict(middles)
        found |= {"map_items": rows, "map_points": middles, "map_clusters": on_map.astype(np.int32)}
    return found


def text_map(vectors: FloatArray, *, method: MapMethod) -> dict[str, npt.NDArray[Any]]:
    """Draw texts in two dimensions.

    Args:
        vectors: Unit vectors, float32 (texts, width).
        method: Method of the map.
    Returns: ``map_items``, int64 (mapped,), and ``map_points``, float32 (mapped, 2).
        Empty for fewer than 20 texts, or if all are equal.
    """
    if not _can_be_mapped(vectors):
        return {}
    rows = _mapped_rows(len(vectors))
    return {"map_items": rows, "map_points": _points(vectors[rows], method)}


def _can_be_mapped(vectors: npt.NDArray[Any]) -> bool:
    # t-SNE ends the process at equal vectors.
    return len(vectors) >= _FEWEST_MAPPED and float(np.ptp(vectors, axis=0).max()) > 1e-6


def _mapped_rows(count: int) -> npt.NDArray[np.int64]:
    """Rows on the map: the same for every arm."""
    if count <= _MOST_MAPPED:
        return np.arange(count)
    return np.sort(np.random.default_rng(_SEED).choice(count, size=_MOST_MAPPED, replace=False))


def _points(vectors: FloatArray, method: MapMethod) -> npt.NDArray[np.float32]:
    if method == "umap":
        from umap import UMAP

        mapper = UMAP(n_neighbors=15, min_dist=0.1, metric="cosine", random_state=_SEED, n_jobs=1)
    else:
        mapper = TSNE(metric="cosine", perplexity=min(30.0, (len(vectors) - 1) / 3), init="pca", random_state=_SEED)
    # Threads of OpenMP wait in loops for one another: on a busy machine two are a hundred times slower than one.
    with threadpool_limits(1):
        return np.asarray(mapper.fit_transform(vectors), dtype=np.float32)
