"""Merging of adapters into copies of the encoder's layers, and switching between them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from pipeline.adapter.description import FoundAdapter
from pipeline.adapter.files import load_adapter
from pipeline.adapter.targets import layer_number
from pipeline.encoder.encoder import Encoder
from pipeline.encoder.frozen_linear import FrozenLinear
from pipeline.inference.fused_layer import join_projections
from pipeline.inference.shared_layers import OUTSIDE_LAYERS


@dataclass(frozen=True)
class MergedAdapter:
    """An adapter as plain linear layers."""

    projections: dict[str, nn.Linear]
    """Layers with weight ``W + scaling * B A`` in the encoder's dtype, by module path."""
    head: nn.Linear | None
    """Head in float32. None for an adapter without a head."""
    temperature: float
    """Temperature of the calibration. 1 without one."""
    first_layer: int
    """Number of the first layer that the adapter changes, or ``OUTSIDE_LAYERS``."""


def merge_adapter(found: FoundAdapter, encoder: Encoder) -> MergedAdapter:
    """Merge an adapter into copies of the layers that it changes. The encoder is unchanged."""
    adapter = load_adapter(found.folder, encoder, found=found)
    adapter.detach()
    numbers = [layer_number(path) for path in adapter.projections]
    return MergedAdapter(
        projections=join_projections(
            {path: _merge(lora.base, lora.update) for path, lora in adapter.projections.items()}, encoder.model
        ),
        head=None if adapter.head is None else adapter.head.linear,
        temperature=found.calibration.temperature if found.calibration else 1.0,
        first_layer=min(OUTSIDE_LAYERS if number is None else number for number in numbers),
    )


class Switch(NamedTuple):
    """A projection of the encoder and its replacement for one adapter.

    A named tuple, because every batch switches all projections of every adapter."""

    children: dict[str, nn.Module | None]
    name: str
    merged: nn.Linear


@contextmanager
def switched(switches: Sequence[Switch]) -> Iterator[None]:
    """Run the encoder with an adapter's projections while open."""
    frozen = [switch.children[switch.name] for switch in switches]
    try:
        for switch in switches:
            switch.children[switch.name] = switch.merged
        yield
    finally:
        for switch, module in zip(switches, frozen, strict=True):
            switch.children[switch.name] = module


def place_of(model: nn.Module, path: str) -> tuple[dict[str, nn.Module | None], str]:
    """Mapping of the parent's children and the module's name in it, with which the module can be replaced."""
    parent, _, name = path.rpartition(".")
    return model.get_submodule(parent)._modules, name


def _merge(base: nn.Linear, update: Tensor) -> nn.Linear:
    weight = (base.weight.detach().float() + update.detach()).to(base.weight.dtype)
    merged = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
    merged.weight, merged.bias = nn.Parameter(weight, requires_grad=False), base.bias
    return FrozenLinear(merged, gelu=base.gelu) if isinstance(base, FrozenLinear) else merged
