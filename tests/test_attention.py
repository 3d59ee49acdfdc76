"""Our attention gives what transformers' eager one gives, forward and backward, whatever the scores and the mask."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import CPU_FLOAT32
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline.config import EncoderConfig
from pipeline.encoder.attention import _attend, _attend_forward, attend_jointly, for_inference
from pipeline.encoder.encoder import Encoder
from pipeline.encoder.files import find_encoder

Folders = Callable[[str], Path]
TEXTS = [
    "a goal in the last minute of the match",
    "rain",
    "the market fell, then rose",
    "wind and snow over the hills all day long",
]


def plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    scores = query @ key.transpose(2, 3) * scaling
    if mask is not None:
        scores = scores + mask
    return (torch.softmax(scores, dim=-1) @ value).transpose(1, 2)


def ours(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    return _attend(None, query, key, value, mask, scaling=scaling)[0]


def forward(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    return _attend_forward(None, query, key, value, mask, scaling=scaling)[0]


def inputs(*, tokens: int, groups: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs as projections give them: views whose memory runs over tokens before heads."""
    torch.manual_seed(tokens)
    query, key, value = (torch.randn(3, tokens, heads, 8).transpose(1, 2) for heads in (4, groups, groups))
    return query, key, value


def padding(tokens: int) -> Tensor:
    """The second text has one token, the third half of them."""
    lengths = torch.tensor([tokens, 1, max(1, tokens // 2)])
    visible = (torch.arange(tokens) < lengths[:, None])[:, None, None, :].expand(-1, 1, tokens, -1)
    return torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)


def result_and_gradients(attend: Callable[..., Tensor], arguments: tuple[Tensor, ...], *rest: object) -> list[Tensor]:
    leaves = [a.detach().clone().requires_grad_() for a in arguments]
    output = attend(*leaves, *rest)
    return [
        output,
        *torch.autograd.grad((output.tanh() * torch.linspace(-1, 1, output.numel()).view_as(output)).sum(), leaves),
    ]


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("tokens", [1, 5, 16, 33])
def test_result_and_gradients_are_those_of_a_plain_formulation(tokens: int, masked: bool) -> None:
    mask = padding(tokens) if masked else None
    for found, expected in zip(
        *(result_and_gradients(attend, inputs(tokens=tokens), mask, 0.35) for attend in (ours, plain)), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("tokens", [1, 5, 16, 33, 65])
def test_without_a_backward_pass_the_result_is_the_same(tokens: int, masked: bool, dtype: torch.dtype) -> None:
    """The fused kernel gives it in bfloat16 too, if the processor has matrix tiles."""
    arguments, mask = [a.to(dtype) for a in inputs(tokens=tokens)], padding(tokens).to(dtype) if masked else None
    expected = plain(*(a.float() for a in arguments), None if mask is None else mask.float(), 0.35)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(
        forward(*arguments, mask, 0.35).float(),
        expected,
        rtol=1e-2 if dtype is torch.bfloat16 else 1e-4,
        atol=tolerance,
    )


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_projections_side_by_side_attend_as_apart(masked: bool, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with PyTorch's fused kernel, used if the processor has matrix tiles, which must accept the memory layout."""
    monkeypatch.setattr("pipeline.encoder.attention._fused_is_faster", lambda _: fused)
    dtype = torch.bfloat16 if fused else torch.float32
    together = torch.stack([t.transpose(1, 2) for t in inputs(tokens=33)], dim=2).to(dtype)
    mask = torch.where(padding(33)[:, :, :1] < 0, float("-inf"), 0.0) if masked else None
    expected = plain(*together.float().permute(2, 0, 3, 1, 4), mask, 0.35)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        found = attend_jointly(together, None if mask is None else mask.to(dtype), 0.35)
    assert found.is_contiguous()
    torch.testing.assert_close(found.float(), expected, rtol=1e-2 if fused else 1e-4, atol=3e-2 if fused else 1e-5)


@pytest.mark.parametrize("scaling", [60.0, -60.0])
def test_scores_too_large_for_powers_are_no_matter(scaling: float) -> None:
    arguments = inputs(tokens=7)
    shifted = (arguments[0] + 3, arguments[1] + 3, arguments[2])  # scores of one sign: all too large, or all too small
    for found, expected in zip(
        *(result_and_gradients(attend, shifted, None, scaling) for attend in (ours, plain)), strict=True
    ):
        assert found.isfinite().all()
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(forward(*shifted, None, scaling), plain(*shifted, None, scaling), rtol=1e-3, atol=1e-4)


def test_a_row_that_is_masked_whole_gives_no_nan() -> None:
    mask = padding(6)
    mask[1] = torch.finfo(torch.float32).min
    query, key, value = inputs(tokens=6)
    for attend in (ours, forward):
        torch.testing.assert_close(
            attend(query, key, value, mask, 0.3), plain(query, key, value, mask, 0.3), rtol=1e-4, atol=1e-5
        )


def test_keys_that_several_heads_share_are_shared() -> None:
    query, key, value = inputs(tokens=5, groups=2)
    full_key, full_value = (t.repeat_interleave(2, dim=1) for t in (key, value))
    for attend in (ours, forward):
        torch.testing.assert_close(
            attend(query, key, value, None, 0.3), plain(query, full_key, full_value, None, 0.3), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("family", ["bert", "eurobert", "modernbert", "distilbert", "mpnet"])
def test_an_encoder_gives_the_same_vectors_as_with_eager_attention(family: str, encoder_folder: Folders) -> None:
    config = EncoderConfig(name=str(encoder_folder(family)), max_tokens=24)
    files = find_encoder(config, offline=True)
    eager = Encoder(files, config, CPU_FLOAT32)
    own = Encoder(files, config, CPU_FLOAT32.model_copy(update={"attention": "lorafleet"}))
    assert own.runtime.attention == ("eager" if family == "mpnet" else "lorafleet")  # what was used is what is recorded
    tokens = eager.tokenise(TEXTS)
    np.testing.assert_allclose(own.embed(tokens), eager.embed(tokens), atol=1e-5)
    for_inference(own.model)
    assert own.model.config._attn_implementation == ("eager" if family == "mpnet" else "lorafleet-inference")
    np.testing.assert_allclose(own.embed(tokens), eager.embed(tokens), atol=1e-5)
