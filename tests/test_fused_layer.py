"""Layers of BERT's kind say the same when the bulk kernel has fused them, and other layers are left alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import CPU_FLOAT32, calibration, load_encoder, save_tiny_encoder
from bulk import save_bulk_adapter
from torch import nn

from pipeline.adapter.files import load_adapter
from pipeline.config import EncoderConfig
from pipeline.encoder.attention import for_inference
from pipeline.encoder.encoder import Encoder
from pipeline.encoder.files import find_encoder
from pipeline.encoder.frozen_linear import FrozenLinear
from pipeline.inference.classifier import load_classifier
from pipeline.inference.fused_layer import FusedLayer, FusedModel, fuse_layers
from pipeline.inference.reference import find_adapters

Folders = Callable[[str], Path]
ONE_LENGTH = ["a goal in the last minute", "wind and snow over hills"]
TEXTS = [*ONE_LENGTH, "rain", "the market fell, then rose", "wind and snow over the hills all day long " * 3]


def has_packed_weights(encoder: Encoder) -> bool:
    return any(isinstance(module, FrozenLinear) for module in encoder.model.modules())


def bulk_encoder(folder: Path) -> Encoder:
    """The encoder as the bulk kernel loads it, in float32, with LayerNorm weights that matter."""
    config = EncoderConfig(name=str(folder), max_tokens=24)
    encoder = Encoder(
        find_encoder(config, offline=True), config, CPU_FLOAT32.model_copy(update={"attention": "lorafleet"})
    )
    if not has_packed_weights(encoder):
        pytest.skip("weights are packed on x86 only")
    for number, module in enumerate(m for m in encoder.model.modules() if isinstance(m, nn.LayerNorm)):
        torch.nn.init.normal_(module.weight, mean=1.0, std=0.3, generator=torch.Generator().manual_seed(number))
    for_inference(encoder.model)
    return encoder


@pytest.mark.parametrize("family", ["bert", "roberta", "xlm-roberta", "electra"])
def test_a_fused_encoder_gives_the_same_vectors(family: str, encoder_folder: Folders) -> None:
    encoder = bulk_encoder(encoder_folder(family))
    before = [encoder.embed(encoder.tokenise(texts)) for texts in (TEXTS, ONE_LENGTH)]
    encoder.model = fuse_layers(encoder.model)
    assert [type(layer) for layer in encoder.model.encoder.layer] == [FusedLayer, FusedLayer]
    assert isinstance(encoder.model, FusedModel) == (
        family != "electra"
    )  # whose embeddings are brought to another width first
    for texts, vectors in zip((TEXTS, ONE_LENGTH), before, strict=True):
        np.testing.assert_allclose(encoder.embed(encoder.tokenise(texts)), vectors, atol=2e-5)


@pytest.mark.parametrize(
    ("family", "changes"),
    [("bert", {"hidden_act": "relu"}), ("bert", {"hidden_act": "gelu_new"}), ("mpnet", {}), ("modernbert", {})],
)
def test_an_encoder_of_another_kind_keeps_its_layers(family: str, changes: dict[str, str], tmp_path: Path) -> None:
    encoder = bulk_encoder(save_tiny_encoder(tmp_path / "encoder", family, **changes))
    before = encoder.embed(encoder.tokenise(TEXTS))
    encoder.model = fuse_layers(encoder.model)
    assert not any(isinstance(module, FusedLayer | FusedModel) for module in encoder.model.modules())
    np.testing.assert_allclose(encoder.embed(encoder.tokenise(TEXTS)), before, atol=2e-5)


def test_in_bfloat16_norms_have_float32_weights(encoder_folder: Folders) -> None:
    encoder = bulk_encoder(encoder_folder("bert"))
    encoder.model = fuse_layers(encoder.model.bfloat16())
    norms = [module for module in encoder.model.modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == 5
    assert {norm.weight.dtype for norm in norms} == {torch.float32}


def test_on_another_device_nothing_is_changed(encoder_folder: Folders) -> None:
    """Its kernels want a norm's weights in the dtype of its input, and the layers have no packed weights."""
    model = bulk_encoder(encoder_folder("bert")).model.bfloat16().to("meta")
    assert fuse_layers(model) is model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not any(isinstance(module, FusedLayer) for module in model.modules())


@pytest.mark.parametrize("family", ["bert", "xlm-roberta"])
def test_an_adapter_has_its_effect_wherever_it_is_attached(
    family: str, encoder_folder: Folders, tmp_path: Path
) -> None:
    """All projections; one of the three that are joined; two of them, of the last layer alone; none of them."""
    encoder = encoder_folder(family)
    targets: dict[str, Any] = {
        "A": "attention",
        "B": ("encoder.layer.0.attention.self.key",),
        "C": tuple(f"encoder.layer.1.attention.self.{name}" for name in ("query", "value")),
        "D": ("encoder.layer.1.intermediate.dense", "encoder.layer.0.output.dense"),
    }
    folders = [
        save_bulk_adapter(tmp_path / name, encoder, seed=ord(name), target=target) for name, target in targets.items()
    ]
    adapters = find_adapters([str(folder) for folder in folders], offline=True)
    classifier = load_classifier(
        adapters, encoder=str(encoder), threads=1, use_gpu=False, offline=True, top_k=3, precision="float32"
    )
    assert isinstance(classifier.encoder.model, FusedModel) == has_packed_weights(classifier.encoder)
    answers = classifier.classify(classifier.tokenise(TEXTS))
    plain = load_encoder(encoder)
    for adapter, found in zip(adapters, answers, strict=True):
        loaded = load_adapter(adapter.folder, plain)
        logits = (
            torch.from_numpy(loaded.logits_of_vectors(plain.embed(plain.tokenise(TEXTS)))) / calibration().temperature
        )
        loaded.detach()
        expected = torch.softmax(logits, dim=1).sort(dim=1, descending=True)
        np.testing.assert_array_equal(found.top_labels, expected.indices.numpy())
        np.testing.assert_allclose(found.top_scores, expected.values.numpy(), atol=2e-5)
