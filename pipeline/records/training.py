"""Records of a training in progress."""

from __future__ import annotations

from pydantic import Field

from pipeline.records.base import Fraction, Record, Sha256


class EpochRow(Record):
    """One pass over the training texts: one row of ``epochs.parquet``."""

    epoch: int = Field(ge=1)
    train_loss: float
    validation_accuracy: Fraction | None = None
    """Accuracy on the split that selects the epoch. None in a refit, and if another metric selects."""
    learning_rate: float
    """Learning rate at the end of the epoch."""
    texts_per_second: float
    """Training texts per second inside the training loop of this epoch."""
    tokens_per_second: float
    seconds: float
    """Duration of the training loop, without validation and checkpoint."""
    peak_memory_bytes: int
    is_best: bool
    validation_score: float | None = Field(default=None, exclude_if=lambda value: value is None)
    """Value of the metric that selects the epoch, if it is not accuracy."""


class Progress(Record):
    """Progress within one training."""

    epoch: int
    max_epochs: int
    step: int
    """Current step within the epoch."""
    num_steps: int
    """Steps per epoch."""
    train_loss: float
    """Loss of the last step."""
    texts_per_second: float
    """Training texts per second in this epoch so far."""


class LogLine(Record):
    """A line that a worker logged, to be repeated in the log of the flow run."""

    level: int
    """Level number of Python's ``logging``."""
    text: str


class WarmStart(Record):
    """The published adapter that this training started from."""

    sha256: Sha256
