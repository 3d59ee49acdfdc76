"""Two adapters on one frozen encoder, one for each side of pairs of texts. They are trained together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from torch import Tensor, nn

from pipeline.adapter.adapter import Adapter
from pipeline.adapter.lora import LoraLinear
from pipeline.adapter.state import EncoderState
from pipeline.config import AdapterConfig
from pipeline.encoder.encoder import Batch, Encoder, FloatArray
from pipeline.encoder.tokeniser import Tokens
from pipeline.records import SIDES, Side


class SidedAdapter:
    """An adapter for queries and an adapter for passages, neither with a head. One of the two is attached at a time."""

    head: None = None
    kind_of_outputs = "vectors"
    label_names: tuple[str, ...] = ()

    def __init__(self, encoder: Encoder, config: AdapterConfig, *, seed: int = 0) -> None:
        """Create the LoRA matrices of both adapters, with equal initial weights, and attach the query adapter.

        Args:
            encoder: The frozen base.
            config: Rank, scaling and adapted layers.
            seed: Seed of the initial weights.
        Raises: AdapterError: as ``Adapter``.
        """
        self.encoder = encoder
        self.config = config
        self._attached: Side = "passage"
        made = []
        for _ in SIDES:
            made.append(Adapter(encoder, config, seed=seed))
            made[-1].detach()
        self.sides: Mapping[Side, Adapter] = dict(zip(SIDES, made, strict=True))
        self.sides[self._attached].attach()
        self.use("query")

    @classmethod
    def of(cls, encoder: Encoder, sides: Mapping[Side, Adapter]) -> SidedAdapter:
        """Join two adapters that are not attached, and attach that of the queries."""
        joined = cls.__new__(cls)
        joined.encoder, joined.config, joined.sides = encoder, sides["query"].config, sides
        joined._attached = "query"
        sides["query"].attach()
        return joined

    def use(self, side: Side) -> Adapter:
        """Attach the adapter of a side instead of the other, and return it."""
        if side != self._attached:
            self.sides[self._attached].detach()
            self.sides[side].attach()
            self._attached = side
        return self.sides[side]

    @property
    def projections(self) -> dict[str, LoraLinear]:
        """LoRA layers of both adapters, by side and module path."""
        return {
            f"{side}/{path}": lora for side, adapter in self.sides.items() for path, lora in adapter.projections.items()
        }

    @property
    def encoder_parameters(self) -> list[nn.Parameter]:
        """LoRA matrices A and B of both adapters, those of the queries first."""
        return [parameter for adapter in self.sides.values() for parameter in adapter.encoder_parameters]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All trained weights."""
        return self.encoder_parameters

    def train(self, mode: bool = True) -> None:
        """Do nothing: there is no dropout."""

    def eval(self) -> None:
        """Do nothing: there is no dropout."""

    def vectors_of(self, side: Side, batch: Batch) -> Tensor:
        """Text vectors of one side, float32 (texts, width), differentiable."""
        return self.use(side).vectors(batch)

    def embed(self, side: Side, tokens: Tokens) -> FloatArray:
        """Text vectors of one side, float32 (texts, width)."""
        self.use(side)
        return self.encoder.embed(tokens)

    def detach(self) -> None:
        """Put the encoder's own projections back in place."""
        self.sides[self._attached].detach()


AnyAdapter = Adapter | SidedAdapter
"""An adapter for all texts, or one for each side of pairs of texts."""

Trainable = EncoderState | SidedAdapter
"""Anything that the training loop can train."""

State = TypeVar("State", bound=Trainable, covariant=True)
