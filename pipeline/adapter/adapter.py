"""LoRA pairs and a head on a frozen encoder: attach, merge and detach."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.adapter.description import CANNOT_CLASSIFY
from pipeline.adapter.head import Head
from pipeline.adapter.lora import LoraLinear, share_inputs
from pipeline.adapter.targets import projection_paths
from pipeline.config import AdapterConfig
from pipeline.encoder.encoder import Batch, Encoder, FloatArray
from pipeline.encoder.tokeniser import Tokens
from pipeline.errors import AdapterError
from pipeline.records import Side


class Adapter:
    """LoRA pairs on an encoder, with or without the head of a classifier."""

    def __init__(
        self, encoder: Encoder, config: AdapterConfig, label_names: Sequence[str] | None = None, *, seed: int = 0
    ) -> None:
        """Attach fresh LoRA pairs to the encoder in place, and make a head. Fresh pairs have no effect.

        Args:
            encoder: The frozen base.
            config: Rank, scaling and layers of the pairs, and the head's dropout.
            label_names: Classes of the head. None makes an adapter without a head, which cannot classify.
            seed: Seed of the initial weights.
        Raises: AdapterError: the target matches no layer, or the config requests more layers than exist.
        """
        self.encoder = encoder
        self.config = config
        generator = torch.Generator().manual_seed(seed)
        self.projections: dict[str, LoraLinear] = {}
        for path in projection_paths(encoder.model, config, model_type=encoder.model.config.model_type):
            parent, leaf = _parent_of(encoder.model, path)
            lora = LoraLinear(
                getattr(parent, leaf), rank=config.rank, scaling=config.alpha / config.rank, generator=generator
            )
            setattr(parent, leaf, lora)
            self.projections[path] = lora
        if encoder.runtime.kernels == "lorafleet":  # a compiler shares inputs by itself
            share_inputs(self.projections)
        self.head: Head | None = None
        if label_names is not None:
            head = Head(encoder.hidden_size, label_names, dropout=config.dropout, generator=generator)
            self.head = head.to(encoder.device)

    @property
    def classifier(self) -> Head:
        """The head.

        Raises: AdapterError: the adapter has none.
        """
        if self.head is None:
            raise AdapterError(f"this adapter has no logits: {CANNOT_CLASSIFY}")
        return self.head

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the head's classes, in the order of its logits. Empty without a head."""
        return () if self.head is None else self.head.label_names

    @property
    def lora_parameters(self) -> list[nn.Parameter]:
        """A and B of every pair, in ``named_modules()`` order."""
        return [p for lora in self.projections.values() for p in (lora.lora_A, lora.lora_B)]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All trained weights: those of the pairs, then those of the head."""
        return [*self.lora_parameters, *(self.head.parameters() if self.head is not None else ())]

    def train(self, mode: bool = True) -> None:
        """Switch the head's dropout on or off."""
        if self.head is not None:
            self.head.train(mode)

    def eval(self) -> None:
        """Switch the head's dropout off."""
        self.train(False)

    def vectors(self, batch: Batch) -> Tensor:
        """Text vectors of the adapted encoder, float32 (texts, width), differentiable."""
        return self.encoder.pooled(batch)

    @property
    def kind_of_outputs(self) -> str:
        """Name of ``outputs`` in messages."""
        return "vectors" if self.head is None else "logits"

    def outputs(self, vectors: FloatArray) -> FloatArray:
        """Logits of text vectors, float32 (texts, classes). Without a head: the vectors themselves, (texts, width)."""
        return vectors if self.head is None else self.logits_of_vectors(vectors)

    def logits(self, batch: Batch) -> Tensor:
        """Logits of a batch, float32 (texts, classes), differentiable. Dropout is on in training mode.

        Raises: AdapterError: the adapter has no head.
        """
        logits: Tensor = self.classifier(self.vectors(batch))
        return logits

    def logits_of_vectors(self, vectors: FloatArray) -> FloatArray:
        """Logits of text vectors that the adapted encoder computed, float32 (texts, classes), without dropout.

        Raises: AdapterError: the adapter has no head.
        """
        head = self.classifier.eval()
        with torch.inference_mode():
            logits: FloatArray = head(torch.from_numpy(vectors).to(self.encoder.device)).cpu().numpy()
        return logits

    def attach(self) -> None:
        """Put the pairs back in place, after ``detach``."""
        for path, lora in self.projections.items():
            parent, leaf = _parent_of(self.encoder.model, path)
            setattr(parent, leaf, lora)

    def vectors_of(self, side: Side, batch: Batch) -> Tensor:
        """As ``vectors``: both sides of pairs of texts have this adapter."""
        return self.vectors(batch)

    def embed(self, side: Side, tokens: Tokens) -> FloatArray:
        """Text vectors, float32 (texts, width). Both sides of pairs of texts have this adapter."""
        return self.encoder.embed(tokens)

    def detach(self) -> None:
        """Put the encoder's own projections back in place."""
        for path, lora in self.projections.items():
            parent, leaf = _parent_of(self.encoder.model, path)
            setattr(parent, leaf, lora.base)

    @contextmanager
    def merged(self) -> Iterator[None]:
        """Run the encoder with plain projections ``W + scaling * B A``. On exit it is restored bit for bit."""
        kept = {path: lora.base.weight.detach().clone() for path, lora in self.projections.items()}
        self.detach()
        try:
            with torch.no_grad():
                for lora in self.projections.values():
                    lora.base.weight.copy_(lora.base.weight.float() + lora.update)
            yield
        finally:
            with torch.no_grad():
                for path, lora in self.projections.items():
                    lora.base.weight.copy_(kept[path])
            self.attach()

    def merge_difference(self, tokens: Tokens) -> float:
        """Largest absolute difference between the text vectors of the unmerged and the merged adapter."""
        unmerged = self.encoder.embed(tokens)
        with self.merged():
            merged = self.encoder.embed(tokens)
        return float(np.abs(unmerged - merged).max())


def _parent_of(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    parent, _, leaf = path.rpartition(".")
    return model.get_submodule(parent), leaf
