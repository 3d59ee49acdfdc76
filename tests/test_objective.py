"""Training for objectives that are not classification: the loop, checkpoints and resume work for them as they are."""

from __future__ import annotations

import ast
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import load_encoder, toy_texts
from torch import Tensor

import pipeline
from pipeline.adapter.adapter import Adapter
from pipeline.config import AdapterConfig, TrainConfig
from pipeline.encoder.encoder import Batch, Encoder
from pipeline.encoder.tokeniser import IntArray, Tokens
from pipeline.errors import LorafleetError, ResumeError
from pipeline.objectives.batches import arrays_sha256, epoch_batches
from pipeline.objectives.objective import BatchLoss, Objective
from pipeline.records import EpochRow, Progress
from pipeline.training.step_graphs import Inputs
from pipeline.training.train import Training, train_adapter

Folders = Callable[[str], Path]
NUM_TRAIN, NUM_SELECTION = 240, 60


class Toy(Objective):
    """An objective without labels on some texts with one number each."""

    def __init__(self, texts: tuple[Tokens, ...], targets: np.ndarray, chosen: np.ndarray, learnt: np.ndarray) -> None:
        self.texts, self.targets, self.chosen, self.learnt = texts, targets, chosen, learnt

    @classmethod
    def make(cls, encoder: Encoder, *, num_selection: int = NUM_SELECTION, seed: int = 0) -> Toy:
        texts, labels = toy_texts(NUM_TRAIN + num_selection, seed=seed)
        rows = np.arange(len(texts))
        return cls(*cls.examples(encoder, texts, np.array(labels)), chosen=rows[NUM_TRAIN:], learnt=rows[:NUM_TRAIN])

    @staticmethod
    def examples(encoder: Encoder, texts: list[str], labels: np.ndarray) -> tuple[tuple[Tokens, ...], np.ndarray]:
        raise NotImplementedError

    @property
    def num_examples(self) -> int:
        return len(self.learnt)

    @property
    def num_tokens(self) -> int:
        return sum(int(tokens.lengths[self.learnt].sum()) for tokens in self.texts)

    @property
    def has_selection(self) -> bool:
        return len(self.chosen) > 0

    def conditions(self) -> dict[str, Any]:
        return {
            "examples": arrays_sha256(*(tokens.ids for tokens in self.texts), self.targets, self.learnt, self.chosen)
        }

    def batches(self, *, batch_size: int, order: np.random.Generator) -> Iterator[IntArray]:
        lengths = sum(tokens.lengths for tokens in self.texts)[self.learnt]
        return (self.learnt[rows] for rows in epoch_batches(lengths, batch_size=batch_size, order=order))

    def inputs(self, rows: IntArray, encoder: Encoder, *, length_step: int) -> Inputs:
        batches = [encoder.batch(tokens, rows, length_step=length_step) for tokens in self.texts]
        return (*batches, encoder.to_device(torch.from_numpy(self.targets[rows])))

    def with_selection(self) -> Toy:
        every = np.concatenate([self.learnt, self.chosen])
        return type(self)(self.texts, self.targets, chosen=self.chosen[:0], learnt=every)


class PairSimilarity(Toy):
    """Cosine similarity of two texts, 1 for one topic and 0 for two; selected by the mean squared error, negated."""

    selection_metric = "negated squared error"

    @staticmethod
    def examples(encoder: Encoder, texts: list[str], labels: np.ndarray) -> tuple[tuple[Tokens, ...], np.ndarray]:
        others = np.random.default_rng(0).permutation(len(texts))
        same = (labels == labels[others]).astype(np.float32)
        return (encoder.tokenise(texts), encoder.tokenise([texts[row] for row in others])), same

    def loss(self, adapter: Adapter) -> BatchLoss:
        def loss(first: Batch, second: Batch, targets: Tensor) -> Tensor:
            similarity = torch.cosine_similarity(adapter.vectors(first), adapter.vectors(second))
            return ((similarity - targets) ** 2).mean()

        return loss

    def score(self, adapter: Adapter) -> float:
        first, second = (torch.from_numpy(adapter.encoder.embed(tokens)) for tokens in self.texts)
        errors = (torch.cosine_similarity(first, second).numpy() - self.targets) ** 2
        return -float(errors[self.chosen].mean())


class Regression(Toy):
    """A number for each text, read off one dimension of its vector; selected by the mean squared error, negated."""

    selection_metric = "negated squared error"

    @staticmethod
    def examples(encoder: Encoder, texts: list[str], labels: np.ndarray) -> tuple[tuple[Tokens, ...], np.ndarray]:
        return (encoder.tokenise(texts),), labels.astype(np.float32) - 1

    def loss(self, adapter: Adapter) -> BatchLoss:
        def loss(texts: Batch, targets: Tensor) -> Tensor:
            return ((adapter.vectors(texts)[:, 0] - targets) ** 2).mean()

        return loss

    def score(self, adapter: Adapter) -> float:
        errors = (adapter.encoder.embed(self.texts[0])[:, 0] - self.targets) ** 2
        return -float(errors[self.chosen].mean())


class Falling(Regression):
    """A selection score that falls with every epoch, because it is the inverse of how far the pairs have moved."""

    selection_metric = "inverse norm"

    def score(self, adapter: Adapter) -> float:
        norm = float(torch.stack([lora.lora_B.detach().square().sum() for lora in adapter.projections.values()]).sum())
        return 0.0 if norm == 0 else 1 / norm


OBJECTIVES = {toy.__name__: toy for toy in (PairSimilarity, Regression, Falling)}
LEARNT = [PairSimilarity, Regression]


def train(objective: Objective, encoder: Encoder, *, max_epochs: int = 3, **options: Any) -> Training:
    settings = options.pop("settings", {})
    config = TrainConfig(**{"learning_rate": 3e-3, "batch_size": 8, "precision": "float32"} | settings)
    return train_adapter(
        objective, encoder, adapter_config=AdapterConfig(), train_config=config, max_epochs=max_epochs, **options
    )


def bits(training: Training) -> bytes:
    return b"".join(p.detach().numpy().tobytes() for p in training.adapter.parameters)


def facts(training: Training) -> list[tuple[Any, ...]]:
    return [(e.epoch, e.train_loss, e.validation_score, e.learning_rate, e.is_best) for e in training.epochs]


def train_until_killed(name: str, folder: str, checkpoint: str) -> None:
    """For a process of its own, which is killed in the middle of its second epoch."""

    def kill(progress: Progress) -> None:
        if progress.epoch == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    encoder = load_encoder(folder)
    train(OBJECTIVES[name].make(encoder), encoder, checkpoint=Path(checkpoint), on_progress=kill)


@pytest.fixture(params=[toy.__name__ for toy in LEARNT])
def learnt(request: pytest.FixtureRequest) -> type[Toy]:
    """A toy whose selection score rises."""
    return OBJECTIVES[request.param]


@pytest.fixture(params=list(OBJECTIVES))
def toy(request: pytest.FixtureRequest) -> type[Toy]:
    return OBJECTIVES[request.param]


def test_an_objective_without_labels_is_learnt_by_pairs_alone(learnt: type[Toy], bert: Encoder) -> None:
    training = train(learnt.make(bert), bert, max_epochs=6)
    losses = [row.train_loss for row in training.epochs]
    assert losses[-1] < 0.6 * losses[0]
    assert training.start_score is not None
    assert training.start_score < max(row.validation_score for row in training.epochs) < 0
    assert training.adapter.head is None
    assert training.adapter.label_names == ()
    assert all(lora.lora_B.any() for lora in training.adapter.projections.values())


def test_the_epoch_with_the_best_number_is_kept(toy: type[Toy], bert: Encoder) -> None:
    objective = toy.make(bert)
    training = train(objective, bert)
    scores = [row.validation_score for row in training.epochs]
    assert all(row.validation_accuracy is None for row in training.epochs)
    assert scores[training.best_epoch - 1] == max(scores)
    assert objective.score(training.adapter) == max(scores)


def test_a_killed_training_resumes_to_the_same_bits(toy: type[Toy], encoder_folder: Folders, tmp_path: Path) -> None:
    folder, path = encoder_folder("bert"), tmp_path / "training.safetensors"
    program = f"import test_objective as t; t.train_until_killed({toy.__name__!r}, {str(folder)!r}, {str(path)!r})"
    killed = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    rows: list[EpochRow] = []
    encoder, other = load_encoder(folder), load_encoder(folder)
    resumed = train(toy.make(encoder), encoder, checkpoint=path, on_epoch=rows.append)
    undisturbed = train(toy.make(other), other)
    assert [row.epoch for row in rows] == [2, 3]
    assert bits(resumed) == bits(undisturbed)
    assert facts(resumed) == facts(undisturbed)


def test_a_training_on_other_examples_is_not_resumed(toy: type[Toy], bert: Encoder, tmp_path: Path) -> None:
    path = tmp_path / "training.safetensors"
    train(toy.make(bert), bert, max_epochs=1, checkpoint=path).adapter.detach()
    with pytest.raises(ResumeError, match="examples: then"):
        train(toy.make(bert, seed=1), bert, max_epochs=1, checkpoint=path)


def test_a_refit_learns_from_the_selection_too(toy: type[Toy], encoder_folder: Folders) -> None:
    encoder = load_encoder(encoder_folder("bert"))
    training = train(toy.make(encoder), encoder, settings={"refit": True})
    assert training.refitted
    again = [row for row in training.epochs if row.validation_score is None]
    assert len(again) == training.best_epoch
    per_epoch = (NUM_TRAIN + NUM_SELECTION) / NUM_TRAIN
    seen = [row.texts_per_second * row.seconds for row in training.epochs]
    assert seen[-1] / seen[0] == pytest.approx(per_epoch)


def test_without_a_selection_the_last_epoch_is_kept(toy: type[Toy], encoder_folder: Folders) -> None:
    encoder = load_encoder(encoder_folder("bert"))
    training = train(toy.make(encoder, num_selection=0), encoder, max_epochs=2)
    assert (training.best_epoch, training.selected_on, training.start_score) == (2, "last_epoch", None)


def test_a_selection_score_that_is_no_number_ends_the_training(encoder_folder: Folders) -> None:
    class Diverged(Regression):
        def score(self, adapter: Adapter) -> float:
            return math.nan

    encoder = load_encoder(encoder_folder("bert"))
    with pytest.raises(LorafleetError, match="negated squared error is not a number"):
        train(Diverged.make(encoder), encoder)


def test_the_loop_its_checkpoint_and_its_recorded_steps_name_no_label() -> None:
    for name in ("loop", "checkpoint", "step_graphs", "flat_weights", "train"):
        path = Path(pipeline.__file__).parent / "training" / f"{name}.py"
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert {n for n in names if "label" in n or "head" in n.split("_") or "accuracy" in n} <= {"label_names"}, name
