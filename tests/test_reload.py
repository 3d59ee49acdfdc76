"""The reload gate lets through what was trained, and nothing else."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import CPU_FLOAT32, give_effect, toy_texts

from pipeline.adapter.adapter import Adapter
from pipeline.adapter.files import save_adapter
from pipeline.config import AdapterConfig, EncoderConfig
from pipeline.encoder.encoder import Encoder
from pipeline.encoder.files import find_encoder
from pipeline.errors import VerificationError
from pipeline.inference.reload import ReloadResult, check_reload
from pipeline.store.run_folder import TaskFolder

LABELS = ("sea", "kitchen", "garden")
TEXTS, _ = toy_texts(12)


@pytest.fixture
def folder(tmp_path: Path) -> TaskFolder:
    return TaskFolder(tmp_path / "Topics")


@pytest.fixture
def adapter(bert: Encoder, folder: TaskFolder) -> Adapter:
    """A saved adapter with an effect."""
    adapter = give_effect(Adapter(bert, AdapterConfig(), LABELS))
    save_adapter(adapter, folder, meta={})
    return adapter


def check(adapter: Adapter, folder: TaskFolder, *, is_trained: bool = True) -> None:
    check_reload(adapter, folder, TEXTS, is_trained=is_trained, offline=True)


def test_a_saved_adapter_passes_in_a_fresh_process(adapter: Adapter, folder: TaskFolder) -> None:
    check(adapter, folder)


def test_one_changed_weight_is_noticed(adapter: Adapter, folder: TaskFolder) -> None:
    with torch.no_grad():
        adapter.encoder_parameters[1][0, 0] += 1  # what is on disk is no longer what was trained
    with pytest.raises(VerificationError, match="Topics: logits differ by"):
        check(adapter, folder)


@pytest.mark.faults
def test_swapped_labels_are_noticed(adapter: Adapter, folder: TaskFolder) -> None:
    folder.labels.write_text(json.dumps([LABELS[1], LABELS[0], LABELS[2]]), encoding="utf-8")
    with pytest.raises(VerificationError, match="label names"):
        check(adapter, folder)


@pytest.mark.faults
def test_an_adapter_without_effect_passes_only_where_it_is_the_start_of_training(
    bert: Encoder, folder: TaskFolder
) -> None:
    adapter = give_effect(Adapter(bert, AdapterConfig(), LABELS))
    with torch.no_grad():
        for lora in adapter.projections.values():
            lora.lora_B.zero_()
    save_adapter(adapter, folder, meta={})
    with pytest.raises(VerificationError, match="no effect"):
        check(adapter, folder)
    check(adapter, folder, is_trained=False)


@pytest.mark.parametrize(
    ("effect", "is_trained", "passes"), [(1.0, True, True), (1.0, False, True), (0.0, False, True), (0.0, True, False)]
)
def test_which_effects_pass(effect: float, is_trained: bool, passes: bool) -> None:
    logits = np.zeros((1, 2), dtype=np.float32)

    def check_effect(value: float) -> None:
        ReloadResult(logits, value, ("a", "b")).check(
            "A", outputs=logits, label_names=("a", "b"), tolerance=0, is_trained=is_trained
        )

    with contextlib.nullcontext() if passes else pytest.raises(VerificationError, match="no effect"):
        check_effect(effect)
    with pytest.raises(VerificationError, match="no effect"):
        check_effect(float("nan"))


@pytest.mark.faults
def test_a_file_that_cannot_be_loaded_is_named_in_one_line(adapter: Adapter, folder: TaskFolder) -> None:
    folder.adapter_weights.write_bytes(b"")
    with pytest.raises(
        VerificationError, match=r"Topics: the saved adapter cannot be loaded in a fresh process: .*damaged"
    ) as caught:
        check(adapter, folder)
    assert "\n" not in str(caught.value)


@pytest.mark.faults
def test_a_hub_encoder_is_reloaded_at_the_commit_it_was_trained_on(folder: TaskFolder, hub_cache: Path) -> None:
    config = EncoderConfig(name="someone/tiny", max_tokens=24)
    adapter = give_effect(
        Adapter(Encoder(find_encoder(config, offline=True), config, CPU_FLOAT32), AdapterConfig(), LABELS)
    )
    save_adapter(adapter, folder, meta={})
    (hub_cache / "models--someone--tiny" / "refs" / "main").write_text(
        "f" * 40, encoding="utf-8"
    )  # the Hub has moved on
    check(adapter, folder)


@pytest.mark.faults
def test_a_pt_file_that_is_not_the_trained_adapter_is_noticed(adapter: Adapter, folder: TaskFolder) -> None:
    state = torch.load(folder.lora_adapter_pt, weights_only=True)
    state["lora_0_B"][0, 0] += 1
    torch.save(state, folder.lora_adapter_pt)
    with pytest.raises(VerificationError, match=r"lora_adapter\.pt"):
        check(adapter, folder)


def test_a_damaged_head_file_is_noticed(adapter: Adapter, folder: TaskFolder) -> None:
    folder.classifier_head_pt.write_bytes(folder.classifier_head_pt.read_bytes()[:100])
    with pytest.raises(VerificationError, match=r"classifier_head\.pt"):
        check(adapter, folder)
