"""A linear map on the vectors of the frozen encoder, trained on vectors that are computed once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.adapter.state import EncoderState, new_head
from pipeline.encoder.encoder import Batch, Encoder
from pipeline.encoder.tokeniser import Tokens


class VectorTable(Encoder):
    """Vectors of the frozen encoder behind the interface of an encoder. The only token of a text is its row number.

    A text is embedded when it is tokenised for the first time. After that, a batch costs a look-up and the linear map.
    """

    def __init__(self, encoder: Encoder) -> None:
        """Start with an empty table and no map.

        Args:
            encoder: The frozen encoder.
        """
        self.frozen = encoder
        self.ref, self.config, self.runtime, self.device = encoder.ref, encoder.config, encoder.runtime, encoder.device
        self.model, self.tokenizer = encoder.model, encoder.tokenizer
        self.normalize, self.hidden_size, self.pad_id = encoder.normalize, encoder.hidden_size, 0
        self.map: nn.Linear | None = None
        self._row_of: dict[str, int] = {}
        self._table = torch.empty((0, self.hidden_size), device=self.device)
        self._truncated = np.empty(0, dtype=np.bool_)

    def tokenise(self, texts: Sequence[str]) -> Tokens:
        """Row number of each text. New texts are embedded."""
        new = list(dict.fromkeys(text for text in texts if text not in self._row_of))
        if new:
            tokens = self.frozen.tokenise(new)
            vectors = torch.from_numpy(self.frozen.embed(tokens)).to(self.device)
            self._table = torch.cat([self._table, vectors])
            self._truncated = np.concatenate([self._truncated, tokens.truncated])
            self._row_of |= {text: len(self._row_of) + number for number, text in enumerate(new)}
        rows = np.array([self._row_of[text] for text in texts], dtype=np.int32)
        return Tokens(rows, np.arange(len(rows) + 1), self._truncated[rows])

    def pooled(self, batch: Batch) -> Tensor:
        """Mapped vectors, float32 (texts, width), differentiable in the map."""
        vectors = self._table[batch.ids[:, 0]]
        return vectors if self.map is None else self.map(vectors)


class LinearMap(EncoderState):
    """A square matrix on the vectors of the frozen encoder, with or without the head of a classifier.

    It starts as the identity, so a new map has no effect.
    """

    def __init__(
        self, encoder: VectorTable, label_names: Sequence[str] | None = None, *, dropout: float = 0.0, seed: int = 0
    ) -> None:
        """Attach a new map to the table in place, and make a head.

        Args:
            encoder: Vectors of the frozen encoder.
            label_names: Classes of the head. None: no head.
            dropout: Dropout probability before the head.
            seed: Seed of the head's initial weights.
        """
        self.encoder: VectorTable = encoder
        self.map = nn.Linear(encoder.hidden_size, encoder.hidden_size, bias=False, device=encoder.device)
        nn.init.eye_(self.map.weight)
        encoder.map = self.map
        self.head = new_head(encoder, label_names, dropout=dropout, generator=torch.Generator().manual_seed(seed))

    @property
    def encoder_parameters(self) -> list[nn.Parameter]:
        """The matrix, (width, width)."""
        return list(self.map.parameters())

    def detach(self) -> None:
        """Take the map off the table."""
        self.encoder.map = None
