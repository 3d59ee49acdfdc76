"""The training loop: steps, epochs, selection of the best epoch, checkpoints. Independent of the objective."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable
from typing import Generic

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.adapter.sided import State
from pipeline.config import TrainConfig
from pipeline.encoder.encoder import Batch
from pipeline.encoder.tokeniser import IntArray
from pipeline.errors import DivergedError
from pipeline.objectives.objective import Objective
from pipeline.records import EpochRow, Progress
from pipeline.training.checkpoint import Checkpoint, LoopState
from pipeline.training.flat_weights import WorkingCopy, flatten
from pipeline.training.step_graphs import LENGTH_STEP, Step, StepGraphs, is_recordable

_STEPS_PER_REPORT = 20


class Loop(Generic[State]):
    """Repeated passes over the training examples."""

    def __init__(
        self,
        adapter: State,
        objective: Objective,
        config: TrainConfig,
        max_epochs: int,
        checkpoint: Checkpoint | None,
        on_progress: Callable[[Progress], None],
        *,
        stop_after: int | None = None,
    ) -> None:
        self.adapter = adapter
        self.objective = objective
        self.config = config
        self.max_epochs = max_epochs
        self.stop_after = stop_after or max_epochs
        self.checkpoint = checkpoint
        self.on_progress = on_progress
        self.state = LoopState()
        self.weights = flatten([*adapter.parameters, *objective.parameters])
        # Weights that are no LoRA pairs are trained where they are.
        self.working = WorkingCopy(adapter, self.weights) if adapter.projections else None
        self.best = self.weights.detach().clone()
        self.optimizer = _optimizer(self.weights, config)
        self.steps_per_epoch = math.ceil(objective.num_examples / config.batch_size)
        self.loss = objective.loss(adapter)
        self.learn: Step = self._learn
        self.length_step = 1
        if is_recordable(adapter.encoder):
            state = [self.weights, *self.optimizer.state[self.weights].values()]
            self.learn, self.length_step = (
                StepGraphs(self._learn, batch_size=config.batch_size, state=state),
                LENGTH_STEP,
            )

    def run(
        self, on_epoch: Callable[[EpochRow], None], *, start_knows: bool = False, pause_after: int | None = None
    ) -> None:
        """Train until the last epoch or until patience ends, then put the best weights in place.

        Args:
            on_epoch: Called after every epoch.
            pause_after: Epoch to stop after, with a checkpoint that a later call goes on from.
            start_knows: Whether the start was trained on the selection, so that it does not compete. A resumed
                training uses the value that it was started with.
        """
        self._resume()
        selects = self.objective.has_selection
        if not self.state.epochs:
            self.state.start_knows = start_knows
            if selects and not start_knows:
                self.state.start_score = self.state.best_score = self._score(epoch=0)
        while not self.state.finished and (pause_after is None or len(self.state.epochs) < pause_after):
            epoch = len(self.state.epochs) + 1
            row = self._epoch(epoch)
            score = self._score(epoch) if selects else None
            if score is None or score > self.state.best_score:
                self.state.last_gain = epoch
            # The latest of equal scores wins, also over the start. Small data have many ties, and this worked best:
            # tests/benchmarks/EXPERIMENTS.md, "Which epoch".
            is_best = score is None or score >= self.state.best_score
            if is_best:
                self.best.copy_(self.weights.detach())
                self.state.best_epoch = epoch
                self.state.best_score = -math.inf if score is None else score
            row = row.changed(is_best=is_best, **self.objective.epoch_fields(score))
            self.state.epochs.append(row)
            patience_ends = epoch - self.state.last_gain >= self.config.patience
            self.state.finished = epoch >= self.stop_after or (selects and patience_ends)
            self._save()
            on_epoch(row)
        with torch.no_grad():
            self.weights.copy_(self.best)

    def _score(self, epoch: int) -> float:
        score = self.objective.score(self.adapter)
        if math.isnan(score):
            raise DivergedError(
                f"training diverged in epoch {epoch}: {self.objective.selection_metric} is not a number; "
                "lower train.learning_rate"
            )
        return score

    def _epoch(self, epoch: int) -> EpochRow:
        # Order and dropout follow from (seed, epoch) alone, so a resume needs no saved generator state.
        torch.manual_seed(int(np.random.SeedSequence([self.config.seed, epoch]).generate_state(1)[0]))
        order = np.random.default_rng([self.config.seed, epoch])
        self.adapter.train()
        if self.working is not None:
            self.working.attach()
        start = time.perf_counter()
        losses: list[Tensor] = []
        for rows in self.objective.batches(batch_size=self.config.batch_size, order=order):
            losses.append(self._step(rows))
            if len(losses) % _STEPS_PER_REPORT == 0:
                self._report(epoch, len(losses), losses[-1], time.perf_counter() - start)
        train_loss = float(torch.stack(losses).mean())  # waits for the device, so the time below is complete
        seconds = time.perf_counter() - start
        _check_finite(train_loss, epoch)
        if self.working is not None:
            self.working.detach()
        self.adapter.eval()
        return EpochRow(
            epoch=epoch,
            train_loss=train_loss,
            learning_rate=float(self.optimizer.param_groups[0]["lr"]),
            texts_per_second=self.objective.num_examples / seconds,
            tokens_per_second=self.objective.num_tokens / seconds,
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
        steps = self.max_epochs * self.steps_per_epoch
        _set_learning_rate(self.optimizer, _cosine(self.config.learning_rate, self.state.steps, steps))
        self.state.steps += 1
        return self.learn(*self.objective.inputs(rows, self.adapter.encoder, length_step=self.length_step))

    def _learn(self, *inputs: Batch | Tensor) -> Tensor:
        if self.working is not None:
            self.working.refresh()
        loss = self.loss(*inputs)
        assert self.weights.grad is not None
        self.weights.grad.zero_()
        loss.backward()
        if self.working is not None:
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


def _optimizer(weights: nn.Parameter, config: TrainConfig) -> torch.optim.AdamW:
    """Make an AdamW with allocated moments. On a GPU the learning rate is a tensor, which recorded steps read."""
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
    """Peak memory so far: of the GPU if one is used, of this process otherwise."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated() > 0:
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _cosine(peak: float, step: int, steps: int) -> float:
    return peak * (1 + math.cos(math.pi * step / steps)) / 2


def _check_finite(loss: float, epoch: int) -> None:
    if not math.isfinite(loss):
        raise DivergedError(f"training diverged in epoch {epoch}: loss {loss}; lower train.learning_rate")
