"""The bulk job's kernel: texts in, labels and probabilities out, for several adapters in one pass. Knows no file and no Ray."""

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
from pipeline.inference.engine import TOKENS_PER_BATCH, Answers, Engine, keep_freed_memory
from pipeline.inference.fused_layer import fuse_layers

CLOSE_CALL = 0.03
"""Where the second label is less than this share behind the first, float32 decides.

Gain and cost: tests/benchmarks/EXPERIMENTS.md, "Bulk classification"."""
_ANY_TEXT = "What an adapter says of this must be finite."


class Classifier:
    """Several adapters over the same texts, in the fastest dtype; where that cannot tell two labels apart, float32 decides."""

    def __init__(
        self, adapters: Sequence[FoundAdapter], encoder: Encoder, *, referee: Encoder | None = None, top_k: int = 1
    ) -> None:
        """Load the adapters.

        Args:
            adapters: Trained on the encoder.
            encoder: Left as it is.
            referee: The same one in float32, asked again about close calls; none where ``encoder`` is it.
            top_k: Labels per text.
        Raises: AdapterError: an adapter's files are damaged, or it was trained on another encoder.
        """
        self.encoder = encoder
        self.top_k = top_k
        self._num_adapters = len(adapters)
        budget = TOKENS_PER_BATCH[encoder.device.type]
        self._fast = Engine(adapters, encoder, budget)
        self._referee = (
            None if referee is None else Engine(adapters, referee, budget // 2)
        )  # whose numbers are twice as wide
        tokens = self.tokenise([_ANY_TEXT])
        for index, found in enumerate(adapters):
            first = np.arange(1)
            if found.has_head:
                finite = self.classify_with(index, tokens, first, top_k=1).finite
            else:
                finite = np.isfinite(self.embed_with(index, tokens, first))
            if not finite.all():
                raise AdapterError(
                    f"adapter {found.name}: its weights overflow: what it says of a text is not a finite number"
                )

    def tokenise(self, texts: Sequence[str]) -> Tokens:
        """Once for all adapters."""
        return self.encoder.tokenise(texts)

    def classify(self, tokens: Tokens) -> list[Answers]:
        """One answer per adapter. The same tokens give the same bits: batches depend on the lengths alone.

        Raises: AdapterError: an adapter has no head.
        """
        return self._answers(tokens, np.arange(len(tokens)), range(self._num_adapters), self.top_k)

    def classify_with(self, index: int, tokens: Tokens, rows: IntArray, *, top_k: int) -> Answers:
        """What one adapter says of some of the texts, in the order of ``rows``."""
        (answers,) = self._answers(tokens, rows, [index], top_k)
        return answers

    def embed_with(self, index: int, tokens: Tokens, rows: IntArray) -> FloatArray:
        """What the encoder makes of some of the texts with one adapter, float32 (rows, width), in the order of ``rows``.

        Unit vectors where the encoder's own definition ends in them. Computed in the encoder's dtype; the referee has no part in it.
        """
        return self._fast.embed(tokens, rows, index)

    def _answers(self, tokens: Tokens, rows: IntArray, asked: Sequence[int], top_k: int) -> list[Answers]:
        width = max(2, top_k)  # the second label says how close a call is
        answers = self._fast.answers(tokens, rows, asked, width=width)
        if self._referee is not None:
            for index, answer in zip(asked, answers, strict=True):
                close = np.flatnonzero(
                    ~(answer.top_scores[:, 1] <= (1 - CLOSE_CALL) * answer.top_scores[:, 0])
                )  # NaN too
                (exact,) = self._referee.answers(tokens, rows[close], [index], width=width)
                answer.top_labels[close], answer.top_scores[close] = exact.top_labels, exact.top_scores
        return [Answers(answer.top_labels[:, :top_k], answer.top_scores[:, :top_k]) for answer in answers]


def load_classifier(
    adapters: Sequence[FoundAdapter],
    *,
    encoder: str | None,
    threads: int,
    use_gpu: bool,
    offline: bool,
    top_k: int = 1,
    precision: Literal["auto", "float32"] = "auto",
) -> Classifier:
    """The kernel for some adapters, on the encoder that they were trained on.

    Args:
        adapters: Trained on the same encoder.
        encoder: Where the encoder lies, if not under the name that the adapters give.
        threads: Of PyTorch.
        use_gpu: Where there is one.
        offline: Never ask the Hub.
        top_k: Labels per text.
        precision: ``auto`` is bfloat16 where the hardware multiplies it natively, with float32 for close calls.
    Raises:
        EncoderError: the encoder cannot be found, or is another one than the adapters were trained on.
        AdapterError: an adapter cannot be loaded.
    """
    torch.set_num_threads(threads)
    keep_primitives(128, per_thread=8)
    keep_freed_memory()
    runtime = choose_runtime(TrainConfig(precision=precision), threads=threads, use_gpu=use_gpu)
    files, config = find_encoder_of(adapters[0], encoder, offline=offline)
    loaded = Encoder(files, config, runtime)
    exact = exact_runtime(threads=threads, use_gpu=use_gpu)
    referee = Encoder(files, config, exact) if runtime.dtype != exact.dtype else None
    for made in (loaded, referee):
        if made is not None:
            attention.for_inference(made.model)
            made.model = fuse_layers(made.model)
    return Classifier(adapters, loaded, referee=referee, top_k=top_k)
