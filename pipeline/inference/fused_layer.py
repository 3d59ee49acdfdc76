"""Fused layers for BERT-like encoders on a CPU: fewer passes over the tokens, and less Python between them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.encoder.attention import attend_jointly
from pipeline.encoder.frozen_linear import FrozenLinear, joined

# Classes of transformers itself with the same structure. Classes of the same names in other packages do not count.
_FROM = "transformers.models."
_LAYERS = ("BertLayer", "RobertaLayer", "XLMRobertaLayer", "ElectraLayer")
_MODELS = ("BertModel", "RobertaModel", "XLMRobertaModel")
_PROJECTIONS = ("query", "key", "value")
_JOINED = "qkv"


class FusedLayer(nn.Module):
    """An encoder layer with fused products, for inference only.

    Query, key and value are one product. GELU and the residual additions are computed inside their products. The
    children are those of the replaced layer, so an adapter finds its projections, and ``attention.self.qkv``.
    Speed: tests/benchmarks/EXPERIMENTS.md, "Bulk classification".
    """

    def __init__(self, layer: Any) -> None:
        """Take over the children of ``layer``, and change them."""
        super().__init__()
        self.attention, self.intermediate, self.output = layer.attention, layer.intermediate, layer.output
        self_attention = self.attention.self
        projections = [getattr(self_attention, name) for name in _PROJECTIONS]
        self_attention.qkv = joined(projections)
        for projection, rows in zip(
            projections, self_attention.qkv.weight.split([p.out_features for p in projections]), strict=True
        ):
            projection.weight = nn.Parameter(rows, requires_grad=False)  # the same memory
        self.intermediate.dense = FrozenLinear(self.intermediate.dense, gelu=True)

    def forward(self, hidden: Tensor, attention_mask: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
        """(texts, tokens, width) -> (texts, tokens, width), as called by transformers. The mask is additive."""
        attention = self.attention
        self_attention = attention.self
        projections = self_attention.qkv.product(hidden).unflatten(
            -1, (len(_PROJECTIONS), self_attention.num_attention_heads, self_attention.attention_head_size)
        )
        attended = attend_jointly(projections, attention_mask, self_attention.scaling).flatten(2)
        hidden = _add_and_normalise(attention.output, attended, hidden)
        return _add_and_normalise(self.output, self.intermediate.dense.product(hidden), hidden)


def _add_and_normalise(block: Any, x: Tensor, to: Tensor) -> Tensor:
    norm = block.LayerNorm
    return torch.layer_norm(block.dense.product(x, plus=to), norm.normalized_shape, norm.weight, norm.bias, norm.eps)


class Hidden(NamedTuple):
    """Output of ``FusedModel``."""

    last_hidden_state: Tensor
    """Token vectors, (texts, tokens, width)."""


class FusedModel(nn.Module):
    """Embeddings and fused layers, with the interface and the children of the replaced model."""

    def __init__(self, model: Any) -> None:
        """Take over the children of ``model``, whose layers are already fused."""
        super().__init__()
        self.config, self.embeddings, self.encoder = model.config, model.embeddings, model.encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Hidden:
        """Compute token vectors from ids and mask, (texts, tokens) each. The mask is 1 for text, 0 for padding."""
        hidden = self.embeddings(input_ids)
        padding = attention_mask == 0
        mask = None
        if padding.any():
            zeros = torch.zeros_like(padding, dtype=hidden.dtype)
            mask = zeros.masked_fill_(padding, float("-inf"))[:, None, None]
        for layer in self.encoder.layer:
            hidden = layer(hidden, mask)
        return Hidden(hidden)


def fuse_layers(model: nn.Module) -> nn.Module:
    """Speed up a model on a CPU in place: fuse BERT-like layers with packed weights, and every LayerNorm."""
    if any(parameter.device.type != "cpu" for parameter in model.parameters()):
        return model
    fused = 0
    for module in list(model.modules()):
        for name, child in module.named_children():
            if _can_be_fused(child):
                setattr(module, name, FusedLayer(child))
                fused += 1
            elif type(child) is nn.LayerNorm:
                child.float()  # PyTorch's kernel is faster with float32 weights, and computes in float32 anyway
    return FusedModel(model) if fused and _is_one_of(model, _MODELS) else model


def _is_one_of(module: nn.Module, names: tuple[str, ...]) -> bool:
    return type(module).__name__ in names and type(module).__module__.startswith(_FROM)


def _can_be_fused(layer: Any) -> bool:
    from transformers.activations import GELUActivation

    if not _is_one_of(layer, _LAYERS) or layer.is_decoder:
        return False
    linears = [getattr(layer.attention.self, name) for name in _PROJECTIONS]
    linears += [block.dense for block in (layer.attention.output, layer.intermediate, layer.output)]
    packed = all(isinstance(linear, FrozenLinear) for linear in linears)
    return packed and isinstance(layer.intermediate.intermediate_act_fn, GELUActivation)


def join_projections(projections: Mapping[str, nn.Linear], model: nn.Module) -> dict[str, nn.Linear]:
    """Join an adapter's query, key and value projections if the model's layers are fused. Keys are module paths."""
    wanted = dict[str, nn.Linear]()
    for path, projection in projections.items():
        parent, _, name = path.rpartition(".")
        parent_module = model.get_submodule(parent)
        if name in _PROJECTIONS and hasattr(parent_module, _JOINED):
            together = f"{parent}.{_JOINED}"
            if together not in wanted:
                wanted[together] = joined(
                    [projections.get(f"{parent}.{name}", getattr(parent_module, name)) for name in _PROJECTIONS]
                )
        else:
            wanted[path] = projection
    return wanted
