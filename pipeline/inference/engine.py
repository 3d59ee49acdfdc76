"""Computation of labels, scores and vectors from token arrays, on every core of a CPU or on one GPU."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass
from queue import SimpleQueue
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pipeline.adapter.description import CANNOT_CLASSIFY, FoundAdapter
from pipeline.encoder.encoder import Batch, Encoder, FloatArray, batches_by_budget
from pipeline.encoder.tokeniser import IntArray, Tokens
from pipeline.errors import AdapterError
from pipeline.inference.merging import MergedAdapter, Switch, merge_adapter, place_of, switched
from pipeline.inference.shared_layers import Computed, SharedLayers

# On a CPU, this many tokens fit into the second-level cache of a core.
TOKENS_PER_BATCH = {"cpu": 1024, "cuda": 65536}
_LEAST_TOKENS_PER_BATCH = 256
_MALLOPT_TRIM, _MALLOPT_MMAP, _MALLOPT_ARENAS = -1, -3, -8  # constants of malloc.h
_LARGEST_ARRAY = 1024**3


@dataclass(frozen=True)
class Answers:
    """Labels and probabilities of some texts from one adapter."""

    top_labels: npt.NDArray[np.int32]
    """Indices of the most probable labels, best first, (texts, k)."""
    top_scores: FloatArray
    """Calibrated probabilities of these labels, (texts, k)."""

    @property
    def labels(self) -> npt.NDArray[np.int32]:
        """Index of the most probable label, (texts,)."""
        return self.top_labels[:, 0]

    @property
    def scores(self) -> FloatArray:
        """Calibrated probability of the most probable label, (texts,)."""
        return self.top_scores[:, 0]

    @property
    def finite(self) -> npt.NDArray[np.bool_]:
        """Whether the probability is finite, (texts,). If not, the adapter overflowed and its labels are invalid."""
        return np.isfinite(self.scores)


@dataclass(frozen=True)
class Outputs:
    """Results of one adapter for some texts, from one pass of the encoder."""

    answers: Answers | None
    """Labels and probabilities. None if they were not asked for."""
    vectors: FloatArray | None
    """Unit vectors, float32 (texts, width). A row of NaN if the adapter overflows. None if they were not asked for."""


class Engine:
    """An encoder with several adapters, merged into copies of its projections. Each core computes a batch."""

    def __init__(self, adapters: Sequence[FoundAdapter], encoder: Encoder, tokens_per_batch: int) -> None:
        self._encoder = encoder
        self._tokens_per_batch = tokens_per_batch
        self._merged = [merge_adapter(found, encoder) for found in adapters]
        # Cores that share a batch wait for each other after every operation.
        count = encoder.runtime.threads if encoder.device.type == "cpu" else 1
        self._idle: SimpleQueue[_Stream] = SimpleQueue()
        for _ in range(count):
            self._idle.put(_Stream(encoder, self._merged))
        self._pool = ThreadPoolExecutor(count, "stream", torch.set_num_threads, (1,)) if count > 1 else None

    def answers(self, tokens: Tokens, which: IntArray, indices: Sequence[int], *, width: int) -> list[Answers]:
        """Classify some of the texts with some adapters.

        Args:
            tokens: Tokens of all texts.
            which: Numbers of the texts to classify.
            indices: Numbers of the adapters.
            width: Labels per text.
        Raises: AdapterError: an adapter has no head.
        """
        outputs = self.outputs(tokens, which, indices, labels=width, dimensions=0)
        return [output.answers for output in outputs if output.answers is not None]

    def outputs(
        self, tokens: Tokens, which: IntArray, indices: Sequence[int], *, labels: int, dimensions: int
    ) -> list[Outputs]:
        """Compute labels, vectors or both of some of the texts, in one pass for each adapter.

        Args:
            tokens: Tokens of all texts.
            which: Numbers of the texts.
            indices: Numbers of the adapters.
            labels: Labels per text. 0: no labels.
            dimensions: Width of the vectors. 0: no vectors.
        Raises: AdapterError: labels are asked of an adapter without a head.
        """
        sizes = [min(labels, self._head(index).out_features) if labels else 0 for index in indices]
        rows, batches = self._each_batch(
            tokens, which, lambda stream, batch: stream.compute(batch, indices, labels, dimensions)
        )
        return [
            Outputs(
                answers=_in_order([parts[i].answer for parts in batches], rows, size) if size else None,
                vectors=_vectors_in_order([parts[i].vectors for parts in batches], rows, dimensions)
                if dimensions
                else None,
            )
            for i, size in enumerate(sizes)
        ]

    def _head(self, index: int) -> nn.Linear:
        head = self._merged[index].head
        if head is None:
            raise AdapterError(f"this adapter has no labels: {CANNOT_CLASSIFY}")
        return head

    def _each_batch(
        self, tokens: Tokens, which: IntArray, compute: Callable[[_Stream, Batch], Computed]
    ) -> tuple[IntArray, list[Computed]]:
        """Compute each batch.

        Returns: Positions in ``which`` of the texts of all batches, concatenated, and the result of each batch.
        """

        def run(rows: IntArray) -> Computed:
            stream = self._idle.get()
            try:
                return compute(stream, self._encoder.batch(tokens, which[rows]))
            finally:
                self._idle.put(stream)

        lengths, budget = tokens.lengths[which], self._tokens_per_batch
        # Few texts get small batches, so that no core waits long for another. The number of cores has no influence.
        if self._encoder.device.type == "cpu":
            budget = min(budget, max(_LEAST_TOKENS_PER_BATCH, int(lengths.sum()) // 8))
        batches = list(batches_by_budget(lengths, tokens_per_batch=budget))
        computed = list(map(run, batches) if self._pool is None else self._pool.map(run, batches))
        return np.concatenate(batches) if batches else np.empty(0, dtype=np.int64), computed


class _Computed(NamedTuple):
    """Results of one adapter for a batch, on the encoder's device."""

    answer: tuple[Tensor, Tensor] | None
    """Highest scores and their labels, (texts, labels) each."""
    vectors: Tensor | None
    """Unit vectors, float32 (texts, dimensions)."""


class _Stream:
    """Copies of the encoder's modules for one thread, which switches adapters in them. The weights are shared."""

    def __init__(self, encoder: Encoder, adapters: Sequence[MergedAdapter]) -> None:
        self._encoder = copy(encoder)
        self._encoder.model = _twin(encoder.model)
        self._adapters = adapters
        self._switches = [
            [Switch(*place_of(self._encoder.model, path), linear) for path, linear in adapter.projections.items()]
            for adapter in adapters
        ]
        self._layers = SharedLayers(self._encoder.model, [adapter.first_layer for adapter in adapters])

    @torch.inference_mode()
    def compute(self, batch: Batch, indices: Iterable[int], labels: int, dimensions: int) -> list[_Computed]:
        """Labels, vectors or both from some adapters for a batch. 0 means none of them."""
        self._layers.forget()
        computed = []
        for index in indices:
            pooled = self._pooled(batch, index)
            computed.append(
                _Computed(
                    self._best(pooled, self._adapters[index], labels) if labels else None,
                    _unit_vectors(pooled[:, :dimensions]) if dimensions else None,
                )
            )
        return computed

    def _best(self, pooled: Tensor, adapter: MergedAdapter, labels: int) -> tuple[Tensor, Tensor]:
        assert adapter.head is not None, "checked before the first batch"
        logits = adapter.head(pooled) / adapter.temperature
        scores, best = torch.softmax(logits, dim=1).topk(min(labels, logits.shape[1]), dim=1)
        return scores, best

    def _pooled(self, batch: Batch, index: int) -> Tensor:
        with switched(self._switches[index]), self._layers.shared_below(self._adapters[index].first_layer):
            return self._encoder.pooled(batch)


def _twin(module: nn.Module) -> nn.Module:
    """Copy a module and its children. The copy shares the weights."""
    twin = copy(module)
    twin._modules = {name: None if child is None else _twin(child) for name, child in module._modules.items()}
    return twin


def _unit_vectors(vectors: Tensor) -> Tensor:
    """Vectors of length 1, float32 (texts, width). A vector that has no direction becomes NaN."""
    lengths = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    return vectors / lengths.masked_fill(~(lengths.isfinite() & (lengths > 0)), float("nan"))


def _in_order(parts: Sequence[tuple[Tensor, Tensor] | None], rows: npt.NDArray[np.int64], width: int) -> Answers:
    scores, labels = np.empty((len(rows), width), dtype=np.float32), np.empty((len(rows), width), dtype=np.int32)
    computed = [part for part in parts if part is not None]
    if computed:
        scores[rows] = torch.cat([p for p, _ in computed]).float().cpu().numpy()
        labels[rows] = torch.cat([p for _, p in computed]).cpu().numpy()
    return Answers(labels, scores)


def _vectors_in_order(parts: Sequence[Tensor | None], rows: npt.NDArray[np.int64], width: int) -> FloatArray:
    vectors = np.empty((len(rows), width), dtype=np.float32)
    computed = [part for part in parts if part is not None]
    if computed:
        vectors[rows] = torch.cat(computed).cpu().numpy()
    return vectors


def keep_freed_memory() -> None:
    """Make glibc reuse freed arrays instead of returning them to the system.

    Without it, long texts take 1.5 times as long. All threads share one arena, because one per thread needs 60 MB more.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_MALLOPT_MMAP, _LARGEST_ARRAY)
        mallopt(_MALLOPT_TRIM, _LARGEST_ARRAY)
        mallopt(_MALLOPT_ARENAS, 1)
