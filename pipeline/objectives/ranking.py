"""Search quality from text vectors: the ranks of the relevant passages, and nDCG."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pipeline.encoder.encoder import FloatArray
from pipeline.encoder.tokeniser import IntArray

_SIMILARITIES_AT_ONCE = 16_000_000  # 64 MB


def relevant_ranks(
    queries: FloatArray, passages: FloatArray, *, query_numbers: IntArray, passage_numbers: IntArray
) -> IntArray:
    """Rank of each relevant passage among all passages, by the cosine to its query, int64 (pairs,).

    The most similar passage has rank 1. Of equally similar passages, each gets the worst rank, so that an encoder that
    maps all texts to one vector finds nothing.

    Args:
        queries: Vectors of the queries, float32 (queries, width).
        passages: Vectors of the passages, float32 (passages, width).
        query_numbers: Row of the query of each relevant pair, (pairs,).
        passage_numbers: Row of the passage of each relevant pair, (pairs,).
    """
    units, wanted = _unit(passages).T, _unit(queries)
    ranks = np.empty(len(query_numbers), dtype=np.int64)
    step = max(1, _SIMILARITIES_AT_ONCE // max(1, len(passages)))
    for start in range(0, len(ranks), step):
        pairs = slice(start, start + step)
        similarities = wanted[query_numbers[pairs]] @ units
        own = np.take_along_axis(similarities, passage_numbers[pairs, None], axis=1)
        ranks[pairs] = (similarities >= own).sum(axis=1)
    return ranks


def ndcg_at(k: int, *, query_numbers: IntArray, ranks: IntArray) -> npt.NDArray[np.float64]:
    """Normalised discounted cumulative gain of each query, 0..1, float64 (queries,). All relevant passages count alike.

    Source: Järvelin and Kekäläinen 2002, with the discount ``1 / log2(1 + rank)``.

    Args:
        k: Number of passages that are looked at.
        query_numbers: Query of each relevant passage, from 0 without gaps, (pairs,).
        ranks: Rank of each relevant passage, from 1, (pairs,).
    """
    discounts = 1 / np.log2(np.arange(2, k + 2))
    gains = np.where(ranks <= k, discounts[np.minimum(ranks, k) - 1], 0.0)
    found = np.bincount(query_numbers, weights=gains)
    best = np.concatenate([[0.0], np.cumsum(discounts)])
    return found / best[np.minimum(np.bincount(query_numbers), k)]


def _unit(vectors: FloatArray) -> FloatArray:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.maximum(lengths, 1e-12)).astype(np.float32)
