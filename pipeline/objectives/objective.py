"""Training objectives: the batches, the loss of a batch, and the metric that selects the epoch.

The loop, its checkpoints, the recorded steps and the progress depend on the data through an ``Objective`` only. A task
family is one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.adapter.head import HeadStart
from pipeline.adapter.sided import Trainable
from pipeline.adapter.state import EncoderState
from pipeline.config import TrainConfig
from pipeline.encoder.encoder import Batch, Encoder
from pipeline.encoder.tokeniser import IntArray
from pipeline.objectives.batches import Inputs, LabelledTokens, arrays_sha256, epoch_batches, token_arrays

BatchLoss = Callable[..., Tensor]
"""Function from the ``Inputs`` of one batch to its loss, a float32 scalar.

It must not read values back from a GPU, so that it can be recorded."""


class Objective(ABC):
    """The examples of a training and the loss on them.

    Equal objectives must give equal batches and losses: a resumed training ends with the same bits.
    """

    label_names: tuple[str, ...] | None = None
    """Labels of the head that is trained with the LoRA pairs. None trains the pairs alone."""

    selection_metric: str
    """Name of the metric that selects the epoch."""

    has_sides: bool = False
    """Whether each side of pairs of texts has an adapter of its own."""

    examples: str = "texts"
    """Word for several examples, in log lines."""

    @property
    @abstractmethod
    def num_examples(self) -> int:
        """Number of examples in one epoch."""

    @property
    @abstractmethod
    def num_tokens(self) -> int:
        """Number of tokens in one epoch."""

    @property
    @abstractmethod
    def has_selection(self) -> bool:
        """Whether there are examples that select the epoch. Without them the last epoch is kept."""

    @abstractmethod
    def conditions(self) -> dict[str, Any]:
        """JSON values that must be unchanged in a resumed training, such as label names and a hash of the examples."""

    @abstractmethod
    def batches(self, *, batch_size: int, order: np.random.Generator) -> Iterator[IntArray]:
        """Numbers of the examples in each batch of one epoch, int64 (examples of the batch,).

        Args:
            batch_size: Examples per batch. The last batch may be smaller.
            order: Source of all randomness.
        """

    @abstractmethod
    def inputs(self, rows: IntArray, encoder: Encoder, *, length_step: int) -> Inputs:
        """Make the tensors of some examples on the encoder's device.

        Args:
            rows: Numbers of the examples, from ``batches``.
            encoder: Encoder that makes batches of texts.
            length_step: Texts are padded to a multiple of this many tokens.
        """

    @abstractmethod
    def loss(self, adapter: Trainable) -> BatchLoss:
        """Make the loss function for an adapter. Called once, before the first step."""

    @abstractmethod
    def score(self, adapter: Trainable) -> float:
        """Value of the selection metric on the selection's examples. Larger is better."""

    @abstractmethod
    def with_selection(self) -> Objective:
        """The same objective, trained on the selection's examples as well, without a selection."""

    @property
    def parameters(self) -> Sequence[nn.Parameter]:
        """Weights of the loss itself, trained with the adapter's and saved in checkpoints only.

        Read after ``start``. On the encoder's device."""
        return ()

    def epoch_fields(self, score: float | None) -> dict[str, float | None]:
        """Fields of ``EpochRow`` for the value of the selection metric."""
        return {"validation_score": score}

    def start(self, adapter: Trainable) -> None:  # noqa: B027 - most objectives start at random
        """Replace random initial weights. Called once, before a warm start."""


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
            train: Training texts.
            selection: Texts that select the epoch.
            label_names: Names of the classes, in the order of the label numbers.
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
        """Number of training texts."""
        return len(self._train.labels)

    @property
    def num_tokens(self) -> int:
        """Number of tokens of the training texts."""
        return len(self._train.tokens.ids)

    @property
    def has_selection(self) -> bool:
        """Whether there are texts that select the epoch."""
        return self._selection is not None

    def conditions(self) -> dict[str, Any]:
        """Label names, and hashes of the texts and of the head's initial weights."""
        start = self._head_start
        return {
            "label names": list(self.label_names or ()),
            "training texts": arrays_sha256(*token_arrays(self._train)),
            "selection texts": None if self._selection is None else arrays_sha256(*token_arrays(self._selection)),
            "head start": None if start is None else arrays_sha256(start.weight, start.bias),
        }

    def batches(self, *, batch_size: int, order: np.random.Generator) -> Iterator[IntArray]:
        """Random batches of texts of similar length."""
        return epoch_batches(self._train.tokens.lengths, batch_size=batch_size, order=order)

    def inputs(self, rows: IntArray, encoder: Encoder, *, length_step: int) -> Inputs:
        """Batch of texts, and their labels, int64 (texts,)."""
        labels = encoder.to_device(torch.from_numpy(self._train.labels[rows]))
        return encoder.batch(self._train.tokens, rows, length_step=length_step), labels

    def loss(self, adapter: Trainable) -> BatchLoss:
        """Cross-entropy with class weights and label smoothing."""
        assert isinstance(adapter, EncoderState)
        # Dynamic, because the batches of an epoch have many shapes.
        logits_of = torch.compile(adapter.logits, dynamic=True) if adapter.encoder.runtime.compiled else adapter.logits
        weights = class_weights(self._train.labels, len(adapter.label_names), self._config).to(adapter.encoder.device)

        def loss(batch: Batch, labels: Tensor) -> Tensor:
            return cross_entropy(logits_of(batch), labels, weights, smoothing=self._config.label_smoothing)

        return loss

    def score(self, adapter: Trainable) -> float:
        """Accuracy on the selection's texts."""
        assert self._selection is not None
        assert isinstance(adapter, EncoderState)
        return accuracy(adapter, self._selection)

    def epoch_fields(self, score: float | None) -> dict[str, float | None]:
        """Accuracy has its own field, for compatibility with older versions."""
        return {"validation_accuracy": score}

    def with_selection(self) -> Classification:
        """The same objective, trained on the selection's texts as well."""
        assert self._selection is not None
        return Classification(
            self._train + self._selection,
            None,
            label_names=self.label_names or (),
            config=self._config,
            head_start=self._head_start,
        )

    def start(self, adapter: Trainable) -> None:
        """Set the head's initial weights."""
        if self._head_start is not None:
            assert isinstance(adapter, EncoderState)
            adapter.classifier.start_from(self._head_start)


def accuracy(adapter: EncoderState, data: LabelledTokens) -> float:
    """Fraction of the texts that the adapter's head labels correctly, 0..1."""
    logits = adapter.logits_of_vectors(adapter.encoder.embed(data.tokens))
    return float((logits.argmax(axis=1) == data.labels).mean())


def cross_entropy(logits: Tensor, labels: Tensor, class_weights: Tensor, *, smoothing: float) -> Tensor:
    """Cross-entropy with class weights and label smoothing, equal to ``torch.nn.functional.cross_entropy``.

    It does not check the labels, because the check waits for the GPU.

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
    """Weight of each class in the loss, float32 (classes,). The mean over the texts is 1."""
    if config.class_weights == "none":
        return torch.ones(num_classes)
    counts = np.bincount(labels, minlength=num_classes)
    return torch.from_numpy((len(labels) / (num_classes * np.maximum(counts, 1))).astype(np.float32))
