"""All trained weights as one vector, and a working copy of LoRA weights in the encoder's dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pipeline.adapter.lora import Factors
from pipeline.adapter.sided import Trainable


class WorkingCopy:
    """Copy of the LoRA weights in the encoder's dtype, with B scaled.

    One operation per step updates the copy, and another returns its gradients."""

    def __init__(self, adapter: Trainable, weights: nn.Parameter) -> None:
        """Make the copy. ``weights`` begins with A and B of every pair, in the layout of ``flatten``."""
        self.loras = list(adapter.projections.values())
        length = sum(p.numel() for p in adapter.encoder_parameters)
        scales = [
            torch.tensor([1.0, lora.scaling]).repeat_interleave(
                torch.tensor([lora.lora_A.numel(), lora.lora_B.numel()])
            )
            for lora in self.loras
        ]
        self.scales = torch.cat(scales).to(weights.device)
        assert weights.grad is not None
        self.weights, self.weights_grad = weights.detach()[:length], weights.grad[:length]
        dtype = self.loras[0].base.weight.dtype
        self.copy = torch.zeros(length, dtype=dtype, device=weights.device)
        # In float32, so that a step that adds the gradients of several slices of its batch rounds each of them once.
        self.grad = torch.zeros(length, device=weights.device)
        values, grads = (_cut(vector, like=adapter.encoder_parameters) for vector in (self.copy, self.grad))
        self.factors = [
            Factors(values[i].requires_grad_(), values[i + 1].requires_grad_(), (grads[i], grads[i + 1]))
            for i in range(0, len(values), 2)
        ]

    def attach(self) -> None:
        """Let the LoRA layers compute with the copy."""
        for lora, factors in zip(self.loras, self.factors, strict=True):
            lora.working_copy = factors

    def detach(self) -> None:
        """Let the LoRA layers compute with their own parameters again."""
        for lora in self.loras:
            lora.working_copy = None

    def refresh(self) -> None:
        """Copy the updated weights, and set the gradients to zero."""
        with torch.no_grad():
            torch.mul(self.weights, self.scales, out=self.copy)
        self.grad.zero_()

    def collect_gradients(self) -> None:
        """Write the copy's gradients to the weights."""
        torch.mul(self.grad, self.scales, out=self.weights_grad)


def _cut(vector: Tensor, *, like: Sequence[Tensor]) -> list[Tensor]:
    parts = vector.split([tensor.numel() for tensor in like])
    return [part.view_as(tensor) for part, tensor in zip(parts, like, strict=True)]


def flatten(parameters: Sequence[nn.Parameter]) -> nn.Parameter:
    """Move parameters into one vector that shares their memory, gradients included.

    One optimiser step, one norm and one copy then replace about fifty of each.
    """
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in parameters]))
    flat.grad = torch.zeros_like(flat)
    start = 0
    for parameter in parameters:
        end = start + parameter.numel()
        parameter.data = flat.data[start:end].view_as(parameter)
        parameter.grad = flat.grad[start:end].view_as(parameter)
        start = end
    return flat
