"""A frozen linear layer whose weight is packed for the processor once, instead of at every call."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.records import Runtime

# Number of rows that oneDNN packs a weight for. Constant, because the layout may change the last bits.
_ROWS = 512


def keep_primitives(count: int, *, per_thread: int) -> None:
    """Set how many primitives oneDNN keeps, in total and per thread. Must be called before oneDNN is first used.

    Each number of tokens in a batch needs its own primitives, of about 0.3 MB each:
    tests/benchmarks/EXPERIMENTS.md, "Bulk classification".
    """
    os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = str(count)
    os.environ["LRU_CACHE_CAPACITY"] = str(per_thread)


keep_primitives(8192, per_thread=1024)  # an epoch of training reuses about 1,100


class FrozenLinear(nn.Linear):
    """``y = x W' + b`` with ``W`` in oneDNN's packed layout. A weight changed in place is packed again.

    In bfloat16 with avx512-bf16 the result equals that of ``nn.Linear`` bit for bit.
    Speed: tests/benchmarks/EXPERIMENTS.md, "Training speed: what was tried".
    """

    def __init__(self, linear: nn.Linear, *, gelu: bool = False) -> None:
        """Take over the weight and the bias of ``linear``, which must not require a gradient.

        Args:
            linear: Layer to replace.
            gelu: Apply GELU to the product while it is in the cache. For inference only.
        """
        assert not linear.weight.requires_grad
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.gelu = gelu
        self.weight, self.bias = linear.weight, linear.bias
        self._packed: dict[bool, tuple[int, Tensor]] = {}

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) -> (…, out), differentiable in ``x``."""
        y: Tensor = _Product.apply(x, self) if torch.is_grad_enabled() and x.requires_grad else self.product(x)
        return y

    def product(self, x: Tensor, *, plus: Tensor | None = None) -> Tensor:
        """``x W' + b + plus``, contiguous (…, in) -> (…, out), not differentiable. ``plus`` is (…, out)."""
        if plus is not None:
            assert not self.gelu
            total: Tensor = torch.ops.mkldnn._linear_pointwise.binary(
                x, plus, self._pack(transposed=False), self.bias, "add"
            )
            return total
        # The second "none" asks for the exact GELU, not an approximation.
        activation: tuple[str, list[float], str] = ("gelu", [], "none") if self.gelu else ("none", [], "")
        y: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, self._pack(transposed=False), self.bias, *activation)
        return y

    def input_gradient(self, grad: Tensor) -> Tensor:
        """Gradient of the input from that of the output: ``grad W``, (…, out) -> (…, in)."""
        assert not self.gelu
        y: Tensor = torch.ops.mkldnn._linear_pointwise(
            grad.contiguous(), self._pack(transposed=True), None, "none", [], ""
        )
        return y

    def _pack(self, *, transposed: bool) -> Tensor:
        version, packed = self._packed.get(transposed, (-1, self.weight))
        if version != self.weight._version:
            version, weight = self.weight._version, self.weight.detach()
            packed = torch.ops.mkldnn._reorder_linear_weight(weight.t().contiguous() if transposed else weight, _ROWS)
            self._packed[transposed] = version, packed
        return packed


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: FrozenLinear) -> Tensor:
        ctx.linear = linear
        return linear.product(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.linear.input_gradient(grads[0]), None


def joined(linears: Sequence[nn.Linear]) -> nn.Linear:
    """One frozen layer whose output is the concatenation of the outputs of all."""
    with torch.inference_mode(mode=False):  # an inference may come first, and a training step later
        weight = torch.cat([linear.weight.detach() for linear in linears])
        together = nn.Linear(weight.shape[1], weight.shape[0], bias=linears[0].bias is not None, device="meta")
        together.weight = nn.Parameter(weight, requires_grad=False)
        if linears[0].bias is not None:
            together.bias = nn.Parameter(torch.cat([linear.bias.detach() for linear in linears]), requires_grad=False)
        return FrozenLinear(together) if isinstance(linears[0], FrozenLinear) else together


def pack_linears(model: nn.Module, runtime: Runtime) -> None:
    """Replace the frozen model's linear layers in place if that is faster, which it is on x86 processors.

    With PyTorch's kernels the model keeps its own layers, because a compiler cannot trace packed weights.
    """
    if runtime.device != "cpu" or runtime.kernels == "torch" or platform.machine() not in ("x86_64", "AMD64"):
        return
    if not torch.backends.mkldnn.is_available():
        return
    if runtime.dtype == "bfloat16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                setattr(module, name, FrozenLinear(child))
