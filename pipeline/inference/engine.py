"""Token arrays in, labels and scores out, on every core of a CPU or on one GPU."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass
from queue import SimpleQueue

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

TOKENS_PER_BATCH = {"cpu": 1024, "cuda": 65536}  # of a CPU: what a core's second-level cache holds between two layers


_LEAST_TOKENS_PER_BATCH = 256


_MALLOPT_TRIM, _MALLOPT_MMAP, _MALLOPT_ARENAS = -1, -3, -8  # of malloc.h


_LARGEST_ARRAY = 1024**3


@dataclass(frozen=True)
class Answers:
    """What one adapter says of some texts."""

    top_labels: npt.NDArray[np.int32]
    """Indices of the most probable labels, best first, (texts, k)."""
    top_scores: FloatArray
    """Their calibrated probabilities, (texts, k)."""

    @property
    def labels(self) -> npt.NDArray[np.int32]:
        """Index of the most probable label, (texts,)."""
        return self.top_labels[:, 0]

    @property
    def scores(self) -> FloatArray:
        """Its calibrated probability, (texts,)."""
        return self.top_scores[:, 0]

    @property
    def finite(self) -> npt.NDArray[np.bool_]:
        """Whether the adapter computed a probability at all, (texts,); where it overflowed, its labels mean nothing."""
        return np.isfinite(self.scores)


class Engine:
    """One encoder with several adapters merged into private copies of its projections, a batch at a time on each core."""

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

    def answers(self, tokens: Tokens, which: IntArray, asked: Sequence[int], *, width: int) -> list[Answers]:
        """Of some adapters about some of the texts."""
        sizes = [self._head(index).out_features for index in asked]
        rows, answered = self._each_batch(tokens, which, lambda stream, batch: stream.answer(batch, asked, width))
        return [_in_order([parts[i] for parts in answered], rows, min(width, size)) for i, size in enumerate(sizes)]

    def _head(self, index: int) -> nn.Linear:
        head = self._merged[index].head
        if head is None:
            raise AdapterError(f"this adapter cannot be asked for labels: {CANNOT_CLASSIFY}")
        return head

    def embed(self, tokens: Tokens, which: IntArray, index: int) -> FloatArray:
        """Vectors of one adapter for some of the texts, float32 (texts, width)."""
        rows, made = self._each_batch(tokens, which, lambda stream, batch: stream.embed(batch, index).cpu())
        vectors = np.empty((len(rows), self._encoder.hidden_size), dtype=np.float32)
        if made:
            vectors[rows] = torch.cat(made).numpy()
        return vectors

    def _each_batch(
        self, tokens: Tokens, which: IntArray, compute: Callable[[_Stream, Batch], Computed]
    ) -> tuple[IntArray, list[Computed]]:
        """What each batch gives, and the places in ``which`` that its texts have, one after the other."""

        def run(rows: IntArray) -> Computed:
            stream = self._idle.get()
            try:
                return compute(stream, self._encoder.batch(tokens, which[rows]))
            finally:
                self._idle.put(stream)

        lengths, budget = tokens.lengths[which], self._tokens_per_batch
        if (
            self._encoder.device.type == "cpu"
        ):  # few texts in batches so small that no core waits long for another; whatever their number
            budget = min(budget, max(_LEAST_TOKENS_PER_BATCH, int(lengths.sum()) // 8))
        batches = list(batches_by_budget(lengths, tokens_per_batch=budget))
        computed = list(map(run, batches) if self._pool is None else self._pool.map(run, batches))
        return np.concatenate(batches) if batches else np.empty(0, dtype=np.int64), computed


class _Stream:
    """The encoder's modules for one thread, which switches the adapters in them; the weights are everybody's."""

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
    def answer(self, batch: Batch, asked: Iterable[int], width: int) -> list[tuple[Tensor, Tensor]]:
        """Best scores and labels of some adapters for a batch, (texts, width) each."""
        self._layers.forget()
        answers = []
        for index in asked:
            adapter = self._adapters[index]
            assert adapter.head is not None, "checked before the first batch"
            logits = adapter.head(self._pooled(batch, index)) / adapter.temperature
            scores, labels = torch.softmax(logits, dim=1).topk(min(width, logits.shape[1]), dim=1)
            answers.append((scores, labels))
        return answers

    @torch.inference_mode()
    def embed(self, batch: Batch, index: int) -> Tensor:
        """Vectors of one adapter for a batch, float32 (texts, width), at length 1 where the encoder's own definition says so."""
        self._layers.forget()
        vectors = self._pooled(batch, index)
        return nn.functional.normalize(vectors, dim=1) if self._encoder.normalize else vectors

    def _pooled(self, batch: Batch, index: int) -> Tensor:
        with switched(self._switches[index]), self._layers.shared_below(self._adapters[index].first_layer):
            return self._encoder.pooled(batch)


def _twin(module: nn.Module) -> nn.Module:
    """The same weights in a module of its own."""
    twin = copy(module)
    twin._modules = {name: None if child is None else _twin(child) for name, child in module._modules.items()}
    return twin


def _in_order(parts: list[tuple[Tensor, Tensor]], rows: npt.NDArray[np.int64], width: int) -> Answers:
    scores, labels = np.empty((len(rows), width), dtype=np.float32), np.empty((len(rows), width), dtype=np.int32)
    if parts:
        scores[rows] = torch.cat([p for p, _ in parts]).float().cpu().numpy()
        labels[rows] = torch.cat([p for _, p in parts]).cpu().numpy()
    return Answers(labels, scores)


def keep_freed_memory() -> None:
    """Have glibc use freed arrays again instead of asking the system for each anew: of long texts that was a third of the time.

    All threads' arrays come from one arena: one for each thread keeps 60 MB more.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_MALLOPT_MMAP, _LARGEST_ARRAY)
        mallopt(_MALLOPT_TRIM, _LARGEST_ARRAY)
        mallopt(_MALLOPT_ARENAS, 1)
