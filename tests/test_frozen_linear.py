"""Frozen linear layers on packed weights: the same numbers as plain ones, also after the weight has changed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pipeline.config import TrainConfig
from pipeline.encoder.frozen_linear import FrozenLinear, pack_linears
from pipeline.encoder.runtime import choose_runtime

BF16 = choose_runtime(TrainConfig(precision="bfloat16"), threads=1, use_gpu=False)


def plain(inputs: int, outputs: int, *, bias: bool = True, dtype: torch.dtype = torch.bfloat16) -> nn.Linear:
    torch.manual_seed(inputs + outputs)
    return nn.Linear(inputs, outputs, bias=bias).to(dtype).requires_grad_(False)


def packed(linear: nn.Linear) -> nn.Linear:
    """The layer as the encoder packs it on this machine. Skips if it is left alone."""
    model = nn.Sequential(linear)
    pack_linears(model, BF16.model_copy(update={"dtype": str(linear.weight.dtype).removeprefix("torch.")}))
    if not isinstance(model[0], FrozenLinear):
        pytest.skip("this processor has no use for packed weights")
    return model[0]


def result_and_gradient(linear: nn.Linear, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = linear(x)
    y.backward(torch.linspace(-1, 1, y.numel()).reshape(y.shape).to(y.dtype))
    assert x.grad is not None
    return y.detach(), x.grad


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Up to the order of summation, which oneDNN may choose by layout."""
    tolerance = 0.02 if expected.dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 48), (7, 48), (4, 9, 48), (3, 700, 48)])
def test_packed_weights_give_what_plain_ones_give_forward_and_backward(
    shape: tuple[int, ...], bias: bool, dtype: torch.dtype
) -> None:
    linear, x = plain(48, 80, bias=bias, dtype=dtype), torch.randn(shape, dtype=dtype)
    for found, expected in zip(result_and_gradient(packed(linear), x), result_and_gradient(linear, x), strict=True):
        assert_same(found, expected)
    with torch.inference_mode():
        assert_same(packed(linear)(x), linear(x))


def test_a_weight_that_is_changed_in_place_is_packed_again() -> None:
    linear, x = plain(48, 80), torch.randn(5, 48, dtype=torch.bfloat16)
    layer = packed(linear)
    before = result_and_gradient(layer, x)
    with torch.no_grad():
        linear.weight.mul_(-2)
    assert layer.weight is linear.weight
    for found, expected, old in zip(result_and_gradient(layer, x), result_and_gradient(linear, x), before, strict=True):
        assert_same(found, expected)
        assert not torch.allclose(found, old)


def test_a_gradient_that_is_a_view_with_gaps_is_used_as_its_values_say() -> None:
    linear, x = plain(48, 80), torch.randn(6, 48, dtype=torch.bfloat16)
    gradients = []
    for layer in (packed(linear), linear):
        leaf = x.clone().requires_grad_()
        layer(leaf).t().contiguous().mul(torch.arange(6.0, dtype=torch.bfloat16)).sum().backward()
        gradients.append(leaf.grad)
    assert gradients[0] is not None
    assert gradients[1] is not None
    assert_same(gradients[0], gradients[1])


def test_gelu_can_be_part_of_the_product() -> None:
    linear, x = plain(48, 80), torch.randn(9, 48, dtype=torch.bfloat16)
    layer = packed(linear)
    with torch.inference_mode():
        assert_same(FrozenLinear(layer, gelu=True)(x), nn.functional.gelu(linear(x)))


@pytest.mark.parametrize(("field", "value"), [("device", "cuda"), ("kernels", "torch")])
def test_only_an_eager_encoder_on_a_cpu_is_packed(field: str, value: object) -> None:
    model = nn.Sequential(plain(8, 8))
    pack_linears(model, BF16.model_copy(update={field: value}))
    assert type(model[0]) is nn.Linear
