"""An encoder whose weights can be trained: float32 weights, and products in bfloat16 where that is faster."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.config import EncoderConfig
from pipeline.encoder.encoder import Batch, Encoder
from pipeline.encoder.files import EncoderFiles
from pipeline.records import Runtime


class TrainableEncoder(Encoder):
    """An encoder with plain layers and float32 weights that require gradients.

    Packed layers of the frozen encoder have no gradient for their weights, so they are not used. The encoder runs
    without its own dropout, like the frozen one: tests/benchmarks/EXPERIMENTS.md, "Full fine-tuning".
    """

    can_be_recorded = False  # a weight is cast at each step, and the cast's cache cannot be recorded

    def __init__(self, files: EncoderFiles, config: EncoderConfig, runtime: Runtime) -> None:
        """Load the weights in float32.

        Args:
            files: Files of the encoder.
            config: Pooling and number of tokens.
            runtime: With the dtype bfloat16, products are computed in it. Weights and their updates stay in float32.
        Raises: EncoderError: as ``Encoder``.
        """
        self._mixed = runtime.dtype == "bfloat16"
        # PyTorch's kernels: plain layers, which are not packed.
        super().__init__(files, config, runtime.changed(dtype="float32", kernels="torch", compiled=False))
        self.model.requires_grad_(True)

    def pooled(self, batch: Batch) -> Tensor:
        """Text vectors, float32 (texts, width), not normalised, differentiable."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._mixed):
            return super().pooled(batch)
