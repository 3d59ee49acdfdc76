"""The part that all objectives on text vectors share: embedding a batch, widths, temperature and distillation."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.adapter.sided import Trainable
from pipeline.config import TrainConfig
from pipeline.encoder.encoder import Batch, Encoder, FloatArray
from pipeline.encoder.tokeniser import IntArray, Tokens
from pipeline.errors import ConfigError
from pipeline.objectives.batches import Inputs
from pipeline.objectives.losses import over_widths, relational_distance
from pipeline.objectives.objective import BatchLoss, Objective
from pipeline.records import SIDES

START_TEMPERATURE = 0.05
"""First value of a learned temperature."""

LEARNED_TEMPERATURES = (0.01, 1.0)
"""Smallest and largest learned temperature, so that a loss stays finite."""

# A CPU embeds this many texts at a time, of similar length, because it would spend its time on padding: a batch of 64
# queries and their passages, which are longer, takes 0.7 of the time in two passes. Fewer texts are not faster.
_TEXTS_AT_ONCE = 64

_SLICE_LENGTH_STEPS = 4  # on a GPU slices are padded to a larger step, so that their lengths have few combinations


class EmbeddingObjective(Objective):
    """An objective on the vectors of all texts of a batch. The texts of all columns are embedded together."""

    def __init__(self, tokens: Tokens, *, config: TrainConfig, has_sides: bool = False) -> None:
        """Compute nothing yet.

        Args:
            tokens: All texts of an epoch.
            config: Temperature, widths, distillation and texts per pass.
            has_sides: Whether the first text of each example has an adapter of its own.
        Raises: ConfigError: the sides cannot be compiled.
        """
        if has_sides and config.compile:
            raise ConfigError('train.compile does not work with sides = "query-passage"; remove one of the two')
        self.has_sides = has_sides
        self._tokens = tokens
        self._config = config
        self._temperature: _Temperature | None = None
        self._frozen: FloatArray | None = None

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all texts of an epoch."""
        return len(self._tokens.ids)

    @property
    def parameters(self) -> Sequence[nn.Parameter]:
        """The learned temperature, if there is one."""
        return () if self._temperature is None else (self._temperature.exponent,)

    def start(self, adapter: Trainable) -> None:
        """Create the learned temperature, and keep the vectors of the frozen encoder for the distillation.

        A new adapter has no effect yet, so its encoder gives the frozen vectors.
        """
        if self._config.temperature == "learned":
            self._temperature = _Temperature(adapter.encoder.device)
        if self._config.distillation:
            self._frozen = adapter.encoder.embed(self._tokens)

    def inputs(self, rows: IntArray, encoder: Encoder, *, length_step: int) -> Inputs:
        """Targets of the examples, the order of the texts, the frozen vectors if needed, and batches of the texts."""
        texts = self.texts_of(rows)
        num_first = len(rows) if self.has_sides else 0
        slices, order = self._slices(texts[num_first:], size=self._texts_at_once(encoder, len(texts)))
        if self.has_sides:
            first, first_order = self._slices(texts[:num_first], size=self._texts_at_once(encoder, len(texts)))
            slices, order = [*first, *slices], np.concatenate([first_order, num_first + order])
        step = length_step if len(slices) == 1 or length_step == 1 else _SLICE_LENGTH_STEPS * length_step
        arrays = [self.targets(rows), order, *(() if self._frozen is None else (self._frozen[texts],))]
        tensors = [encoder.to_device(torch.from_numpy(array)) for array in arrays]
        return *tensors, *(encoder.batch(self._tokens, part, length_step=step) for part in slices)

    def loss(self, adapter: Trainable) -> BatchLoss:
        """Mean loss over the widths, plus the distillation term.

        Raises: ConfigError: a width is larger than the encoder's.
        """
        self._check_widths(adapter.encoder)
        # Dynamic, because the batches of an epoch have many shapes.
        embed = adapter.vectors_of
        if adapter.encoder.runtime.compiled:
            embed = torch.compile(embed, dynamic=True)
        recompute = self._config.texts_per_pass is not None

        def loss(targets: Tensor, order: Tensor, *parts: Tensor | Batch) -> Tensor:
            slices = [part for part in parts if isinstance(part, Batch)]
            num_first = 0
            if self.has_sides:
                num_first = -(-len(targets) // self._texts_at_once(adapter.encoder, len(order)))
            of_sides = ((SIDES[0], slices[:num_first]), (SIDES[1], slices[num_first:]))
            vectors = torch.cat(
                [embed_slices(partial(embed, side), some, recompute=recompute) for side, some in of_sides if some]
            ).index_select(0, order)
            temperature = self._current_temperature()
            value = over_widths(
                lambda narrow: self.vector_loss(narrow, targets, temperature), vectors, widths=self._config.widths
            )
            for frozen in parts:
                if isinstance(frozen, Tensor):
                    value = value + self._config.distillation * relational_distance(vectors, frozen)
            return value

        return loss

    @abstractmethod
    def texts_of(self, rows: IntArray) -> IntArray:
        """Numbers of the texts of some examples, in the order that ``vector_loss`` expects, (texts,)."""

    @abstractmethod
    def targets(self, rows: IntArray) -> np.ndarray:
        """Array that the vectors of some examples are compared with. It has one row per example."""

    @abstractmethod
    def vector_loss(self, vectors: Tensor, targets: Tensor, temperature: float | Tensor) -> Tensor:
        """Loss of the vectors of one batch, float32 (texts, any width), as a scalar."""

    def _texts_at_once(self, encoder: Encoder, num_texts: int) -> int:
        """Number of texts of each pass, for a batch of so many texts."""
        return self._config.texts_per_pass or (_TEXTS_AT_ONCE if encoder.device.type == "cpu" else num_texts)

    def _slices(self, texts: IntArray, *, size: int) -> tuple[list[IntArray], IntArray]:
        """Texts of each pass, of similar length, and the position of each text of the batch among them."""
        if size >= len(texts):
            return [texts], np.arange(len(texts))
        by_length = np.argsort(self._tokens.lengths[texts], kind="stable")
        return [texts[by_length[i : i + size]] for i in range(0, len(texts), size)], np.argsort(by_length)

    def _current_temperature(self) -> float | Tensor:
        if self._temperature is not None:
            return self._temperature()
        assert self._config.temperature != "learned", "start comes first"
        return self._config.temperature

    def _check_widths(self, encoder: Encoder) -> None:
        too_large = [width for width in self._config.widths if width > encoder.hidden_size]
        if too_large:
            raise ConfigError(
                f"train.widths: {max(too_large)} is larger than the {encoder.hidden_size} dimensions of the encoder's "
                "vectors; remove it"
            )


def embed_slices(embed: Callable[[Batch], Tensor], slices: Sequence[Batch], *, recompute: bool) -> Tensor:
    """Vectors of several batches, one after the other, float32 (texts, width), differentiable.

    Source of the recomputation: Gao et al. 2021, arXiv:2101.06983.

    Args:
        embed: Function from a batch to its vectors.
        slices: The batches.
        recompute: Whether to discard activations and compute them again, batch by batch, in the backward pass. Memory
            then holds the activations of one batch. The gradient is the same.
    """
    if len(slices) == 1:
        return embed(slices[0])
    if not recompute:
        return torch.cat([embed(batch) for batch in slices])
    # The frozen encoder has no dropout, so no state of the random generator needs to be kept.
    return torch.cat([checkpoint(embed, batch, use_reentrant=False, preserve_rng_state=False) for batch in slices])


class _Temperature:
    """A trained temperature, ``0.05 * exp(exponent)``. Weight decay pulls it to its first value."""

    def __init__(self, device: torch.device) -> None:
        self.exponent = nn.Parameter(torch.zeros((), device=device))
        self._range = [float(np.log(limit / START_TEMPERATURE)) for limit in LEARNED_TEMPERATURES]

    def __call__(self) -> Tensor:
        # Limited in place, because a limit inside the graph would end its gradient for ever.
        with torch.no_grad():
            self.exponent.clamp_(*self._range)
        return START_TEMPERATURE * self.exponent.exp()
