"""Attention for short texts on a CPU, registered with transformers as an attention implementation.

PyTorch's softmax processes rows shorter than its vectors element by element. For short texts it therefore costs more
than both matrix products. Here the exponential runs over the whole array at once, which takes 70 instead of 325 µs for
texts of 15 tokens: tests/benchmarks/EXPERIMENTS.md, "Training speed: what was tried".
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

NAME = "lorafleet"
INFERENCE = "lorafleet-inference"
"""Name of the implementation without a backward pass.

It divides the output by the sums, instead of the weights, which are wider."""
_FUSED_FROM = 32  # tokens; from this length on PyTorch's fused kernel is faster, on a CPU with matrix tiles
_SMALLEST_SUM, _LARGEST_SUM = 1e-30, 1e30
_LOG2_E = math.log2(math.e)


def register() -> None:
    """Register both implementations with transformers, as ``NAME`` and ``INFERENCE``."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, eager_mask

    for name, attend in ((NAME, _attend), (INFERENCE, _attend_forward)):
        AttentionInterface.register(name, attend)
        AttentionMaskInterface.register(name, eager_mask)


def for_inference(model: Any) -> None:
    """Switch a model from ``NAME`` to ``INFERENCE``, which has no backward pass."""
    if model.config._attn_implementation == NAME:
        model.set_attn_implementation(INFERENCE)


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention with transformers' interface. Without dropout, because the frozen encoder runs in evaluation mode.

    Args:
        module: The calling layer.
        query: (texts, heads, tokens, width).
        key: (texts, groups, tokens, width). The number of heads is a multiple of the number of groups.
        value: Same shape as ``key``.
        attention_mask: Added to the scores, (texts or 1, heads or 1, tokens, tokens). None: no padding.
        scaling: Factor of the scores. [default: 1 / √width]
    Returns: Output (texts, tokens, heads, width), and None for the weights.
    """
    heads_per_group = query.shape[1] // key.shape[1]
    if heads_per_group > 1:
        key, value = (t.repeat_interleave(heads_per_group, dim=1) for t in (key, value))
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    output: Tensor = _Attention.apply(query, key, value, attention_mask, scaling)
    return output, None


def _attend_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Compute the same as ``_attend``. Not differentiable."""
    if query.shape[1] > key.shape[1]:
        key, value = (t.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for t in (key, value))
    return _forward(query, key, value, attention_mask, query.shape[-1] ** -0.5 if scaling is None else scaling), None


def attend_jointly(projections: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Attention over queries, keys and values that one product computed. Not differentiable.

    Args:
        projections: (texts, tokens, 3, heads, width).
        mask: Added to the scores, (texts or 1, heads or 1, tokens or 1, tokens). None: no padding.
        scaling: Factor of the scores.
    Returns: (texts, tokens, heads, width).
    """
    by_head = projections.permute(2, 0, 3, 1, 4)
    if not _fused_is_faster(by_head[0]):
        by_head = by_head.contiguous()  # one copy instead of three
    query, key, value = by_head
    return _forward(query, key, value, mask, scaling)


def _fused_is_faster(query: Tensor) -> bool:
    return query.dtype == torch.bfloat16 and query.shape[-2] >= _FUSED_FROM and torch.cpu._is_amx_tile_supported()


def _forward(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """(texts, heads, tokens, width) each -> (texts, tokens, heads, width)."""
    if _fused_is_faster(query):
        fused = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
        return fused.transpose(1, 2)
    texts, heads, tokens, width = query.shape
    shape = texts * heads, tokens, width
    query, key, value = query.reshape(shape), key.reshape(shape), value.reshape(shape)
    # Powers of two are faster than powers of e.
    powers = torch.baddbmm(query.new_empty(1, 1, 1), query, key.transpose(1, 2), beta=0, alpha=scaling * _LOG2_E)
    if mask is not None:
        powers.view(texts, heads, tokens, tokens).add_(mask * _LOG2_E)
    sums = powers.exp2_().sum(dim=-1, keepdim=True)
    low, high = torch.aminmax(sums)
    if not (low > _SMALLEST_SUM and high < _LARGEST_SUM):
        powers = torch.softmax(_scores(query * scaling, key, mask, heads=heads), dim=-1)
        sums = torch.ones_like(sums)
    output, sums = (t.view(texts, heads, tokens, -1).transpose(1, 2) for t in (torch.bmm(powers, value), sums))
    return torch.div(output, sums, out=query.new_empty(texts, tokens, heads, width))


class _Attention(torch.autograd.Function):
    """``softmax(Q K' + mask) V`` with the shapes of ``_attend``, computed in the inputs' dtype."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        texts, heads, tokens, width = query.shape
        query, key, value = (t.reshape(texts * heads, tokens, width) for t in (query * scaling, key, value))
        probabilities = _probabilities(query, key, mask, heads=heads)
        output = torch.bmm(probabilities, value).view(texts, heads, tokens, width).transpose(1, 2).contiguous()
        ctx.save_for_backward(query, key, value, probabilities, output)
        ctx.heads, ctx.scaling = heads, scaling
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, probabilities, output = ctx.saved_tensors
        _, tokens, width = query.shape
        # The gradient of softmax is p * (g - sum(p * g)). Summing over the output's width instead gives the same number
        # (Dao et al. 2022, arXiv:2205.14135).
        mean = (grads[0] * output).sum(dim=-1).transpose(1, 2).reshape(-1, tokens, 1)
        grad = grads[0].transpose(1, 2).reshape(-1, tokens, width)
        grad_value = torch.bmm(probabilities.transpose(1, 2), grad)
        grad_scores = torch.bmm(grad, value.transpose(1, 2)).sub_(_spread(mean)).mul_(probabilities)
        grad_query = torch.bmm(grad_scores, key).mul_(ctx.scaling)
        grad_key = torch.bmm(grad_scores.transpose(1, 2), query)
        return *(g.view(-1, ctx.heads, tokens, width) for g in (grad_query, grad_key, grad_value)), None, None


def _probabilities(query: Tensor, key: Tensor, mask: Tensor | None, *, heads: int) -> Tensor:
    """Attention weights (texts * heads, tokens, tokens). As in softmax, a fully masked row gets equal weights."""
    powers = _scores(query, key, mask, heads=heads).exp_()
    sums = powers.sum(dim=-1, keepdim=True)
    low, high = torch.aminmax(sums)
    if low > _SMALLEST_SUM and high < _LARGEST_SUM:
        return powers.div_(_spread(sums))
    # The scores are too large or too small for exponentials that are not shifted.
    return torch.softmax(_scores(query, key, mask, heads=heads), dim=-1)


def _spread(column: Tensor) -> Tensor:
    """(n, tokens, 1) -> (n, tokens, tokens), copied: PyTorch vectorises whole arrays, but not short broadcast rows."""
    return column.expand(-1, -1, column.shape[1]).contiguous()


def _scores(query: Tensor, key: Tensor, mask: Tensor | None, *, heads: int) -> Tensor:
    scores = torch.bmm(query, key.transpose(1, 2))
    if mask is not None:
        scores.view(-1, heads, *scores.shape[1:]).add_(mask)
    return scores
