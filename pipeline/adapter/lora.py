"""A frozen linear layer with a low-rank update. Layers that read the same input compute in one product."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.encoder.frozen_linear import FrozenLinear, joined

# Names of projections that read the same input as their siblings under the same parent.
_SAME_INPUT = re.compile(r"query|key|value|[qkv]|[qkv]_proj|[qkv]_lin")


class LoraLinear(nn.Module):
    """A frozen linear layer with a low-rank update: ``y = W x + b + scaling * B A x``.

    ``lora_A`` is (rank, in) and ``lora_B`` (out, rank), float32 as in PEFT. They are multiplied in the base's dtype.
    Source: Hu et al. 2021, arXiv:2106.09685.
    """

    def __init__(self, base: nn.Linear, *, rank: int, scaling: float, generator: torch.Generator) -> None:
        super().__init__()
        self.base = base
        self.scaling = scaling
        device = base.weight.device
        # He initialisation: normal with standard deviation √(2 / in).
        initial = torch.randn(rank, base.in_features, generator=generator) * math.sqrt(2 / base.in_features)
        self.lora_A = nn.Parameter(initial.to(device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        self.working_copy: Factors | None = None
        """Factors in the base's dtype, kept by the training loop during an epoch."""
        self.siblings = Siblings([self])

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) -> (…, out), in the base's dtype."""
        return self.siblings.output(self, x)

    def factors(self, dtype: torch.dtype) -> Factors:
        """The pair in the given number format. During an epoch, the training loop's working copy."""
        return self.working_copy or Factors(self.lora_A.to(dtype), (self.lora_B * self.scaling).to(dtype))

    @property
    def update(self) -> Tensor:
        """The matrix that merging adds to the weight, float32 (out, in)."""
        return self.scaling * (self.lora_B @ self.lora_A)


@dataclass(frozen=True)
class Factors:
    """A LoRA pair in its base's dtype."""

    down: Tensor
    """``lora_A``, (rank, in)."""
    up: Tensor
    """``scaling * lora_B``, (out, rank)."""
    gradients: tuple[Tensor, Tensor] | None = None
    """Tensors that the gradients of ``down`` and ``up`` are added to. None: autograd collects them."""


class Siblings:
    """LoRA layers that read the same input, such as query, key and value.

    The first one that is called computes the outputs of all in one product."""

    def __init__(self, members: Sequence[LoraLinear]) -> None:
        self.members = tuple(members)
        self._base = members[0].base if len(members) == 1 else None
        self._input: Tensor | None = None
        self._outputs: dict[LoraLinear, Tensor] = {}

    def output(self, member: LoraLinear, x: Tensor) -> Tensor:
        """(…, in) -> (…, out) of one member. The others' outputs wait until called with the same tensor."""
        if self._input is not x or member not in self._outputs:
            self._base = self._base or joined([m.base for m in self.members])
            factors = [m.factors(x.dtype) for m in self.members]
            tensors = [*(f.down for f in factors), *(f.up for f in factors)]
            outputs = _FrozenLinearPlusLowRank.apply(
                x, self._base, self._base.weight, [f.gradients for f in factors], *tensors
            )
            self._input = x
            self._outputs = dict(zip(self.members, outputs, strict=True))
        output = self._outputs.pop(member)
        if not self._outputs:
            self._input = None
        return output


def share_inputs(projections: Mapping[str, LoraLinear]) -> None:
    """Let layers under one parent that read the same input compute together. Keys are module paths."""
    by_parent: dict[str, list[LoraLinear]] = {}
    for path, lora in projections.items():
        parent, _, leaf = path.rpartition(".")
        if _SAME_INPUT.fullmatch(leaf):
            by_parent.setdefault(parent, []).append(lora)
    for members in by_parent.values():
        siblings = Siblings(members)
        for member in members:
            member.siblings = siblings


class _FrozenLinearPlusLowRank(torch.autograd.Function):
    """``y = x W' + bias``, split into one part per update, and ``(x A') B'`` added to each part.

    ``W`` and the bias get no gradient. Each ``A`` is (rank, in) and each ``B`` (width of its part, rank). All ``A``
    come first. The backward pass is written out because autograd would allocate and add the updates as separate
    tensors, twice. Speed: tests/benchmarks/EXPERIMENTS.md, "Training speed: what was tried".
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        base: nn.Linear,
        weight: Tensor,
        gradients: Sequence[tuple[Tensor, Tensor] | None],
        *factors: Tensor,
    ) -> tuple[Tensor, ...]:
        downs, ups = factors[: len(gradients)], factors[len(gradients) :]
        a = downs[0] if len(downs) == 1 else torch.cat(downs)
        rows = x.reshape(-1, x.shape[-1])  # reshaped here, so that autograd records no node for it
        low = rows @ a.t()
        y = base.product(rows) if isinstance(base, FrozenLinear) else nn.functional.linear(rows, weight, base.bias)
        parts = y.split([b.shape[0] for b in ups], dim=1)
        for part, part_low, b in zip(parts, low.chunk(len(ups), dim=1), ups, strict=True):
            part.addmm_(part_low, b.t())
        ctx.base, ctx.shape, ctx.gradients = base, x.shape, gradients
        ctx.save_for_backward(rows, weight, a, low, *ups)
        return tuple(part.unflatten(0, x.shape[:-1]) for part in parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, a, low, *ups = ctx.saved_tensors
        flat = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        grad_low = _side_by_side([grad @ b for grad, b in zip(flat, ups, strict=True)])
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad = _side_by_side(flat)
            product = ctx.base.input_gradient(grad) if isinstance(ctx.base, FrozenLinear) else grad @ weight
            grad_x = product.addmm_(grad_low, a).view(ctx.shape)
        grad_downs = (grad_low.t() @ rows).chunk(len(ups))
        grad_ups = [(part_low.t() @ grad).t() for part_low, grad in zip(low.chunk(len(ups), dim=1), flat, strict=True)]
        if all(ctx.gradients):
            for (to_down, to_up), down, up in zip(ctx.gradients, grad_downs, grad_ups, strict=True):
                to_down.add_(down)
                to_up.add_(up)
            return grad_x, None, None, None, *(None for _ in (*grad_downs, *grad_ups))
        return grad_x, None, None, None, *grad_downs, *grad_ups


def _side_by_side(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)
