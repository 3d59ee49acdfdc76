"""The objective of separation: texts of one label close together and far from the others, without a head."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from pipeline.adapter.sided import Trainable
from pipeline.config import TrainConfig
from pipeline.data.families import check_batch_size
from pipeline.encoder.encoder import FloatArray
from pipeline.encoder.tokeniser import IntArray
from pipeline.objectives.batches import LabelledTokens, arrays_sha256, token_arrays
from pipeline.objectives.embedding import EmbeddingObjective
from pipeline.objectives.losses import supervised_infonce

_BATCHES_PER_BUCKET = 256
_CLUSTERINGS = 4  # of which the tightest counts


class Separation(EmbeddingObjective):
    """Contrastive loss over texts with labels, selected by the V-measure of a clustering."""

    selection_metric = "v_measure"

    def __init__(self, train: LabelledTokens, selection: LabelledTokens | None, *, config: TrainConfig) -> None:
        """Compute nothing yet.

        Args:
            train: Training texts.
            selection: Texts that select the epoch.
            config: Temperature, widths, distillation and texts per pass.
        Raises: ConfigError: the batches are too small for two pairs.
        """
        super().__init__(train.tokens, config=config)
        self._train, self._selection = train, selection
        check_batch_size("separation", "infonce", config.batch_size)

    @property
    def num_examples(self) -> int:
        """Number of training texts."""
        return len(self._train.labels)

    @property
    def has_selection(self) -> bool:
        """Whether there are texts that select the epoch."""
        return self._selection is not None

    def conditions(self) -> dict[str, Any]:
        """Task family, and hashes of the texts with their labels."""
        return {
            "family": "separation",
            "training texts": arrays_sha256(*token_arrays(self._train)),
            "selection texts": None if self._selection is None else arrays_sha256(*token_arrays(self._selection)),
        }

    def batches(self, *, batch_size: int, order: np.random.Generator) -> Iterator[IntArray]:
        """Random batches of groups of two or three texts of one label, of similar length.

        Every text occurs once. A group may be split at the end of a batch.
        """
        groups = _grouped(self._train.labels, order)
        longest = np.maximum.reduceat(self._train.tokens.lengths[groups.rows], groups.starts)
        shuffled = order.permutation(len(longest))
        bucket = np.arange(len(longest)) // (batch_size * _BATCHES_PER_BUCKET // 2)
        in_order = shuffled[np.lexsort((longest[shuffled], bucket))]
        position = np.empty(len(longest), dtype=np.int64)
        position[in_order] = np.arange(len(longest))
        rows = groups.rows[np.argsort(np.repeat(position, groups.sizes), kind="stable")]
        for start in order.permutation(range(0, len(rows), batch_size)).tolist():
            yield rows[start : start + batch_size]

    def texts_of(self, rows: IntArray) -> IntArray:
        """The texts themselves."""
        return rows

    def targets(self, rows: IntArray) -> np.ndarray:
        """Labels, int64 (texts,)."""
        return self._train.labels[rows]

    def vector_loss(self, vectors: Tensor, targets: Tensor, temperature: float | Tensor) -> Tensor:
        """Loss of the vectors of one batch."""
        return supervised_infonce(vectors, targets, temperature=temperature)

    def score(self, adapter: Trainable) -> float:
        """V-measure on the selection's texts. Not a number if a vector is not finite."""
        assert self._selection is not None
        vectors = adapter.encoder.embed(self._selection.tokens)
        return v_measure(vectors, self._selection.labels) if np.isfinite(vectors).all() else float("nan")

    def with_selection(self) -> Separation:
        """The same objective, trained on the selection's texts as well."""
        assert self._selection is not None
        return Separation(self._train + self._selection, None, config=self._config)


def v_measure(vectors: FloatArray, labels: IntArray) -> float:
    """Agreement of the labels with a k-means clustering of the unit vectors into as many clusters, 0..1.

    The seed is fixed. Source: Rosenberg and Hirschberg 2007.

    Args:
        vectors: float32 (texts, width).
        labels: (texts,).
    """
    from sklearn.cluster import KMeans
    from sklearn.metrics import v_measure_score
    from sklearn.preprocessing import normalize
    from threadpoolctl import threadpool_limits

    clustering = KMeans(len(np.unique(labels)), n_init=_CLUSTERINGS, random_state=0)
    with threadpool_limits(1):  # several threads add up the centres in any order, which changes the last bits
        clusters = clustering.fit_predict(normalize(vectors))
    return float(v_measure_score(labels, clusters))


@dataclass(frozen=True)
class _Groups:
    """Texts in groups of one label."""

    rows: IntArray
    """Numbers of all texts, group after group, (texts,)."""
    starts: IntArray
    """Position of each group's first text in ``rows``, (groups,)."""
    sizes: IntArray
    """Texts per group, (groups,)."""


def _grouped(labels: IntArray, order: np.random.Generator) -> _Groups:
    """Random pairs of texts of one label.

    If a label has an odd number of texts, the last joins a pair. The only text of a label is a group of one.
    """
    shuffled = order.permutation(len(labels))
    rows = shuffled[np.argsort(labels[shuffled], kind="stable")]
    _, first, counts = np.unique(labels[rows], return_index=True, return_counts=True)
    position = np.arange(len(rows)) - np.repeat(first, counts)
    is_start = (position % 2 == 0) & ((position < np.repeat(counts, counts) - 1) | (position == 0))
    starts = np.flatnonzero(is_start)
    return _Groups(rows, starts, np.diff(np.append(starts, len(rows))))
