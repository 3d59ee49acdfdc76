"""The kernel of the bulk job and of the router: labels and vectors of several adapters in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from pipeline.adapter.description import FoundAdapter
from pipeline.config import TrainConfig
from pipeline.encoder import attention
from pipeline.encoder.encoder import Encoder, FloatArray
from pipeline.encoder.frozen_linear import keep_primitives
from pipeline.encoder.runtime import choose_runtime, exact_runtime
from pipeline.encoder.tokeniser import IntArray, Tokens
from pipeline.errors import AdapterError
from pipeline.inference.encoder_of_adapter import find_encoder_of
from pipeline.inference.engine import TOKENS_PER_BATCH, Answers, Engine, Outputs, keep_freed_memory
from pipeline.inference.fused_layer import fuse_layers

CLOSE_CALL = 0.03
"""If the second probability is less than this fraction below the first, float32 decides.

Gain and cost: tests/benchmarks/EXPERIMENTS.md, "Bulk classification"."""
_ANY_TEXT = "What an adapter says of this must be finite."


class Classifier:
    """Several adapters over the same texts, in the fastest dtype. Close calls are decided in float32."""

    def __init__(
        self, adapters: Sequence[FoundAdapter], encoder: Encoder, *, referee: Encoder | None = None, top_k: int = 1
    ) -> None:
        """Load the adapters.

        Args:
            adapters: Adapters that were trained on the encoder.
            encoder: The encoder. It is not changed.
            referee: The same encoder in float32, for close calls. None if ``encoder`` is in float32.
            top_k: Labels per text.
        Raises: AdapterError: an adapter's files are damaged, or it was trained on another encoder.
        """
        self.encoder = encoder
        self.top_k = top_k
        self._num_adapters = len(adapters)
        budget = TOKENS_PER_BATCH[encoder.device.type]
        self._fast = Engine(adapters, encoder, budget)
        # Numbers of the referee are twice as wide, so its batches are half as large.
        self._referee = None if referee is None else Engine(adapters, referee, budget // 2)
        tokens = self.tokenise([_ANY_TEXT])
        for index, found in enumerate(adapters):
            first = np.arange(1)
            if found.has_head:
                finite = self.classify_with(index, tokens, first, top_k=1).finite
            else:
                finite = np.isfinite(self.embed_with(index, tokens, first, width=encoder.hidden_size))
            if not finite.all():
                raise AdapterError(f"adapter {found.name}: its weights overflow: outputs for a text are not finite")

    def tokenise(self, texts: Sequence[str], *, prefix: str = "") -> Tokens:
        """Tokenise texts, each after a prefix, once for all adapters that share the prefix."""
        return self.encoder.tokenise([prefix + text for text in texts] if prefix else texts)

    def classify(self, tokens: Tokens) -> list[Answers]:
        """Classify texts with every adapter.

        Batches depend on the lengths only, so the same tokens give the same bits.

        Returns: One entry per adapter.

        Raises: AdapterError: an adapter has no head.
        """
        every = np.arange(len(tokens)), range(self._num_adapters)
        return [output.answers for output in self._outputs(tokens, *every, self.top_k, 0) if output.answers is not None]

    def compute(self, tokens: Tokens, *, labels: bool, width: int) -> list[Outputs]:
        """Compute labels, vectors or both of texts, with one pass of the encoder for each adapter.

        Args:
            tokens: Tokens of the texts.
            labels: Whether to classify, as ``classify`` does.
            width: Width of the vectors, as in ``embed_with``. 0: no vectors.
        Returns: One entry per adapter.

        Raises: AdapterError: labels are asked of an adapter without a head.
        """
        every = np.arange(len(tokens)), range(self._num_adapters)
        return self._outputs(tokens, *every, self.top_k if labels else 0, width)

    def classify_with(self, index: int, tokens: Tokens, rows: IntArray, *, top_k: int) -> Answers:
        """Classify some of the texts with one adapter, in the order of ``rows``."""
        (output,) = self._outputs(tokens, rows, [index], top_k, 0)
        assert output.answers is not None
        return output.answers

    def embed_with(self, index: int, tokens: Tokens, rows: IntArray, *, width: int) -> FloatArray:
        """Compute vectors of some of the texts with one adapter.

        They are computed in the encoder's dtype, without the referee.

        Args:
            index: Number of the adapter.
            tokens: Tokens of all texts.
            rows: Numbers of the texts.
            width: Number of leading dimensions to keep, at most the encoder's.
        Returns: Vectors of length 1, float32 (rows, width), in the order of ``rows``. NaN where the adapter overflows.
        """
        (output,) = self._outputs(tokens, rows, [index], 0, width)
        assert output.vectors is not None
        return output.vectors

    def _outputs(self, tokens: Tokens, rows: IntArray, indices: Sequence[int], top_k: int, width: int) -> list[Outputs]:
        labels = max(2, top_k) if top_k else 0  # the second label tells how close a call is
        outputs = self._fast.outputs(tokens, rows, indices, labels=labels, dimensions=width)
        if not top_k:
            return outputs
        return [
            Outputs(self._decided(output.answers, tokens, rows, index, top_k), output.vectors)
            for index, output in zip(indices, outputs, strict=True)
            if output.answers is not None
        ]

    def _decided(self, answer: Answers, tokens: Tokens, rows: IntArray, index: int, top_k: int) -> Answers:
        """The best ``top_k`` labels, with close calls decided by the referee."""
        if self._referee is not None:
            is_clear = answer.top_scores[:, 1] <= (1 - CLOSE_CALL) * answer.top_scores[:, 0]  # False for NaN
            close = np.flatnonzero(~is_clear)
            (exact,) = self._referee.answers(tokens, rows[close], [index], width=max(2, top_k))
            answer.top_labels[close], answer.top_scores[close] = exact.top_labels, exact.top_scores
        return Answers(answer.top_labels[:, :top_k], answer.top_scores[:, :top_k])


def load_classifier(
    adapters: Sequence[FoundAdapter],
    *,
    encoder: str | None,
    threads: int,
    use_gpu: bool,
    offline: bool,
    top_k: int = 1,
    precision: Literal["auto", "float32"] = "auto",
    labels: bool = True,
) -> Classifier:
    """Load adapters and the encoder that they were trained on.

    Args:
        adapters: Adapters that were trained on the same encoder.
        encoder: Location of the encoder. None: the name in the adapters' files.
        threads: Number of PyTorch threads.
        use_gpu: Use a GPU if there is one.
        offline: Send no request to the Hub.
        top_k: Labels per text.
        precision: ``auto`` is bfloat16 if the hardware multiplies it natively, with float32 for close calls.
        labels: Whether it will classify. If not, no float32 copy of the encoder is loaded for close calls.
    Raises:
        EncoderError: the encoder cannot be found.
        AdapterError: an adapter cannot be loaded, or was trained on another encoder.
    """
    torch.set_num_threads(threads)
    keep_primitives(128, per_thread=8)
    keep_freed_memory()
    runtime = choose_runtime(TrainConfig(precision=precision), threads=threads, use_gpu=use_gpu)
    files, config = find_encoder_of(adapters[0], encoder, offline=offline)
    fast = Encoder(files, config, runtime)
    exact = exact_runtime(threads=threads, use_gpu=use_gpu)
    referee = Encoder(files, config, exact) if labels and runtime.dtype != exact.dtype else None
    for loaded in (fast, referee):
        if loaded is not None:
            attention.for_inference(loaded.model)
            loaded.model = fuse_layers(loaded.model)
    return Classifier(adapters, fast, referee=referee, top_k=top_k)
