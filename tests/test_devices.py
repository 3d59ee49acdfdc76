"""The same training on other ways to compute it: compiled, and on a GPU (run by hand: pytest -m gpu)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import CPU_FLOAT32, load_encoder, toy_texts

from pipeline.adapter.files import load_adapter, save_adapter
from pipeline.config import AdapterConfig, EncoderConfig, TrainConfig
from pipeline.encoder.encoder import Encoder
from pipeline.encoder.files import find_encoder
from pipeline.encoder.runtime import choose_runtime
from pipeline.objectives.batches import LabelledTokens
from pipeline.objectives.objective import Classification
from pipeline.records import EpochRow, Runtime
from pipeline.store.run_folder import TaskFolder
from pipeline.training.step_graphs import RECORDABLE, is_recordable
from pipeline.training.train import Training, train_adapter

LABELS = ("sea", "kitchen", "garden")


def train(
    encoder: Encoder,
    *,
    num_texts: int = 60,
    dropout: float = 0.0,
    compiled: bool = False,
    checkpoint: Path | None = None,
    on_epoch: Callable[[EpochRow], None] = lambda row: None,
) -> Training:
    texts, labels = toy_texts(num_texts)
    config = TrainConfig(learning_rate=3e-3, batch_size=4, head_init="random", compile=compiled)
    data = LabelledTokens(encoder.tokenise(texts), np.array(labels, dtype=np.int64))
    return train_adapter(
        Classification(data, None, label_names=LABELS, config=config),
        encoder,
        adapter_config=AdapterConfig(dropout=dropout),
        train_config=config,
        max_epochs=2,
        checkpoint=checkpoint,
        on_epoch=on_epoch,
    )


def load(folder: Path, runtime: Runtime) -> Encoder:
    config = EncoderConfig(name=str(folder), max_tokens=24)
    return Encoder(find_encoder(config, offline=True), config, runtime)


@pytest.mark.faults
def test_a_compiled_training_learns_what_a_plain_one_learns(encoder_folder: Callable[[str], Path]) -> None:
    runtime = CPU_FLOAT32.model_dump() | {"compiled": True, "kernels": "torch"}
    compiled = load(encoder_folder("bert"), Runtime.model_validate(runtime))
    plain = train(load_encoder(encoder_folder("bert")))
    losses = [row.train_loss for row in train(compiled, compiled=True).epochs]
    assert losses == pytest.approx([row.train_loss for row in plain.epochs], rel=1e-3)


on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.gpu
@on_a_gpu
def test_a_gpu_trains_saves_and_reloads_like_a_cpu(encoder_folder: Callable[[str], Path], tmp_path: Path) -> None:
    runtime = choose_runtime(TrainConfig(precision="float32"), threads=1, use_gpu=True)
    assert (runtime.device, runtime.attention) == ("cuda", "sdpa")
    encoder = load(encoder_folder("bert"), runtime)
    training = train(encoder)
    on_cpu = train(load_encoder(encoder_folder("bert")))
    assert [row.train_loss for row in training.epochs] == pytest.approx(
        [row.train_loss for row in on_cpu.epochs], rel=0.02
    )
    tokens = encoder.tokenise(["ship and anchor", "soup with pepper"])
    expected = training.adapter.logits_of_vectors(encoder.embed(tokens))
    save_adapter(training.adapter, TaskFolder(tmp_path / "Topics"), meta={})
    fresh = load(encoder_folder("bert"), runtime)
    found = load_adapter(TaskFolder(tmp_path / "Topics"), fresh).logits_of_vectors(fresh.embed(tokens))
    assert np.abs(found - expected).max() < 1e-4


def weights(training: Training) -> bytes:
    return b"".join(parameter.detach().cpu().numpy().tobytes() for parameter in training.adapter.parameters)


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("family", sorted(RECORDABLE))
def test_replayed_steps_learn_what_launched_ones_learn(
    family: str, encoder_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = choose_runtime(TrainConfig(precision="float32"), threads=1, use_gpu=True)
    assert is_recordable(load(encoder_folder(family), runtime))
    replayed = train(load(encoder_folder(family), runtime))
    monkeypatch.setattr("pipeline.training.loop.is_recordable", lambda encoder: False)
    launched = train(load(encoder_folder(family), runtime))
    assert [row.train_loss for row in replayed.epochs] == pytest.approx(
        [row.train_loss for row in launched.epochs], rel=1e-3
    )


@pytest.mark.gpu
@on_a_gpu
def test_a_training_on_a_gpu_that_was_interrupted_ends_with_the_same_bits(
    encoder_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """With dropout, whose random numbers a replayed step draws anew."""
    runtime = choose_runtime(TrainConfig(), threads=1, use_gpu=True)

    def interrupt(row: EpochRow) -> None:
        raise KeyboardInterrupt

    undisturbed = train(load(encoder_folder("bert"), runtime), dropout=0.1)
    with pytest.raises(KeyboardInterrupt):
        train(
            load(encoder_folder("bert"), runtime), dropout=0.1, checkpoint=tmp_path / "checkpoint", on_epoch=interrupt
        )
    resumed = train(load(encoder_folder("bert"), runtime), dropout=0.1, checkpoint=tmp_path / "checkpoint")
    assert weights(resumed) == weights(undisturbed)
    assert weights(resumed) != weights(train(load(encoder_folder("bert"), runtime), dropout=0.0))
