"""Train one adapter on one MTEB task. Knows nothing of Prefect, Ray or the Hub."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.adapter.adapter import Adapter, HeadStart
from pipeline.adapter.description import describe_adapter
from pipeline.adapter.files import start_from
from pipeline.config import AdapterConfig, TrainConfig
from pipeline.encoder.encoder import Batch, Encoder
from pipeline.encoder.tokeniser import IntArray
from pipeline.errors import LorafleetError
from pipeline.records import EpochRow, Progress, Record, SelectedOn
from pipeline.store.run_folder import TaskFolder
from pipeline.training.batches import LabelledTokens, arrays_sha256, epoch_batches, token_arrays
from pipeline.training.checkpoint import Checkpoint, LoopState
from pipeline.training.flat_weights import WorkingCopy, flatten
from pipeline.training.step_graphs import LENGTH_STEP, Step, StepGraphs, is_recordable

_STEPS_PER_REPORT = 20


@dataclass(frozen=True)
class Training:
    """What training an adapter gave; the adapter itself is still attached to its encoder, with the best weights."""

    adapter: Adapter
    epochs: tuple[EpochRow, ...]
    best_epoch: int
    """0: every epoch was below the start, whose weights these are."""
    selected_on: SelectedOn
    refitted: bool
    start_score: float | None
    """Accuracy on ``selection`` before the first epoch; none without a selection, or where the start has learnt it."""
    learnt_selection: bool
    """Whether this adapter, or one that it started from, has learnt the texts of a selection, so that scores on them flatter it."""


def train_adapter(
    train: LabelledTokens,
    selection: LabelledTokens | None,
    encoder: Encoder,
    *,
    label_names: Sequence[str],
    adapter_config: AdapterConfig,
    train_config: TrainConfig,
    max_epochs: int,
    head_start: HeadStart | None = None,
    warm_start: TaskFolder | None = None,
    checkpoint: Path | None = None,
    on_epoch: Callable[[EpochRow], None] = lambda row: None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Training:
    """Train LoRA pairs and a head on a frozen encoder; keep the epoch that is best on ``selection``, or the start if all are below it.

    The start is what the first epoch begins with: pairs without effect and the given or a random head, or a saved adapter.
    A saved adapter that was refitted does not compete: it knows most of the selection's texts by heart.
    The result depends on the arguments and the encoder's runtime only: started again after a kill, training goes on
    from the last finished epoch in ``checkpoint`` and ends with the same bits.

    Args:
        train: What is learnt from.
        selection: What chooses the epoch; none trains for ``max_epochs`` and keeps the last.
        encoder: The frozen base; the adapter is attached to it in place.
        label_names: The classes, in the order of the labels' numbers.
        adapter_config: Shape of the adapter.
        train_config: The loop's hyperparameters.
        max_epochs: Upper limit, and length of the learning-rate schedule.
        head_start: Initial weights of the head; random where left out.
        warm_start: A saved adapter to go on from; its head knows better than ``head_start`` wherever it knows the label.
        checkpoint: File that is rewritten after every epoch.
        on_epoch: Called after every epoch.
        on_progress: Called after every few steps.
    Raises:
        ResumeError: the checkpoint was made under other conditions.
        LorafleetError: the loss is no longer a number.
    """
    conditions = _conditions(train_config, adapter_config, encoder) | {
        "max_epochs": max_epochs,
        "label names": list(label_names),
        "training texts": arrays_sha256(*token_arrays(train)),
        "selection texts": arrays_sha256(*token_arrays(selection)) if selection is not None else None,
        "head start": arrays_sha256(head_start.weight, head_start.bias) if head_start is not None else None,
    }

    def fresh_loop(data: LabelledTokens, path: Path | None, *, stop_after: int | None = None) -> _Loop:
        adapter = Adapter(encoder, adapter_config, label_names, seed=train_config.seed)
        if head_start is not None:
            adapter.start_head(head_start)
        if warm_start is not None:
            start_from(adapter, warm_start)
        file = Checkpoint(path, conditions) if path else None
        return _Loop(adapter, data, train_config, max_epochs, file, on_progress, stop_after=stop_after)

    start_knows = warm_start is not None and describe_adapter(warm_start).meta.learnt_validation
    loop = fresh_loop(train, checkpoint)
    loop.run(selection, on_epoch, start_knows=start_knows)
    state, rows = loop.state, [_changed(row, is_best=row.epoch == loop.state.best_epoch) for row in loop.state.epochs]
    refit = (
        train_config.refit and selection is not None and state.best_epoch > 0
    )  # zero epochs on more texts are the same start
    if refit:
        assert selection is not None
        loop.adapter.detach()
        loop = fresh_loop(
            train + selection, checkpoint.with_suffix(".refit") if checkpoint else None, stop_after=state.best_epoch
        )
        loop.run(None, on_epoch)
        rows += [_changed(row, epoch=len(state.epochs) + row.epoch, is_best=False) for row in loop.state.epochs]
    loop.adapter.head.eval()
    selected_on: SelectedOn = train_config.early_stopping_split if selection is not None else "last_epoch"
    return Training(
        loop.adapter, tuple(rows), state.best_epoch, selected_on, refit, state.start_score, refit or state.start_knows
    )


class _Loop:
    """One pass after another over the training texts."""

    def __init__(
        self,
        adapter: Adapter,
        train: LabelledTokens,
        config: TrainConfig,
        max_epochs: int,
        checkpoint: Checkpoint | None,
        on_progress: Callable[[Progress], None],
        *,
        stop_after: int | None = None,
    ) -> None:
        self.adapter = adapter
        self.train = train
        self.config = config
        self.max_epochs = max_epochs
        self.stop_after = stop_after or max_epochs
        self.checkpoint = checkpoint
        self.on_progress = on_progress
        self.state = LoopState()
        self.weights = flatten(adapter.parameters)
        self.working = WorkingCopy(adapter, self.weights)
        self.best = self.weights.detach().clone()
        self.optimizer = _optimizer(self.weights, config)
        self.steps_per_epoch = math.ceil(len(train.labels) / config.batch_size)
        # Any batch size and length: texts of an epoch come in many shapes.
        self.logits = (
            torch.compile(adapter.logits, dynamic=True) if adapter.encoder.runtime.compiled else adapter.logits
        )
        self.class_weights = _class_weights(train.labels, len(adapter.label_names), config).to(adapter.encoder.device)
        self.learn: Step = self._learn
        self.length_step = 1
        if is_recordable(adapter.encoder):
            state = [self.weights, *self.optimizer.state[self.weights].values()]
            self.learn, self.length_step = (
                StepGraphs(self._learn, batch_size=config.batch_size, state=state),
                LENGTH_STEP,
            )

    def run(
        self, selection: LabelledTokens | None, on_epoch: Callable[[EpochRow], None], *, start_knows: bool = False
    ) -> None:
        """Train until the last epoch or until patience ends, then put the best weights in place.

        Args:
            start_knows: The start has learnt the selection, so it does not compete. Of a training that is resumed, its own start counts.
        """
        self._resume()
        if not self.state.epochs:
            self.state.start_knows = start_knows
        if selection is not None and not self.state.start_knows and not self.state.epochs:
            self.state.start_score = self.state.best_score = accuracy(self.adapter, selection)
        while not self.state.finished:
            epoch = len(self.state.epochs) + 1
            row = self._epoch(epoch)
            score = accuracy(self.adapter, selection) if selection is not None else None
            if score is None or score > self.state.best_score:
                self.state.last_gain = epoch
            # Of equal scores the latest epoch, also against the start: measured best on small data, where ties are frequent
            # (tests/benchmarks/EXPERIMENTS.md, "Which epoch").
            is_best = score is None or score >= self.state.best_score
            if is_best:
                self.best.copy_(self.weights.detach())
                self.state.best_epoch, self.state.best_score = epoch, score if score is not None else 0.0
            row = _changed(row, validation_accuracy=score, is_best=is_best)
            self.state.epochs.append(row)
            patience_ends = epoch - self.state.last_gain >= self.config.patience
            self.state.finished = epoch >= self.stop_after or (selection is not None and patience_ends)
            self._save()
            on_epoch(row)
        with torch.no_grad():
            self.weights.copy_(self.best)

    def _epoch(self, epoch: int) -> EpochRow:
        # Order and dropout follow from (seed, epoch) alone, so a resume needs no saved generator state.
        torch.manual_seed(int(np.random.SeedSequence([self.config.seed, epoch]).generate_state(1)[0]))
        order = np.random.default_rng([self.config.seed, epoch])
        self.adapter.head.train()
        self.working.attach()
        start = time.perf_counter()
        losses: list[Tensor] = []
        for rows in epoch_batches(self.train.tokens.lengths, batch_size=self.config.batch_size, order=order):
            losses.append(self._step(rows))
            if len(losses) % _STEPS_PER_REPORT == 0:
                self._report(epoch, len(losses), losses[-1], time.perf_counter() - start)
        train_loss = float(torch.stack(losses).mean())  # waits for the device, so the time below is complete
        seconds = time.perf_counter() - start
        _check_finite(train_loss, epoch)
        self.working.detach()
        self.adapter.head.eval()
        return EpochRow(
            epoch=epoch,
            train_loss=train_loss,
            validation_accuracy=None,
            learning_rate=float(self.optimizer.param_groups[0]["lr"]),
            texts_per_second=len(self.train.labels) / seconds,
            tokens_per_second=len(self.train.tokens.ids) / seconds,
            seconds=seconds,
            peak_memory_bytes=peak_memory_bytes(),
            is_best=False,
        )

    def _report(self, epoch: int, step: int, loss: Tensor, seconds: float) -> None:
        _check_finite(float(loss), epoch)
        self.on_progress(
            Progress(
                epoch=epoch,
                max_epochs=self.stop_after,
                step=step,
                num_steps=self.steps_per_epoch,
                train_loss=float(loss),
                texts_per_second=step * self.config.batch_size / seconds,
            )
        )

    def _step(self, rows: IntArray) -> Tensor:
        encoder = self.adapter.encoder
        labels = encoder.to_device(torch.from_numpy(self.train.labels[rows]))
        _set_learning_rate(
            self.optimizer, _cosine(self.config.learning_rate, self.state.steps, self.max_epochs * self.steps_per_epoch)
        )
        self.state.steps += 1
        return self.learn(encoder.batch(self.train.tokens, rows, length_step=self.length_step), labels)

    def _learn(self, batch: Batch, labels: Tensor) -> Tensor:
        self.working.refresh()
        logits = self.logits(batch)
        loss = _cross_entropy(logits, labels, self.class_weights, smoothing=self.config.label_smoothing)
        assert self.weights.grad is not None
        self.weights.grad.zero_()
        loss.backward()
        self.working.collect_gradients()
        nn.utils.clip_grad_norm_([self.weights], self.config.gradient_clip)
        self.optimizer.step()
        return loss.detach()

    def _save(self) -> None:
        if self.checkpoint is None:
            return
        moments = self.optimizer.state[self.weights]
        tensors = {
            "weights": self.weights.detach(),
            "best": self.best,
            "first_moment": moments["exp_avg"],
            "second_moment": moments["exp_avg_sq"],
            "optimizer_steps": moments["step"].reshape(1),
        }
        self.checkpoint.write(tensors, self.state)

    def _resume(self) -> None:
        saved = self.checkpoint.read() if self.checkpoint else None
        if saved is None:
            return
        tensors, self.state = saved
        moments = self.optimizer.state[self.weights]
        with torch.no_grad():
            self.weights.copy_(tensors["weights"])
            self.best.copy_(tensors["best"])
            moments["step"].copy_(tensors["optimizer_steps"].reshape(()))
            moments["exp_avg"].copy_(tensors["first_moment"])
            moments["exp_avg_sq"].copy_(tensors["second_moment"])


def accuracy(adapter: Adapter, data: LabelledTokens) -> float:
    """Share of the texts that the adapter's head labels rightly, 0..1."""
    logits = adapter.logits_of_vectors(adapter.encoder.embed(data.tokens))
    return float((logits.argmax(axis=1) == data.labels).mean())


def _cross_entropy(logits: Tensor, labels: Tensor, class_weights: Tensor, *, smoothing: float) -> Tensor:
    """``torch.nn.functional.cross_entropy`` with label smoothing, but without its look at which labels count: that waits for the GPU."""
    log_probabilities = logits.log_softmax(dim=1)
    loss = nn.functional.nll_loss(log_probabilities, labels, class_weights)
    if not smoothing:
        return loss
    spread = -(log_probabilities * class_weights).sum() / class_weights[labels].sum()
    return (1 - smoothing) * loss + smoothing / logits.shape[1] * spread


def _optimizer(weights: nn.Parameter, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with its moments in place; on a GPU with the learning rate there too, where a recorded step reads it."""
    on_gpu = weights.is_cuda
    rate = torch.tensor(config.learning_rate, device=weights.device) if on_gpu else config.learning_rate
    optimizer = torch.optim.AdamW([weights], lr=rate, weight_decay=config.weight_decay, fused=True, capturable=on_gpu)
    optimizer.state[weights] = {
        "step": torch.zeros((), device=weights.device),
        "exp_avg": torch.zeros_like(weights, requires_grad=False),
        "exp_avg_sq": torch.zeros_like(weights, requires_grad=False),
    }
    return optimizer


def _set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    group = optimizer.param_groups[0]
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def peak_memory_bytes() -> int:
    """Most memory so far: of the GPU where there is one in use, of this process otherwise."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated() > 0:
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _class_weights(labels: IntArray, num_classes: int, config: TrainConfig) -> Tensor:
    """float32 (classes,); of mean 1 over the texts."""
    if config.class_weights == "none":
        return torch.ones(num_classes)
    counts = np.bincount(labels, minlength=num_classes)
    return torch.from_numpy((len(labels) / (num_classes * np.maximum(counts, 1))).astype(np.float32))


def _cosine(peak: float, step: int, steps: int) -> float:
    return peak * (1 + math.cos(math.pi * step / steps)) / 2


def _check_finite(loss: float, epoch: int) -> None:
    if not math.isfinite(loss):
        raise LorafleetError(f"training diverged in epoch {epoch}: loss {loss}; lower train.learning_rate")


def _changed(row: EpochRow, **values: Any) -> EpochRow:
    return EpochRow.model_validate(row.model_dump() | values)


def _conditions(train_config: TrainConfig, adapter_config: AdapterConfig, encoder: Encoder) -> dict[str, Any]:
    """What a resume must find unchanged, besides the data."""
    parts: dict[str, Record] = {"train": train_config, "adapter": adapter_config, "runtime": encoder.runtime}
    settings = {
        f"{part}.{key}": value
        for part, record in parts.items()
        for key, value in record.model_dump(mode="json").items()
    }
    del settings["train.max_epochs"]  # a default for others; what counts here is this training's own number
    del settings["train.warm_start"]  # what was begun holds all weights, whatever has been published since
    return settings | {"encoder": encoder.ref.revision, "pooling": encoder.config.pooling, "torch": torch.__version__}
