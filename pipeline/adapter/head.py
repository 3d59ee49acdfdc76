"""The head of a classifier: a linear layer from text vectors to labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from pipeline.encoder.encoder import FloatArray


@dataclass(frozen=True)
class HeadStart:
    """Initial weights of a head, taken from a linear probe on the frozen encoder's vectors."""

    weight: FloatArray
    """Weight (classes, width), for vectors that are not normalised."""
    bias: FloatArray
    """Bias (classes,)."""


class Head(nn.Sequential):
    """Dropout and a linear layer, from text vectors float32 (texts, width) to logits float32 (texts, classes)."""

    def __init__(
        self, width: int, label_names: Sequence[str], *, dropout: float, generator: torch.Generator | None = None
    ) -> None:
        """Initialise the weights at random and the bias with zeros.

        Args:
            width: Number of dimensions of the text vectors.
            label_names: Names of the classes, in the order of the logits.
            dropout: Fraction of the vector that training drops, 0..1.
            generator: Source of the random weights.
        """
        linear = nn.Linear(width, len(label_names))
        nn.init.normal_(linear.weight, std=1 / math.sqrt(width), generator=generator)
        nn.init.zeros_(linear.bias)
        super().__init__(nn.Dropout(dropout), linear)
        self.label_names = tuple(label_names)

    @property
    def linear(self) -> nn.Linear:
        """The linear layer: weight (classes, width) and bias (classes,)."""
        linear = self[1]
        assert isinstance(linear, nn.Linear)
        return linear

    def start_from(self, start: HeadStart) -> None:
        """Replace the random weights by those of a probe."""
        with torch.no_grad():
            self.linear.weight.copy_(torch.from_numpy(start.weight))
            self.linear.bias.copy_(torch.from_numpy(start.bias))
