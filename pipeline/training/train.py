"""Training of one adapter for one objective."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

import torch

from pipeline.adapter.adapter import Adapter
from pipeline.adapter.description import describe_adapter
from pipeline.adapter.files import start_from
from pipeline.adapter.sided import AnyAdapter, SidedAdapter, State
from pipeline.config import AdapterConfig, TrainConfig
from pipeline.encoder.encoder import Encoder
from pipeline.objectives.objective import Objective
from pipeline.records import EpochRow, Progress, Record, SelectedOn
from pipeline.store.run_folder import TaskFolder
from pipeline.training.checkpoint import Checkpoint
from pipeline.training.loop import Loop


@dataclass(frozen=True)
class Training(Generic[State]):
    """A trained state of an encoder, such as an adapter that is still attached, with the best weights."""

    adapter: State
    epochs: tuple[EpochRow, ...]
    best_epoch: int
    """Epoch whose weights these are. 0: the start, because every epoch was below it."""
    selected_on: SelectedOn
    refitted: bool
    start_score: float | None
    """Selection score before the first epoch. None without a selection, or if the start was trained on it."""
    learnt_selection: bool
    """Whether this adapter, or one it started from, was trained on a selection. Scores on it are then optimistic."""
    selection_metric: str = "accuracy"
    """Name of the metric that selected the epoch."""
    is_finished: bool = True
    """Whether the training has ended. If not, it was paused, and its checkpoint goes on."""


AdapterTraining = Training[AnyAdapter]
"""A trained adapter, or one for each side of pairs."""


def train_adapter(
    objective: Objective,
    encoder: Encoder,
    *,
    adapter_config: AdapterConfig,
    train_config: TrainConfig,
    max_epochs: int,
    warm_start: TaskFolder | None = None,
    checkpoint: Path | None = None,
    pause_after: int | None = None,
    on_epoch: Callable[[EpochRow], None] = lambda row: None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> AdapterTraining:
    """Train LoRA pairs, and a head if the objective has labels, on a frozen encoder.

    The epoch with the best selection score is kept, or the start if it beats every epoch. The start is pairs without
    effect and the objective's head, or a saved adapter. A saved adapter that was refitted does not compete, because it
    has learnt most of the selection's examples.
    The result depends on the arguments and the encoder's runtime only. Called again after a kill, training resumes from
    the last finished epoch in ``checkpoint`` and ends with the same bits.

    Args:
        objective: Examples, loss and selection score. Without a selection, training runs for ``max_epochs``.
        encoder: The frozen base. The adapter is attached to it in place.
        adapter_config: Shape of the adapter.
        train_config: Hyperparameters of the loop.
        max_epochs: Upper limit, and length of the learning-rate schedule.
        warm_start: A saved adapter to start from. It overrides the objective's start for the labels that it knows.
        checkpoint: File that is rewritten after every epoch.
        pause_after: Number of epochs after which to pause, earlier calls included. None: train to the end.
        on_epoch: Called after every epoch.
        on_progress: Called after every few steps.
    Raises:
        ResumeError: the checkpoint was made under other conditions.
        LorafleetError: the loss or the selection score is not a number.
    """

    def attach() -> AnyAdapter:
        if objective.has_sides:
            return SidedAdapter(encoder, adapter_config, seed=train_config.seed)
        return Adapter(encoder, adapter_config, objective.label_names, seed=train_config.seed)

    def begin(adapter: AnyAdapter) -> None:
        if warm_start is not None:
            starting = adapter.sides.values() if isinstance(adapter, SidedAdapter) else (adapter,)
            for one, folder in zip(starting, warm_start.adapters, strict=True):
                start_from(one, folder)

    return train_state(
        objective,
        attach,
        begin=begin,
        conditions=train_conditions(train_config, adapter_config, encoder),
        train_config=train_config,
        max_epochs=max_epochs,
        start_knows=warm_start is not None and describe_adapter(warm_start.adapters[0]).meta.learnt_validation,
        checkpoint=checkpoint,
        pause_after=pause_after,
        on_epoch=on_epoch,
        on_progress=on_progress,
    )


def train_state(
    objective: Objective,
    make: Callable[[], State],
    *,
    begin: Callable[[State], None] | None = None,
    conditions: dict[str, Any],
    train_config: TrainConfig,
    max_epochs: int,
    start_knows: bool = False,
    checkpoint: Path | None = None,
    pause_after: int | None = None,
    on_epoch: Callable[[EpochRow], None] = lambda row: None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Training[State]:
    """Train any state of an encoder, as ``train_adapter`` trains adapters.

    Args:
        objective: Examples, loss and selection score.
        make: Makes the state with its initial weights. Called again for a refit, once the first state is detached.
        begin: Replaces weights after the objective's start. None: nothing more.
        conditions: Settings of the state that must be unchanged in a resumed training.
        train_config: Hyperparameters of the loop.
        max_epochs: Upper limit, and length of the learning-rate schedule.
        start_knows: Whether the start was trained on the selection, so that it does not compete.
        checkpoint: File that is rewritten after every epoch.
        pause_after: As for ``train_adapter``.
        on_epoch: Called after every epoch.
        on_progress: Called after every few steps.
    Raises: ResumeError, LorafleetError: as ``train_adapter``.
    """
    conditions = conditions | {"max_epochs": max_epochs} | objective.conditions()

    def make_loop(objective: Objective, path: Path | None, *, stop_after: int | None = None) -> Loop[State]:
        state = make()
        objective.start(state)
        if begin is not None:
            begin(state)
        file = Checkpoint(path, conditions) if path else None
        return Loop(state, objective, train_config, max_epochs, file, on_progress, stop_after=stop_after)

    loop = make_loop(objective, checkpoint)
    _run(loop, on_epoch, start_knows=start_knows, pause_after=pause_after)
    state = loop.state
    rows = [row.changed(is_best=row.epoch == state.best_epoch) for row in state.epochs]
    # A refit of zero epochs would return the same start.
    refit = train_config.refit and objective.has_selection and state.best_epoch > 0 and state.finished
    if refit:
        loop.adapter.detach()
        path = checkpoint.with_suffix(".refit") if checkpoint else None
        loop = make_loop(objective.with_selection(), path, stop_after=state.best_epoch)
        _run(loop, on_epoch)
        rows += [row.changed(epoch=len(state.epochs) + row.epoch, is_best=False) for row in loop.state.epochs]
    loop.adapter.eval()
    return Training(
        loop.adapter,
        tuple(rows),
        state.best_epoch,
        train_config.early_stopping_split if objective.has_selection else "last_epoch",
        refit,
        state.start_score,
        refit or state.start_knows,
        objective.selection_metric,
        state.finished,
    )


def _run(loop: Loop[State], on_epoch: Callable[[EpochRow], None], **options: Any) -> None:
    """Run a loop. If it fails, the encoder is left without the state, so that another training can use it."""
    try:
        loop.run(on_epoch, **options)
    except BaseException:
        loop.adapter.detach()
        raise


def train_conditions(train_config: TrainConfig, adapter_config: AdapterConfig, encoder: Encoder) -> dict[str, Any]:
    """Settings that must be unchanged in a resumed training, besides those of its objective."""
    parts: dict[str, Record] = {"train": train_config, "adapter": adapter_config, "runtime": encoder.runtime}
    settings = {
        f"{part}.{key}": value
        for part, record in parts.items()
        for key, value in record.model_dump(mode="json").items()
    }
    del settings["train.max_epochs"]  # only a default for the number of epochs of this training
    del settings["train.warm_start"]  # the checkpoint holds all weights, whatever was published since
    return settings | {"encoder": encoder.ref.revision, "pooling": encoder.config.pooling, "torch": torch.__version__}
