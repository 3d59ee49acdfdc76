"""The worker's side of a search, without Ray: trials that train one after the other and share encoder and data."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

from pipeline.adapter.head import HeadStart
from pipeline.encoder.encoder import Encoder
from pipeline.evaluation.probe import full_data_probe, head_start
from pipeline.evaluation.vectors import TextVectors
from pipeline.objectives.objective import Classification, Objective
from pipeline.records import EpochRow, Progress, Record
from pipeline.run.classification_work import LabelledTexts
from pipeline.run.family import FamilyWork
from pipeline.run.inputs import JobInputs
from pipeline.run.job import checkpoint_of, work_of
from pipeline.run.plan import JobSpec
from pipeline.training.train import train_adapter


class Advanced(Record):
    """How far a trial has got."""

    scores: tuple[float, ...]
    """Validation score after each epoch."""
    start_score: float | None
    is_finished: bool
    """Whether the training has ended by itself, after its last epoch or by patience."""
    metric: str
    """Name of the validation score."""
    seconds: float
    """Seconds of all epochs."""


class TrialsJob:
    """Trains trials to some epoch. It reads train and validation only: test is evaluated by a run."""

    def __init__(self) -> None:
        self._encoder: Encoder | None = None
        self._first: JobInputs | None = None
        self._work: FamilyWork | None = None

    def advance(
        self,
        spec: JobSpec,
        until: int,
        on_epoch: Callable[[EpochRow], None],
        on_progress: Callable[[Progress], None],
    ) -> Advanced:
        """Train a trial until an epoch. Its checkpoint is where a run with the same key looks for it.

        Args:
            spec: Job of the trial.
            until: Number of epochs to reach, earlier ones included.
            on_epoch: Called after every new epoch.
            on_progress: Called after every few steps.
        Raises:
            DataError: the data have changed since the search checked them.
            DivergedError: the training diverged.
        """
        inputs = JobInputs(spec)
        if self._encoder is None or self._encoder.runtime != inputs.runtime:
            self._encoder = inputs.encoder
        inputs.encoder = self._encoder
        training = train_adapter(
            self._objective(inputs),
            self._encoder,
            adapter_config=spec.config.adapter,
            train_config=spec.config.train,
            max_epochs=spec.mteb_task.max_epochs,
            checkpoint=checkpoint_of(inputs),
            pause_after=until,
            on_epoch=on_epoch,
            on_progress=on_progress,
        )
        training.adapter.detach()
        rows = training.epochs[:until]  # an earlier search or run may have got further
        scores = [row.validation_accuracy if row.validation_score is None else row.validation_score for row in rows]
        return Advanced(
            scores=tuple(score for score in scores if score is not None),
            start_score=training.start_score,
            is_finished=training.is_finished and len(training.epochs) <= until,
            metric=training.selection_metric,
            seconds=sum(row.seconds for row in rows),
        )

    def _objective(self, inputs: JobInputs) -> Objective:
        """Objective of a trial. A run makes the same one, after it has measured the frozen encoder on test."""
        if inputs.spec.mteb_task.objective != "classification":
            if self._work is None or self._work.inputs.spec != inputs.spec:
                self._work = work_of(inputs)
            return self._work.objective()
        if self._first is None:
            self._first = inputs
        texts, train = self._texts, inputs.config.train
        return Classification(
            texts.tokens.train,
            texts.selection,
            label_names=texts.data.label_names,
            config=train,
            head_start=self._head_start if train.head_init == "probe" else None,
        )

    @cached_property
    def _texts(self) -> LabelledTexts:
        assert self._first is not None
        return LabelledTexts(self._first)

    @cached_property
    def _head_start(self) -> HeadStart:
        """The probe as a head. It depends on nothing that trials differ in."""
        assert self._first is not None and self._encoder is not None
        data, vectors = self._texts.data, TextVectors(self._encoder)
        vectors(data.train_texts, self._texts.tokens.train.tokens)
        config = self._first.config
        probe, scale = full_data_probe(data, vectors, config.evaluate, seed=config.train.seed)
        return head_start(probe, scale, len(data.label_names))
