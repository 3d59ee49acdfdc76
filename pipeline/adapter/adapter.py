"""LoRA pairs and a head on a frozen encoder: attach, merge and detach."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from pipeline.adapter.lora import LoraLinear, share_inputs
from pipeline.adapter.state import EncoderState, new_head
from pipeline.adapter.targets import projection_paths
from pipeline.config import AdapterConfig
from pipeline.encoder.encoder import Encoder
from pipeline.encoder.tokeniser import Tokens


class Adapter(EncoderState):
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
        self._projections: dict[str, LoraLinear] = {}
        for path in projection_paths(encoder.model, config, model_type=encoder.model.config.model_type):
            parent, leaf = _parent_of(encoder.model, path)
            lora = LoraLinear(
                getattr(parent, leaf), rank=config.rank, scaling=config.alpha / config.rank, generator=generator
            )
            setattr(parent, leaf, lora)
            self._projections[path] = lora
        if encoder.runtime.kernels == "lorafleet":  # a compiler shares inputs by itself
            share_inputs(self.projections)
        self.head = new_head(encoder, label_names, dropout=config.dropout, generator=generator)

    @property
    def projections(self) -> dict[str, LoraLinear]:
        """LoRA layers by module path."""
        return self._projections

    @property
    def encoder_parameters(self) -> list[nn.Parameter]:
        """A and B of every pair, in ``named_modules()`` order."""
        return [p for lora in self.projections.values() for p in (lora.lora_A, lora.lora_B)]

    def attach(self) -> None:
        """Put the pairs back in place, after ``detach``."""
        for path, lora in self.projections.items():
            parent, leaf = _parent_of(self.encoder.model, path)
            setattr(parent, leaf, lora)

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
