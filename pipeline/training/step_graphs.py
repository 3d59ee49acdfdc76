"""Training steps on a GPU, recorded as CUDA graphs once per batch shape and then replayed.

A step of a small encoder on short texts consists of about a thousand short kernels. Launching them from Python takes
several times longer than running them. On an H100, replaying trains 5.7 times as fast:
tests/benchmarks/EXPERIMENTS.md, "On a GPU".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.encoder.encoder import Batch, Encoder
from pipeline.objectives.batches import Inputs

LENGTH_STEP = 8
"""Batches are padded to a multiple of this many tokens, so that an epoch has few shapes."""

RECORDABLE = frozenset({"bert", "distilbert", "electra", "eurobert", "modernbert", "roberta", "xlm-roberta"})
"""Model types whose replayed steps were compared with launched ones in tests/test_devices.py.

Others may copy from the host within a step, which cannot be recorded."""

Step = Callable[..., Tensor]
"""Function that trains on the ``Inputs`` of one batch and returns the loss."""


def is_recordable(encoder: Encoder) -> bool:
    """Whether steps on an encoder can be replayed: on a GPU, not compiled, of a tested architecture."""
    is_tested = encoder.model.config.model_type in RECORDABLE
    on_gpu = encoder.device.type == "cuda"
    return is_tested and on_gpu and encoder.can_be_recorded and not encoder.runtime.compiled


class StepGraphs:
    """A training step that is recorded for each shape of a full batch. The few smaller batches are launched."""

    def __init__(self, step: Step, *, batch_size: int, state: Sequence[Tensor]) -> None:
        """Record nothing yet.

        Args:
            step: Step to record. It may change nothing but tensors on the GPU, in place.
            batch_size: Number of examples in a full batch.
            state: Tensors that the step changes and the next step depends on.
        """
        self._step = step
        self._batch_size = batch_size
        self._state = state
        self._recorded: dict[tuple[torch.Size, ...], _Recorded] = {}
        self._stream = torch.cuda.Stream()
        self._memory = torch.cuda.graph_pool_handle()  # shared by all graphs, because they never run at the same time

    def __call__(self, *inputs: Batch | Tensor) -> Tensor:
        """Take a step, and return its loss."""
        tensors = _tensors(inputs)
        if len(tensors[0]) != self._batch_size:
            return self._step(*inputs)
        shapes = tuple(tensor.shape for tensor in tensors)
        if shapes not in self._recorded:
            self._recorded[shapes] = self._record(inputs)
        recorded = self._recorded[shapes]
        for kept, tensor in zip(_tensors(recorded.inputs), tensors, strict=True):
            kept.copy_(tensor)
        recorded.graph.replay()
        return recorded.loss.clone()

    def _record(self, inputs: Inputs) -> _Recorded:
        inputs = tuple(_clone(part) for part in inputs)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._try_out(inputs)
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(pool=self._memory, capture_error_mode="thread_local")
            try:
                loss = self._step(*inputs)
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._stream)
        return _Recorded(inputs, loss, graph)

    def _try_out(self, inputs: Inputs) -> None:
        """Take a step and undo it, because libraries initialise in their first call, which cannot be recorded."""
        previous = [tensor.detach().clone() for tensor in self._state]
        with torch.random.fork_rng(devices=[torch.cuda.current_device()]):
            self._step(*inputs)
        with torch.no_grad():
            for tensor, value in zip(self._state, previous, strict=True):
                tensor.copy_(value)


def _tensors(inputs: Inputs) -> list[Tensor]:
    return [tensor for part in inputs for tensor in ((part.ids, part.mask) if isinstance(part, Batch) else (part,))]


def _clone(part: Batch | Tensor) -> Batch | Tensor:
    return Batch(part.ids.clone(), part.mask.clone()) if isinstance(part, Batch) else part.clone()


@dataclass(frozen=True)
class _Recorded:
    """A CUDA graph, with the tensors that it reads and writes."""

    inputs: Inputs
    loss: Tensor
    graph: torch.cuda.CUDAGraph
