"""LoRA and head on a frozen encoder: attach, save, load, merge; the file formats; the door to peft."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.adapter.lora import LoraLinear, share_inputs
from pipeline.adapter.targets import projection_paths
from pipeline.config import AdapterConfig
from pipeline.encoder.encoder import Batch, Encoder, FloatArray
from pipeline.encoder.tokeniser import Tokens


@dataclass(frozen=True)
class HeadStart:
    """Initial weights of the head, from a linear probe on the frozen encoder's vectors."""

    weight: FloatArray
    """(classes, width), for vectors that are not normalised."""
    bias: FloatArray
    """(classes,)."""


class Adapter:
    """LoRA weights, head and label names, attached to an encoder for one MTEB task."""

    def __init__(self, encoder: Encoder, config: AdapterConfig, label_names: Sequence[str], *, seed: int = 0) -> None:
        """Attach fresh LoRA pairs (no effect yet) and a head to the encoder, in place.

        Raises: AdapterError: the target matches nothing, or more layers are asked for than there are.
        """
        self.encoder = encoder
        self.config = config
        self.label_names = tuple(label_names)
        generator = torch.Generator().manual_seed(seed)
        self.projections: dict[str, LoraLinear] = {}
        for path in projection_paths(encoder.model, config, model_type=encoder.model.config.model_type):
            parent, leaf = _parent_of(encoder.model, path)
            lora = LoraLinear(
                getattr(parent, leaf), rank=config.rank, scaling=config.alpha / config.rank, generator=generator
            )
            setattr(parent, leaf, lora)
            self.projections[path] = lora
        if not encoder.runtime.compiled:  # the compiler sees the shared input by itself
            share_inputs(self.projections)
        linear = nn.Linear(encoder.hidden_size, len(label_names))
        nn.init.normal_(linear.weight, std=1 / math.sqrt(encoder.hidden_size), generator=generator)
        nn.init.zeros_(linear.bias)
        self.head = nn.Sequential(nn.Dropout(config.dropout), linear).to(encoder.device)

    @property
    def lora_parameters(self) -> list[nn.Parameter]:
        """A and B of every pair, in ``named_modules()`` order."""
        return [p for lora in self.projections.values() for p in (lora.lora_A, lora.lora_B)]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All that is trained."""
        return [*self.lora_parameters, *self.head.parameters()]

    def start_head(self, start: HeadStart) -> None:
        """Replace the head's random initialisation."""
        linear = self.head[1]
        assert isinstance(linear, nn.Linear)
        with torch.no_grad():
            linear.weight.copy_(torch.from_numpy(start.weight))
            linear.bias.copy_(torch.from_numpy(start.bias))

    def logits(self, batch: Batch) -> Tensor:
        """float32 (texts, classes); differentiable, with dropout where the head is in training mode."""
        logits: Tensor = self.head(self.encoder.pooled(batch))
        return logits

    def logits_of_vectors(self, vectors: FloatArray) -> FloatArray:
        """float32 (texts, classes) of text vectors that the adapted encoder has already made; no dropout."""
        self.head.eval()
        with torch.inference_mode():
            logits: FloatArray = self.head(torch.from_numpy(vectors).to(self.encoder.device)).cpu().numpy()
        return logits

    def detach(self) -> None:
        """Give the encoder its own projections back."""
        for path, lora in self.projections.items():
            parent, leaf = _parent_of(self.encoder.model, path)
            setattr(parent, leaf, lora.base)

    @contextmanager
    def merged(self) -> Iterator[None]:
        """While open, the encoder runs with plain projections ``W + scaling * B A``; bit for bit restored after."""
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
                    parent, leaf = _parent_of(self.encoder.model, path)
                    setattr(parent, leaf, lora)

    def merge_difference(self, tokens: Tokens) -> float:
        """Largest absolute difference between the text vectors of the unmerged and the merged adapter."""
        unmerged = self.encoder.embed(tokens)
        with self.merged():
            merged = self.encoder.embed(tokens)
        return float(np.abs(unmerged - merged).max())


def _parent_of(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    parent, _, leaf = path.rpartition(".")
    return model.get_submodule(parent), leaf
