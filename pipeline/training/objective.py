"""What a training learns: its batches, the loss of a batch, and the number that selects the epoch.

The loop, its checkpoints, the recorded steps on a GPU and the progress know nothing else of the data. A new loss is a
new ``Objective``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.adapter.adapter import Adapter
from pipeline.adapter.head import HeadStart
from pipeline.config import TrainConfig
from pipeline.encoder.encoder import Batch, Encoder
from pipeline.encoder.tokeniser import IntArray
from pipeline.training.batches import LabelledTokens, arrays_sha256, epoch_batches, token_arrays
from pipeline.training.step_graphs import Inputs

BatchLoss = Callable[..., Tensor]
"""The loss of one batch, a float32 scalar, from its ``Inputs``. It reads nothing back from a GPU, so it can be recorded."""


class Objective(ABC):
    """The examples of a training and the loss on them.

    Equal objectives must give equal batches and losses: a resumed training ends with the same bits.
    """

    label_names: tuple[str, ...] | None = None
    """Labels of the head that is trained along. None trains LoRA pairs alone."""

    selection_metric: str
    """Name of the number that selects the epoch."""

    @property
    @abstractmethod
    def num_examples(self) -> int:
        """Examples of one epoch."""

    @property
    @abstractmethod
    def num_tokens(self) -> int:
        """Tokens of one epoch."""

    @property
    @abstractmethod
    def has_selection(self) -> bool:
        """Whether there are examples that select the epoch. Without them the last epoch is kept."""

    @abstractmethod
    def conditions(self) -> dict[str, Any]:
        """JSON facts that a resumed training must find unchanged: the names of the labels, a hash of the examples."""

    @abstractmethod
    def batches(self, *, batch_size: int, order: np.random.Generator) -> Iterator[IntArray]:
        """Numbers of the examples in each batch of one epoch, int64 (examples of the batch,).

        Args:
            batch_size: Examples per batch. The last batch may be smaller.
            order: Source of all randomness.
        """

    @abstractmethod
    def inputs(self, rows: IntArray, encoder: Encoder, *, length_step: int) -> Inputs:
        """Tensors of the given examples on the encoder's device.

        Args:
            rows: Numbers of the examples, as ``batches`` gives them.
            encoder: Makes batches of texts.
            length_step: Texts are padded to a multiple of this many tokens.
        """

    @abstractmethod
    def loss(self, adapter: Adapter) -> BatchLoss:
        """The loss of a batch for this adapter. Called once, before the first step."""

    @abstractmethod
    def score(self, adapter: Adapter) -> float:
        """The number that selects the epoch, on the selection's examples. Larger is better."""

    @abstractmethod
    def with_selection(self) -> Objective:
        """The same objective that also learns from the selection's examples, and has no selection."""

    def epoch_fields(self, score: float | None) -> dict[str, float | None]:
        """Fields of ``EpochRow`` for the number that selected the epoch."""
        return {"validation_score": score}

    def start(self, adapter: Adapter) -> None:  # noqa: B027 - most objectives start at random
        """Set initial weights other than random ones. Called once, before a warm start."""


class Classification(Objective):
    """Cross-entropy of a head's logits against one label per text, selected by accuracy."""

    selection_metric = "accuracy"

    def __init__(
        self,
        train: LabelledTokens,
        selection: LabelledTokens | None,
        *,
        label_names: tuple[str, ...],
        config: TrainConfig,
        head_start: HeadStart | None = None,
    ) -> None:
        """Compute nothing yet.

        Args:
            train: Texts that are learnt from.
            selection: Texts that select the epoch.
            label_names: The classes, in the order of the labels' numbers.
            config: Label smoothing and class weights.
            head_start: Initial weights of the head. None starts at random.
        """
        self.label_names = label_names
        self._train = train
        self._selection = selection
        self._config = config
        self._head_start = head_start

    @property
    def num_examples(self) -> int:
        """Training texts."""
        return len(self._train.labels)

    @property
    def num_tokens(self) -> int:
        """Tokens of the training texts."""
        return len(self._train.tokens.ids)

    @property
    def has_selection(self) -> bool:
        """Whether there are texts that select the epoch."""
        return self._selection is not None

    def conditions(self) -> dict[str, Any]:
        """Label names, and hashes of the texts and of the head's start."""
        start = self._head_start
        return {
            "label names": list(self.label_names or ()),
            "training texts": arrays_sha256(*token_arrays(self._train)),
            "selection texts": None if self._selection is None else arrays_sha256(*token_arrays(self._selection)),
            "head start": None if start is None else arrays_sha256(start.weight, start.bias),
        }

    def batches(self, *, batch_size: int, order: np.random.Generator) -> Iterator[IntArray]:
        """Random batches of texts of like length."""
        return epoch_batches(self._train.tokens.lengths, batch_size=batch_size, order=order)

    def inputs(self, rows: IntArray, encoder: Encoder, *, length_step: int) -> Inputs:
        """The texts and their labels, int64 (texts,)."""
        labels = encoder.to_device(torch.from_numpy(self._train.labels[rows]))
        return encoder.batch(self._train.tokens, rows, length_step=length_step), labels

    def loss(self, adapter: Adapter) -> BatchLoss:
        """Cross-entropy with class weights and label smoothing."""
        # Any batch size and length: texts of an epoch come in many shapes.
        logits_of = torch.compile(adapter.logits, dynamic=True) if adapter.encoder.runtime.compiled else adapter.logits
        weights = class_weights(self._train.labels, len(adapter.label_names), self._config).to(adapter.encoder.device)

        def loss(batch: Batch, labels: Tensor) -> Tensor:
            return cross_entropy(logits_of(batch), labels, weights, smoothing=self._config.label_smoothing)

        return loss

    def score(self, adapter: Adapter) -> float:
        """Accuracy on the selection's texts."""
        assert self._selection is not None
        return accuracy(adapter, self._selection)

    def epoch_fields(self, score: float | None) -> dict[str, float | None]:
        """Accuracy has a field of its own, as older versions wrote it."""
        return {"validation_accuracy": score}

    def with_selection(self) -> Classification:
        """Learn from the selection's texts too."""
        assert self._selection is not None
        return Classification(
            self._train + self._selection,
            None,
            label_names=self.label_names or (),
            config=self._config,
            head_start=self._head_start,
        )

    def start(self, adapter: Adapter) -> None:
        """Give the head its initial weights."""
        if self._head_start is not None:
            adapter.classifier.start_from(self._head_start)


def accuracy(adapter: Adapter, data: LabelledTokens) -> float:
    """Share of the texts that the adapter's head labels correctly, 0..1."""
    logits = adapter.logits_of_vectors(adapter.encoder.embed(data.tokens))
    return float((logits.argmax(axis=1) == data.labels).mean())


def cross_entropy(logits: Tensor, labels: Tensor, class_weights: Tensor, *, smoothing: float) -> Tensor:
    """``torch.nn.functional.cross_entropy`` with label smoothing, without its check of the labels.

    That check waits for the GPU.

    Args:
        logits: float32 (texts, classes).
        labels: int64 (texts,).
        class_weights: float32 (classes,).
        smoothing: Weight of the uniform distribution, 0..1.
    """
    log_probabilities = logits.log_softmax(dim=1)
    loss = nn.functional.nll_loss(log_probabilities, labels, class_weights)
    if not smoothing:
        return loss
    spread = -(log_probabilities * class_weights).sum() / class_weights[labels].sum()
    return (1 - smoothing) * loss + smoothing / logits.shape[1] * spread


def class_weights(labels: IntArray, num_classes: int, config: TrainConfig) -> Tensor:
    """Weight of each class in the loss, float32 (classes,), of mean 1 over the texts."""
    if config.class_weights == "none":
        return torch.ones(num_classes)
    counts = np.bincount(labels, minlength=num_classes)
    return torch.from_numpy((len(labels) / (num_classes * np.maximum(counts, 1))).astype(np.float32))
