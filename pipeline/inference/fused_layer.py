"""Encoders of BERT's kind as the bulk kernel computes them on a CPU: fewer passes over the tokens, and little Python between them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.encoder.attention import attend_jointly
from pipeline.encoder.frozen_linear import FrozenLinear, joined

# transformers' own classes of one structure, and nobody else's of that name.
_FROM = "transformers.models."
_LAYERS = ("BertLayer", "RobertaLayer", "XLMRobertaLayer", "ElectraLayer")
_MODELS = ("BertModel", "RobertaModel", "XLMRobertaModel")
_PROJECTIONS = ("query", "key", "value")
_JOINED = "qkv"


class FusedLayer(nn.Module):
    """Query, key and value in one product; GELU, and what a block adds to its input, inside their products. Inference only.

    Its children are those of the layer that it takes the place of, so an adapter finds its projections, and ``attention.self.qkv``.
    Speed: tests/benchmarks/EXPERIMENTS.md, "Bulk classification".
    """

    def __init__(self, layer: Any) -> None:
        """Take over the children of ``layer``, and change them."""
        super().__init__()
        self.attention, self.intermediate, self.output = layer.attention, layer.intermediate, layer.output
        own = self.attention.self
        projections = [getattr(own, name) for name in _PROJECTIONS]
        own.qkv = joined(projections)
        for projection, rows in zip(
            projections, own.qkv.weight.split([p.out_features for p in projections]), strict=True
        ):
            projection.weight = nn.Parameter(rows, requires_grad=False)  # the same memory
        self.intermediate.dense = FrozenLinear(self.intermediate.dense, gelu=True)

    def forward(self, hidden: Tensor, attention_mask: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
        """transformers' interface of an encoder's layer, (texts, tokens, width) in and out; the mask is added to the scores."""
        attention = self.attention
        own = attention.self
        projections = own.qkv.product(hidden).unflatten(
            -1, (len(_PROJECTIONS), own.num_attention_heads, own.attention_head_size)
        )
        attended = attend_jointly(projections, attention_mask, own.scaling).flatten(2)
        hidden = _add_and_normalise(attention.output, attended, hidden)
        return _add_and_normalise(self.output, self.intermediate.dense.product(hidden), hidden)


def _add_and_normalise(block: Any, x: Tensor, to: Tensor) -> Tensor:
    norm = block.LayerNorm
    return torch.layer_norm(block.dense.product(x, plus=to), norm.normalized_shape, norm.weight, norm.bias, norm.eps)


class Hidden(NamedTuple):
    """What ``FusedModel`` gives."""

    last_hidden_state: Tensor
    """(texts, tokens, width)."""


class FusedModel(nn.Module):
    """Embeddings and fused layers, called as the model is that it takes the place of, and with the same children."""

    def __init__(self, model: Any) -> None:
        """Take over the children of ``model``, whose layers are fused ones."""
        super().__init__()
        self.config, self.embeddings, self.encoder = model.config, model.embeddings, model.encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Hidden:
        """Token ids and mask, (texts, tokens) each; 1 for text, 0 for padding."""
        hidden = self.embeddings(input_ids)
        padding = attention_mask == 0
        mask = (
            torch.zeros_like(padding, dtype=hidden.dtype).masked_fill_(padding, float("-inf"))[:, None, None]
            if padding.any()
            else None
        )
        for layer in self.encoder.layer:
            hidden = layer(hidden, mask)
        return Hidden(hidden)


def fuse_layers(model: nn.Module) -> nn.Module:
    """The model, made faster in place where it is on a CPU: its layers of BERT's kind on packed weights, and every LayerNorm."""
    if any(parameter.device.type != "cpu" for parameter in model.parameters()):
        return model
    fused = 0
    for module in list(model.modules()):
        for name, child in module.named_children():
            if _can_be_fused(child):
                setattr(module, name, FusedLayer(child))
                fused += 1
            elif type(child) is nn.LayerNorm:
                child.float()  # PyTorch's kernel is faster with weights in float32, and the sums are in float32 anyway
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
    """Path -> projection of an adapter, as the model's layers want them: where those are fused, query, key and value are one."""
    wanted = dict[str, nn.Linear]()
    for path, projection in projections.items():
        parent, _, name = path.rpartition(".")
        own = model.get_submodule(parent)
        if name in _PROJECTIONS and hasattr(own, _JOINED):
            together = f"{parent}.{_JOINED}"
            if together not in wanted:
                wanted[together] = joined(
                    [projections.get(f"{parent}.{name}", getattr(own, name)) for name in _PROJECTIONS]
                )
        else:
            wanted[path] = projection
    return wanted
