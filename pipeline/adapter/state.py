"""A state of an encoder: its changed weights, and the head of a classifier if there is one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from pipeline.adapter.description import CANNOT_CLASSIFY
from pipeline.adapter.head import Head
from pipeline.adapter.lora import LoraLinear
from pipeline.encoder.encoder import Batch, Encoder, FloatArray
from pipeline.encoder.tokeniser import Tokens
from pipeline.errors import AdapterError
from pipeline.records import Side


class EncoderState(ABC):
    """Trained weights that change an encoder in place, with or without the head of a classifier."""

    encoder: Encoder
    head: Head | None = None

    @property
    @abstractmethod
    def encoder_parameters(self) -> list[nn.Parameter]:
        """Trained weights that change the encoder."""

    @abstractmethod
    def detach(self) -> None:
        """Take the changes out of the encoder."""

    @property
    def projections(self) -> Mapping[str, LoraLinear]:
        """LoRA layers by module path. Empty if the state has none."""
        return {}

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All trained weights: those that change the encoder, then those of the head."""
        return [*self.encoder_parameters, *(self.head.parameters() if self.head is not None else ())]

    @property
    def classifier(self) -> Head:
        """The head.

        Raises: AdapterError: there is none.
        """
        if self.head is None:
            raise AdapterError(f"this adapter has no logits: {CANNOT_CLASSIFY}")
        return self.head

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the head's classes, in the order of its logits. Empty without a head."""
        return () if self.head is None else self.head.label_names

    def train(self, mode: bool = True) -> None:
        """Switch the head's dropout on or off."""
        if self.head is not None:
            self.head.train(mode)

    def eval(self) -> None:
        """Switch the head's dropout off."""
        self.train(False)

    def vectors(self, batch: Batch) -> Tensor:
        """Text vectors of the changed encoder, float32 (texts, width), differentiable."""
        return self.encoder.pooled(batch)

    def vectors_of(self, side: Side, batch: Batch) -> Tensor:
        """As ``vectors``: both sides of pairs of texts have this state."""
        return self.vectors(batch)

    def embed(self, side: Side, tokens: Tokens) -> FloatArray:
        """Text vectors, float32 (texts, width). Both sides of pairs of texts have this state."""
        return self.encoder.embed(tokens)

    @property
    def kind_of_outputs(self) -> str:
        """Name of ``outputs`` in messages."""
        return "vectors" if self.head is None else "logits"

    def outputs(self, vectors: FloatArray) -> FloatArray:
        """Logits of text vectors, float32 (texts, classes). Without a head: the vectors themselves, (texts, width)."""
        return vectors if self.head is None else self.logits_of_vectors(vectors)

    def logits(self, batch: Batch) -> Tensor:
        """Logits of a batch, float32 (texts, classes), differentiable. Dropout is on in training mode.

        Raises: AdapterError: there is no head.
        """
        logits: Tensor = self.classifier(self.vectors(batch))
        return logits

    def logits_of_vectors(self, vectors: FloatArray) -> FloatArray:
        """Logits of text vectors that the changed encoder computed, float32 (texts, classes), without dropout.

        Raises: AdapterError: there is no head.
        """
        head = self.classifier.eval()
        with torch.inference_mode():
            logits: FloatArray = head(torch.from_numpy(vectors).to(self.encoder.device)).cpu().numpy()
        return logits


def new_head(
    encoder: Encoder, label_names: Sequence[str] | None, *, dropout: float, generator: torch.Generator
) -> Head | None:
    """Make a head on the encoder's device. None without label names."""
    if label_names is None:
        return None
    return Head(encoder.hidden_size, label_names, dropout=dropout, generator=generator).to(encoder.device)
