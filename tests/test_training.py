"""The training loop: it learns, it can be repeated bit for bit, it survives kills, and it keeps the best epoch."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import CPU_FLOAT32, GOLDEN, load_encoder, save_tiny_encoder, toy_texts
from safetensors.torch import load, load_file

from pipeline.adapter.adapter import Adapter
from pipeline.adapter.files import save_adapter, start_from
from pipeline.adapter.head import HeadStart
from pipeline.config import AdapterConfig, EncoderConfig, TrainConfig
from pipeline.encoder.encoder import Encoder
from pipeline.encoder.files import find_encoder
from pipeline.encoder.tokeniser import IntArray
from pipeline.errors import AdapterError, LorafleetError, ResumeError
from pipeline.objectives.batches import LabelledTokens, epoch_batches
from pipeline.objectives.objective import Classification, accuracy, class_weights, cross_entropy
from pipeline.records import EpochRow, Progress
from pipeline.store.run_folder import TaskFolder
from pipeline.training.checkpoint import Checkpoint, LoopState, tensor_file
from pipeline.training.train import Training, train_adapter

Folders = Callable[[str], Path]
LABELS = ("sea", "kitchen", "garden")
NUM_TRAIN = 120
SETTINGS: dict[str, Any] = {"learning_rate": 3e-3, "batch_size": 4, "head_init": "random"}
GOLDEN_COMMAND = "REGENERATE_GOLDEN=1 pytest tests/test_training.py -k golden"


def tokens(encoder: Encoder, num_texts: int, *, seed: int = 0) -> LabelledTokens:
    texts, labels = toy_texts(num_texts, seed=seed)
    return LabelledTokens(encoder.tokenise(texts), np.array(labels, dtype=np.int64))


def ignore(_: EpochRow | Progress) -> None:
    """Listen to nothing."""


def train(
    encoder: Encoder,
    *,
    data: LabelledTokens | None = None,
    selection: LabelledTokens | str | None = "held out",
    max_epochs: int = 3,
    label_names: tuple[str, ...] = LABELS,
    adapter_config: AdapterConfig | None = None,
    head_start: HeadStart | None = None,
    warm_start: TaskFolder | None = None,
    checkpoint: Path | None = None,
    on_epoch: Callable[[EpochRow], None] = ignore,
    on_progress: Callable[[Progress], None] = ignore,
    **settings: Any,
) -> Training:
    """Train on the toy texts: 30 steps an epoch, a few milliseconds each."""
    config = TrainConfig(**SETTINGS | settings)
    objective = Classification(
        data or tokens(encoder, NUM_TRAIN),
        tokens(encoder, 60, seed=1) if isinstance(selection, str) else selection,
        label_names=label_names,
        config=config,
        head_start=head_start,
    )
    return train_adapter(
        objective,
        encoder,
        adapter_config=adapter_config or AdapterConfig(),
        train_config=config,
        max_epochs=max_epochs,
        warm_start=warm_start,
        checkpoint=checkpoint,
        on_epoch=on_epoch,
        on_progress=on_progress,
    )


def bits(training: Training) -> bytes:
    return b"".join(p.detach().numpy().tobytes() for p in training.adapter.parameters)


def facts(training: Training) -> list[tuple[int, float, float | None, float, bool]]:
    """The epochs without what a clock measured."""
    return [(e.epoch, e.train_loss, e.validation_accuracy, e.learning_rate, e.is_best) for e in training.epochs]


def train_until_killed(folder: str, checkpoint: str) -> None:
    """For a process of its own: it is killed in the middle of its second epoch."""

    def kill(progress: Progress) -> None:
        if progress.epoch == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    train(load_encoder(folder), checkpoint=Path(checkpoint), on_progress=kill)


class Stop(Exception):
    """Raised by a test to stop a training."""


def stop_after(epoch: int) -> Callable[[EpochRow], None]:
    def stop(row: EpochRow) -> None:
        if row.epoch == epoch:
            raise Stop

    return stop


@pytest.fixture(scope="module")
def undisturbed(encoder_folder: Folders) -> Training:
    """Three epochs without interruption."""
    return train(load_encoder(encoder_folder("bert")))


@pytest.fixture(scope="module")
def first_epoch(encoder_folder: Folders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a training that was stopped after its first epoch."""
    path = tmp_path_factory.mktemp("checkpoints") / "training.safetensors"
    with pytest.raises(Stop):
        train(load_encoder(encoder_folder("bert")), checkpoint=path, on_epoch=stop_after(1))
    return path


@pytest.fixture
def checkpoint(first_epoch: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copy(first_epoch, tmp_path / "training.safetensors"))


# It learns


@pytest.mark.parametrize("family", ["bert", "eurobert", "mpnet", "distilbert", "modernbert"])
def test_a_toy_set_is_learnt(family: str, encoder_folder: Folders) -> None:
    training = train(load_encoder(encoder_folder(family)), max_epochs=6)
    losses = [e.train_loss for e in training.epochs]
    assert losses[-1] < 0.5 * losses[0]
    assert max(e.validation_accuracy or 0 for e in training.epochs) > 0.6, "majority is 1/3"
    assert all(lora.lora_B.any() for lora in training.adapter.projections.values())


def test_an_epochs_row_says_what_happened(undisturbed: Training) -> None:
    assert [e.epoch for e in undisturbed.epochs] == [1, 2, 3]
    for row in undisturbed.epochs:
        assert row.learning_rate == pytest.approx(3e-3 * (1 + math.cos(math.pi * (30 * row.epoch - 1) / 90)) / 2)
        assert row.texts_per_second * row.seconds == pytest.approx(NUM_TRAIN)
        assert row.tokens_per_second > row.texts_per_second
        assert row.peak_memory_bytes > 50_000_000
    assert [e.is_best for e in undisturbed.epochs].count(True) == 1
    assert undisturbed.epochs[undisturbed.best_epoch - 1].is_best


def test_progress_is_reported_within_an_epoch(bert: Encoder) -> None:
    heard: list[Progress] = []
    train(bert, max_epochs=2, on_progress=heard.append)
    assert {p.epoch for p in heard} == {1, 2}
    assert {(p.max_epochs, p.num_steps) for p in heard} == {(2, 30)}
    assert all(0 < p.step <= 30 and p.train_loss > 0 and p.texts_per_second > 0 for p in heard)


def test_the_losses_are_the_golden_ones(undisturbed: Training) -> None:
    path = GOLDEN / "tiny_training.json"
    found = {
        "command": GOLDEN_COMMAND,
        "tolerance": 2e-3,
        "train_loss": [round(e.train_loss, 6) for e in undisturbed.epochs],
        "validation_accuracy": [round(e.validation_accuracy or 0, 6) for e in undisturbed.epochs],
    }
    if os.environ.get("REGENERATE_GOLDEN"):
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    golden = json.loads(path.read_text(encoding="utf-8"))
    remedy = f"look at the difference, then {golden['command']}"
    assert found["train_loss"] == pytest.approx(golden["train_loss"], abs=golden["tolerance"]), remedy
    assert found["validation_accuracy"] == pytest.approx(golden["validation_accuracy"], abs=1.5 / 60), (
        remedy
    )  # one text of sixty


# The same again


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(
    undisturbed: Training, encoder_folder: Folders
) -> None:
    again = train(load_encoder(encoder_folder("bert")))
    assert bits(again) == bits(undisturbed)
    assert facts(again) == facts(undisturbed)
    assert bits(train(load_encoder(encoder_folder("bert")), seed=1)) != bits(undisturbed)


def test_a_checkpoint_changes_nothing(undisturbed: Training, encoder_folder: Folders, tmp_path: Path) -> None:
    assert bits(train(load_encoder(encoder_folder("bert")), checkpoint=tmp_path / "made" / "c.safetensors")) == bits(
        undisturbed
    )


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_a_stopped_training_resumes_to_the_same_bits(
    epoch: int, undisturbed: Training, encoder_folder: Folders, tmp_path: Path
) -> None:
    path = tmp_path / "training.safetensors"
    with pytest.raises(Stop):
        train(load_encoder(encoder_folder("bert")), checkpoint=path, on_epoch=stop_after(epoch))
    rows: list[EpochRow] = []
    resumed = train(load_encoder(encoder_folder("bert")), checkpoint=path, on_epoch=rows.append)
    assert [row.epoch for row in rows] == list(range(epoch + 1, 4)), "what was finished is not done again"
    assert bits(resumed) == bits(undisturbed)
    assert facts(resumed) == facts(undisturbed)
    assert (resumed.best_epoch, resumed.selected_on) == (undisturbed.best_epoch, undisturbed.selected_on)


def test_a_training_killed_in_the_middle_of_an_epoch_resumes_to_the_same_bits(
    undisturbed: Training, encoder_folder: Folders, tmp_path: Path
) -> None:
    path = tmp_path / "training.safetensors"
    program = f"import test_training; test_training.train_until_killed({str(encoder_folder('bert'))!r}, {str(path)!r})"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    killed = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    rows: list[EpochRow] = []
    resumed = train(load_encoder(encoder_folder("bert")), checkpoint=path, on_epoch=rows.append)
    assert [row.epoch for row in rows] == [2, 3]
    assert bits(resumed) == bits(undisturbed)
    assert facts(resumed) == facts(undisturbed)


@pytest.mark.parametrize("keep", [0, 7, 1000, -10])
def test_a_checkpoint_that_was_cut_short_starts_over_and_ends_the_same(
    keep: int, checkpoint: Path, undisturbed: Training, encoder_folder: Folders
) -> None:
    checkpoint.write_bytes(checkpoint.read_bytes()[:keep])
    rows: list[EpochRow] = []
    assert bits(train(load_encoder(encoder_folder("bert")), checkpoint=checkpoint, on_epoch=rows.append)) == bits(
        undisturbed
    )
    assert len(rows) == 3


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"seed": 1}, "train.seed: then 0, now 1"),
        ({"learning_rate": 1e-3}, "train.learning_rate: then 0.003, now 0.001"),
        ({"class_weights": "balanced"}, "train.class_weights"),
        ({"max_epochs": 4}, "max_epochs: then 3, now 4"),
        ({"adapter_config": AdapterConfig(alpha=8)}, "adapter.alpha: then 16.0, now 8.0"),
        ({"adapter_config": AdapterConfig(layers="last:1")}, "adapter.layers: then all, now last:1"),
        ({"label_names": ("sea", "garden", "kitchen")}, "label names"),
        ({"selection": None}, "selection texts"),
        ({"head_start": HeadStart(np.zeros((3, 32), np.float32), np.zeros(3, np.float32))}, "head start"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused_by_name(
    changed: dict[str, Any], named: str, checkpoint: Path, bert: Encoder
) -> None:
    with pytest.raises(ResumeError) as caught:
        train(bert, checkpoint=checkpoint, **changed)
    assert str(checkpoint) in str(caught.value)
    assert f"({named}" in str(caught.value), "and nothing but this"


def test_a_checkpoint_of_other_texts_or_labels_is_refused(checkpoint: Path, encoder_folder: Folders) -> None:
    encoder = load_encoder(encoder_folder("bert"))
    own = tokens(encoder, NUM_TRAIN)
    for data in (tokens(encoder, NUM_TRAIN, seed=5), LabelledTokens(own.tokens, own.labels[::-1].copy())):
        with pytest.raises(ResumeError, match="training texts"):
            train(load_encoder(encoder_folder("bert")), data=data, checkpoint=checkpoint)
    with pytest.raises(ResumeError, match="selection texts"):
        train(load_encoder(encoder_folder("bert")), selection=tokens(encoder, 60, seed=2), checkpoint=checkpoint)


@pytest.mark.parametrize(
    ("field", "value"), [("threads", 2), ("dtype", "bfloat16"), ("attention", "sdpa"), ("processor", "amx-bf16")]
)
def test_a_checkpoint_of_another_runtime_is_refused(
    field: str, value: Any, checkpoint: Path, encoder_folder: Folders
) -> None:
    config = EncoderConfig(name=str(encoder_folder("bert")), max_tokens=24)
    encoder = Encoder(find_encoder(config, offline=True), config, CPU_FLOAT32.model_copy(update={field: value}))
    with pytest.raises(ResumeError, match=f"runtime.{field}: then .*, now {value}"):
        train(encoder, checkpoint=checkpoint)


def test_a_checkpoint_of_another_encoder_is_refused(checkpoint: Path, encoder_folder: Folders, tmp_path: Path) -> None:
    with pytest.raises(ResumeError, match="encoder: then sha256"):
        train(load_encoder(save_tiny_encoder(tmp_path / "other", "bert", seed=1)), checkpoint=checkpoint)
    with pytest.raises(ResumeError, match="pooling: then mean, now max"):
        train(load_encoder(encoder_folder("bert"), pooling="max"), checkpoint=checkpoint)


# Which epoch


def test_the_weights_of_the_best_epoch_are_kept_and_patience_stops(encoder_folder: Folders) -> None:
    lost = []
    for seed, learning_rate in (
        (0, 0.01),
        (2, 0.01),
        (0, 0.02),
        (2, 0.02),
        (0, 0.1),
    ):  # later epochs are worse; at 0.1 all are equal
        encoder = load_encoder(encoder_folder("bert"))
        selection = tokens(encoder, 60, seed=1)
        training = train(
            encoder, selection=selection, max_epochs=12, patience=2, learning_rate=learning_rate, seed=seed
        )
        scores = [training.start_score or 0, *(e.validation_accuracy or 0 for e in training.epochs)]
        assert max(epoch for epoch, score in enumerate(scores) if score == max(scores)) == training.best_epoch, (
            "the last of equals"
        )
        assert len(training.epochs) == min(max(scores.index(max(scores)), 1) + 2, 12), (
            "stopped two epochs after the first of equals"
        )
        assert accuracy(training.adapter, selection) == max(scores)
        assert [e.is_best for e in training.epochs] == [e.epoch == training.best_epoch for e in training.epochs]
        assert not training.adapter.head.training
        lost.append(max(scores) - scores[-1])
    assert max(lost) > 0.05, "keeping the last epoch would have been noticed"


def probe_of(encoder: Encoder, data: LabelledTokens) -> HeadStart:
    """A head that already classifies the toy texts, without an adapter."""
    vectors = encoder.embed(data.tokens)
    one_hot = np.eye(3, dtype=np.float32)[data.labels]
    ridge = np.linalg.solve(vectors.T @ vectors + 10 * np.eye(32, dtype=np.float32), vectors.T @ (one_hot * 5)).T
    return HeadStart(np.ascontiguousarray(ridge, dtype=np.float32), np.zeros(3, dtype=np.float32))


RUINOUS: dict[str, Any] = {"learning_rate": 0.5, "max_epochs": 6, "patience": 3}
"""Every epoch is worse than a head start."""


def test_a_start_that_no_epoch_beats_is_kept(encoder_folder: Folders) -> None:
    encoder = load_encoder(encoder_folder("bert"))
    start, selection = probe_of(encoder, tokens(encoder, NUM_TRAIN)), tokens(encoder, 60, seed=1)
    training = train(encoder, head_start=start, selection=selection, **RUINOUS)
    untrained = Adapter(load_encoder(encoder_folder("bert")), AdapterConfig(), LABELS)
    untrained.classifier.start_from(start)
    assert bits(training) == b"".join(p.detach().numpy().tobytes() for p in untrained.parameters)
    assert (training.best_epoch, [row.is_best for row in training.epochs]) == (0, [False] * 4), (
        "patience counts from the first epoch"
    )
    assert training.start_score == accuracy(training.adapter, selection)
    assert training.start_score > max(row.validation_accuracy or 0 for row in training.epochs)


def test_a_kept_start_survives_a_stop_and_is_not_refitted(encoder_folder: Folders, tmp_path: Path) -> None:
    encoder = load_encoder(encoder_folder("bert"))
    start = probe_of(encoder, tokens(encoder, NUM_TRAIN))
    whole = train(encoder, head_start=start, refit=True, **RUINOUS)
    assert (whole.best_epoch, whole.refitted, len(whole.epochs)) == (0, False, 4)
    for epoch in (1, 2, 3):
        path = tmp_path / f"{epoch}.safetensors"
        with pytest.raises(Stop):
            train(
                load_encoder(encoder_folder("bert")),
                head_start=start,
                refit=True,
                checkpoint=path,
                on_epoch=stop_after(epoch),
                **RUINOUS,
            )
        resumed = train(load_encoder(encoder_folder("bert")), head_start=start, refit=True, checkpoint=path, **RUINOUS)
        assert (bits(resumed), facts(resumed), resumed.start_score) == (bits(whole), facts(whole), whole.start_score)


def test_an_epoch_that_equals_the_start_is_taken(encoder_folder: Folders) -> None:
    encoder = load_encoder(encoder_folder("bert"))
    start = probe_of(encoder, tokens(encoder, NUM_TRAIN))
    training = train(encoder, head_start=start, learning_rate=1e-9, max_epochs=2)
    assert {row.validation_accuracy for row in training.epochs} == {training.start_score}
    assert training.best_epoch == 2
    assert all(lora.lora_B.any() for lora in training.adapter.projections.values())


def test_a_checkpoint_keeps_all_that_the_rest_of_a_training_depends_on(undisturbed: Training, tmp_path: Path) -> None:
    state = LoopState(
        list(undisturbed.epochs),
        best_epoch=2,
        best_score=0.75,
        last_gain=3,
        steps=90,
        finished=True,
        start_score=0.25,
        start_knows=True,
    )
    assert all(getattr(state, name) != value for name, value in vars(LoopState()).items()), (
        "no field has the value that it begins with"
    )
    file = Checkpoint(tmp_path / "c", {"seed": 0})
    file.write({"weights": torch.ones(3)}, state)
    found = file.read()
    assert found is not None
    assert (found[0]["weights"].tolist(), found[1]) == ([1.0] * 3, state)


def test_a_tensor_of_any_layout_is_written_as_it_is_read() -> None:
    whole = torch.arange(12.0)
    tensors = {
        "plain": whole,
        "transposed": whole.view(3, 4).t(),
        "every second": whole[::2],
        "trained": whole.clone().requires_grad_(),
    }
    found = load(tensor_file(tensors, {"made": "here"}))
    assert {name: tensor.tolist() for name, tensor in found.items()} == {
        name: tensor.tolist() for name, tensor in tensors.items()
    }


def test_a_resume_keeps_the_best_epoch_too(encoder_folder: Folders, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_epochs": 12, "patience": 2, "learning_rate": 0.02}
    straight = train(load_encoder(encoder_folder("bert")), **settings)
    path = tmp_path / "training.safetensors"
    with pytest.raises(Stop):
        last = len(straight.epochs) - 1
        train(load_encoder(encoder_folder("bert")), checkpoint=path, on_epoch=stop_after(last), **settings)
    resumed = train(load_encoder(encoder_folder("bert")), checkpoint=path, **settings)
    assert bits(resumed) == bits(straight)
    assert facts(resumed) == facts(straight)


def test_the_row_says_what_the_epoch_was_selected_on(bert: Encoder, encoder_folder: Folders) -> None:
    assert train(bert, max_epochs=1).selected_on == "validation"
    on_test = train(load_encoder(encoder_folder("bert")), max_epochs=1, early_stopping_split="test")
    assert on_test.selected_on == "test"
    unselected = train(load_encoder(encoder_folder("bert")), max_epochs=4, selection=None, patience=1)
    assert (unselected.selected_on, unselected.best_epoch, len(unselected.epochs)) == ("last_epoch", 4, 4)
    assert {e.validation_accuracy for e in unselected.epochs} == {None}


def test_selection_changes_no_weight_on_the_way(encoder_folder: Folders) -> None:
    with_selection = train(load_encoder(encoder_folder("bert")), patience=3)
    without = train(load_encoder(encoder_folder("bert")), selection=None)
    assert [e.train_loss for e in with_selection.epochs] == [e.train_loss for e in without.epochs]


def test_a_refit_is_a_training_on_both_parts_for_the_best_number_of_epochs(encoder_folder: Folders) -> None:
    rows: list[EpochRow] = []
    encoder = load_encoder(encoder_folder("bert"))
    refitted = train(encoder, refit=True, max_epochs=1, on_epoch=rows.append)
    both = tokens(encoder, NUM_TRAIN) + tokens(encoder, 60, seed=1)
    by_hand = train(load_encoder(encoder_folder("bert")), data=both, selection=None, max_epochs=1)
    assert bits(refitted) == bits(by_hand)
    assert bits(refitted) != bits(train(load_encoder(encoder_folder("bert")), max_epochs=1))
    assert (refitted.refitted, by_hand.refitted) == (True, False)
    assert (refitted.learnt_selection, by_hand.learnt_selection) == (True, False)
    assert (refitted.best_epoch, refitted.selected_on) == (1, "validation")
    assert [(row.epoch, row.is_best, row.validation_accuracy is None) for row in refitted.epochs] == [
        (1, True, False),
        (2, False, True),
    ]
    assert [row.validation_accuracy is None for row in rows] == [False, True]


def test_a_refit_ends_at_the_best_epoch(bert: Encoder) -> None:
    rows: list[EpochRow] = []
    training = train(bert, refit=True, max_epochs=12, patience=2, learning_rate=0.02, on_epoch=rows.append)
    refit = rows[len(rows) - training.best_epoch :]
    assert len(training.epochs) == len(rows)
    assert [row.epoch for row in refit] == list(range(1, training.best_epoch + 1))
    assert refit[0].train_loss != rows[0].train_loss


def test_a_refit_that_was_stopped_resumes_to_the_same_bits(encoder_folder: Folders, tmp_path: Path) -> None:
    straight = train(load_encoder(encoder_folder("bert")), refit=True)
    path = tmp_path / "training.safetensors"

    def stop_in_refit(row: EpochRow) -> None:
        if row.validation_accuracy is None:
            raise Stop

    with pytest.raises(Stop):
        train(load_encoder(encoder_folder("bert")), refit=True, checkpoint=path, on_epoch=stop_in_refit)
    rows: list[EpochRow] = []
    resumed = train(load_encoder(encoder_folder("bert")), refit=True, checkpoint=path, on_epoch=rows.append)
    assert bits(resumed) == bits(straight)
    assert facts(resumed) == facts(straight)
    assert [row.epoch for row in rows] == list(range(2, straight.best_epoch + 1))


# How


def imbalanced(encoder: Encoder) -> LabelledTokens:
    texts, labels = toy_texts(300)
    chosen = [i for i, label in enumerate(labels) if label != 2 or i % 10 == 2]
    return LabelledTokens(
        encoder.tokenise([texts[i] for i in chosen]), np.array([labels[i] for i in chosen], dtype=np.int64)
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_the_loss_is_pytorchs_with_class_weights_and_smoothing(smoothing: float) -> None:
    random = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(16, 5, generator=random), torch.randint(5, (16,), generator=random)
    weights = torch.rand(5, generator=random) + 0.1
    expected = torch.nn.functional.cross_entropy(logits, labels, weights, label_smoothing=smoothing)
    torch.testing.assert_close(cross_entropy(logits, labels, weights, smoothing=smoothing), expected)


def test_balanced_class_weights_are_of_mean_one_over_the_texts() -> None:
    weights = class_weights(np.array([0, 0, 0, 1]), 3, TrainConfig(class_weights="balanced"))
    assert weights.tolist() == pytest.approx([4 / 9, 4 / 3, 4 / 3])


def test_balanced_class_weights_find_more_of_a_rare_class(encoder_folder: Folders) -> None:
    found = {}
    for weights in ("none", "balanced"):
        encoder = load_encoder(encoder_folder("bert"))
        held_out = tokens(encoder, 150, seed=3)
        rare = held_out.labels == 2
        settings: dict[str, Any] = {"max_epochs": 10, "learning_rate": 0.01, "batch_size": 32, "class_weights": weights}
        training = train(encoder, data=imbalanced(encoder), selection=None, **settings)
        logits = training.adapter.logits_of_vectors(encoder.embed(held_out.tokens))
        found[weights] = float((logits.argmax(1)[rare] == 2).mean())
    assert found["balanced"] > found["none"] + 0.05


def test_class_weights_change_nothing_where_classes_are_even(undisturbed: Training, encoder_folder: Folders) -> None:
    assert bits(train(load_encoder(encoder_folder("bert")), class_weights="balanced")) == bits(undisturbed)


def test_a_head_start_is_where_training_starts(encoder_folder: Folders) -> None:
    encoder = load_encoder(encoder_folder("bert"))
    start = probe_of(encoder, tokens(encoder, NUM_TRAIN))
    settings: dict[str, Any] = {"max_epochs": 1, "learning_rate": 1e-6}
    started, random = (
        train(encoder, head_start=start, **settings),
        train(load_encoder(encoder_folder("bert")), **settings),
    )
    assert started.epochs[0].train_loss < 0.8 * random.epochs[0].train_loss
    linear = started.adapter.head[1].state_dict()
    np.testing.assert_allclose(linear["weight"].numpy(), start.weight, atol=1e-3)


def test_gradients_are_cut_to_a_length(first_epoch: Path, encoder_folder: Folders, tmp_path: Path) -> None:
    """The first moment is a mean of gradients, so it is no longer than the longest of them."""
    short = tmp_path / "training.safetensors"
    with pytest.raises(Stop):
        train(load_encoder(encoder_folder("bert")), gradient_clip=0.01, checkpoint=short, on_epoch=stop_after(1))
    cut, whole = (float(load_file(path)["first_moment"].norm()) for path in (short, first_epoch))
    assert 0.001 < cut <= 0.01
    assert whole > 0.02


def test_one_tiny_step_moves_no_weight_further_than_the_learning_rate(bert: Encoder) -> None:
    before = [p.detach().clone() for p in Adapter(bert, AdapterConfig(), LABELS).parameters]
    fresh = load_encoder(bert.config.name)
    after = train(
        fresh, data=tokens(fresh, 4), selection=None, max_epochs=1, learning_rate=1e-3, weight_decay=0
    ).adapter.parameters
    moved = max(float((a.detach() - b).abs().max()) for a, b in zip(after, before, strict=True))
    assert 0.9e-3 < moved <= 1.001e-3  # AdamW's first step


def test_a_training_that_diverges_says_so(bert: Encoder) -> None:
    start = HeadStart(
        np.full((len(LABELS), bert.hidden_size), np.inf, dtype=np.float32), np.zeros(len(LABELS), dtype=np.float32)
    )
    with pytest.raises(LorafleetError, match=r"training diverged in epoch 1: loss nan; lower train\.learning_rate"):
        train(bert, head_start=start)


def epoch(lengths: IntArray, *, seed: int = 0, batch_size: int = 8) -> list[IntArray]:
    return list(epoch_batches(lengths, batch_size=batch_size, order=np.random.default_rng(seed)))


@pytest.fixture
def lengths() -> Iterator[IntArray]:
    """Lengths of 1000 texts: mostly short, a few long."""
    yield np.minimum(np.random.default_rng(1).geometric(0.08, size=1003) + 2, 128)


def test_an_epoch_takes_every_text_once_in_full_batches(lengths: IntArray) -> None:
    batches = epoch(lengths)
    assert sorted(np.concatenate(batches).tolist()) == list(range(1003))
    assert sorted(len(b) for b in batches) == [3] + [8] * 125
    assert [b.tolist() for b in epoch(np.array([4, 9]))] in ([[0, 1]], [[1, 0]])


def test_the_generator_decides_the_order(lengths: IntArray) -> None:
    once, again, other = (np.concatenate(epoch(lengths, seed=seed)).tolist() for seed in (0, 0, 1))
    assert once == again != other


def test_batches_hold_texts_of_like_length_in_an_order_that_is_not_by_length(lengths: IntArray) -> None:
    batches = epoch(lengths)
    padded = sum(len(b) * lengths[b].max() for b in batches)
    assert lengths.sum() / padded > 0.95, "hardly any padding"
    shuffled = np.random.default_rng(0).permutation(1003)
    assert lengths.sum() / sum(8 * lengths[shuffled[i : i + 8]].max() for i in range(0, 1003, 8)) < 0.6, (
        "which is not for free"
    )
    longest = np.array([lengths[b].max() for b in batches])
    assert abs(np.corrcoef(longest, np.arange(len(longest)))[0, 1]) < 0.3


def test_which_texts_meet_changes_from_epoch_to_epoch(lengths: IntArray) -> None:
    first, second = ({frozenset(b.tolist()) for b in epoch(lengths, seed=seed)} for seed in (0, 1))
    assert len(first & second) < 0.1 * len(first)


# --- starting from a published adapter ---


@pytest.fixture(scope="module")
def published(undisturbed: Training, tmp_path_factory: pytest.TempPathFactory) -> TaskFolder:
    """The saved adapter of the undisturbed training."""
    folder = TaskFolder(tmp_path_factory.mktemp("published"))
    save_adapter(undisturbed.adapter, folder, meta={})
    return folder


def test_a_warm_start_begins_with_the_published_weights(
    published: TaskFolder, undisturbed: Training, bert: Encoder
) -> None:
    adapter = Adapter(bert, AdapterConfig(), LABELS, seed=5)
    start_from(adapter, published)
    assert [p.detach().tolist() for p in adapter.parameters] == [
        p.detach().tolist() for p in undisturbed.adapter.parameters
    ]


def test_the_heads_rows_follow_their_labels_and_a_new_label_keeps_its_own_start(
    published: TaskFolder, undisturbed: Training, bert: Encoder
) -> None:
    names = ("garden", "desert", "sea")
    adapter = Adapter(bert, AdapterConfig(), names)
    fresh = adapter.head[1].weight.detach().clone()
    start_from(adapter, published)
    weight, before = adapter.head[1].weight.detach(), undisturbed.adapter.head[1].weight.detach()
    assert weight[0].tolist() == before[LABELS.index("garden")].tolist()
    assert weight[1].tolist() == fresh[1].tolist()
    assert weight[2].tolist() == before[LABELS.index("sea")].tolist()


def test_a_warm_start_wins_over_the_probes_head(published: TaskFolder, encoder_folder: Folders) -> None:
    zeros = HeadStart(np.zeros((3, 32), np.float32), np.zeros(3, np.float32))
    plain = train(load_encoder(encoder_folder("bert")), warm_start=published, max_epochs=1)
    both = train(load_encoder(encoder_folder("bert")), warm_start=published, head_start=zeros, max_epochs=1)
    assert both.start_score == plain.start_score
    assert both.epochs[0].train_loss == plain.epochs[0].train_loss


def test_the_score_at_the_start_is_that_of_the_published_adapter(
    published: TaskFolder, undisturbed: Training, encoder_folder: Folders
) -> None:
    warm = train(load_encoder(encoder_folder("bert")), warm_start=published, max_epochs=1)
    assert warm.start_score == undisturbed.epochs[undisturbed.best_epoch - 1].validation_accuracy
    assert undisturbed.start_score is not None
    assert undisturbed.start_score < warm.start_score


def test_a_published_adapter_that_no_epoch_beats_is_kept(
    published: TaskFolder, undisturbed: Training, encoder_folder: Folders
) -> None:
    warm = train(load_encoder(encoder_folder("bert")), warm_start=published, **RUINOUS)
    assert (warm.best_epoch, bits(warm)) == (0, bits(undisturbed))


def test_a_published_adapter_that_has_learnt_the_validation_slice_does_not_compete(
    published: TaskFolder, encoder_folder: Folders, tmp_path: Path
) -> None:
    refitted = TaskFolder(shutil.copytree(published.root, tmp_path / "refitted"))
    meta = json.loads(refitted.meta.read_text(encoding="utf-8"))
    refitted.meta.write_text(json.dumps(meta | {"learnt_validation": True}), encoding="utf-8")
    warm = train(load_encoder(encoder_folder("bert")), warm_start=refitted, **RUINOUS)
    assert warm.best_epoch > 0
    assert (warm.start_score, warm.refitted, warm.learnt_selection) == (None, False, True)
    assert not train(load_encoder(encoder_folder("bert")), warm_start=published, max_epochs=1).learnt_selection
    with pytest.raises(Stop):
        train(
            load_encoder(encoder_folder("bert")), warm_start=refitted, checkpoint=tmp_path / "c", on_epoch=stop_after(2)
        )
    resumed = train(
        load_encoder(encoder_folder("bert")), warm_start=published, checkpoint=tmp_path / "c"
    )  # published meanwhile
    assert (resumed.start_score, resumed.learnt_selection) == (None, True)


def test_a_warm_start_that_was_stopped_ends_with_the_same_bits_and_keeps_its_first_score(
    published: TaskFolder, encoder_folder: Folders, tmp_path: Path
) -> None:
    whole = train(load_encoder(encoder_folder("bert")), warm_start=published)
    with pytest.raises(Stop):
        train(
            load_encoder(encoder_folder("bert")),
            warm_start=published,
            checkpoint=tmp_path / "c",
            on_epoch=stop_after(2),
        )
    resumed = train(load_encoder(encoder_folder("bert")), warm_start=published, checkpoint=tmp_path / "c")
    assert (bits(resumed), resumed.start_score) == (bits(whole), whole.start_score)


def test_an_adapter_of_another_rank_cannot_be_started_from(published: TaskFolder, bert: Encoder) -> None:
    with pytest.raises(AdapterError, match="cannot start from this adapter: expected rank 4, found 8"):
        start_from(Adapter(bert, AdapterConfig(rank=4), LABELS), published)
