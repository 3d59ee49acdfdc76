"""An encoder of which every weight is trained: full fine-tuning, the rival of LoRA."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from pipeline.adapter.state import EncoderState, new_head
from pipeline.encoder.trainable import TrainableEncoder


class FullEncoder(EncoderState):
    """All weights of an encoder, with or without the head of a classifier. Both sides of pairs share the encoder."""

    def __init__(
        self,
        encoder: TrainableEncoder,
        label_names: Sequence[str] | None = None,
        *,
        dropout: float = 0.0,
        seed: int = 0,
    ) -> None:
        """Make a head. The encoder's weights stay as they are.

        Args:
            encoder: Encoder to train, in place.
            label_names: Classes of the head. None: no head.
            dropout: Dropout probability before the head.
            seed: Seed of the head's initial weights.
        """
        self.encoder = encoder
        self.head = new_head(encoder, label_names, dropout=dropout, generator=torch.Generator().manual_seed(seed))

    @property
    def encoder_parameters(self) -> list[nn.Parameter]:
        """Every weight of the encoder."""
        return list(self.encoder.model.parameters())

    def detach(self) -> None:
        """Do nothing: an encoder of which every weight has changed is not used again."""
