"""Vectors of the texts of an MTEB task, each text encoded once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.encoder.encoder import Encoder, FloatArray
from pipeline.encoder.tokeniser import Tokens


class TextVectors:
    """Vectors of texts from one state of an encoder. No text is embedded twice."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._row_of: dict[str, int] = {}
        self._vectors: FloatArray = np.empty((0, encoder.hidden_size), dtype=np.float32)

    def __call__(self, texts: Sequence[str], tokens: Tokens | None = None) -> FloatArray:
        """Vectors of texts, float32 (texts, width), not normalised. ``tokens`` are used if all texts are new."""
        new = list(dict.fromkeys(text for text in texts if text not in self._row_of))
        if new:
            reuse = tokens is not None and len(new) == len(texts)
            vectors = self._encoder.embed(tokens if reuse and tokens is not None else self._encoder.tokenise(new))
            for text in new:
                self._row_of[text] = len(self._row_of)
            self._vectors = np.concatenate([self._vectors, vectors])
        return self._vectors[[self._row_of[text] for text in texts]]

    def features(self, texts: Sequence[str]) -> FloatArray:
        """Features for classifiers, float32 (texts, width). Unit vectors if the encoder's own definition normalises."""
        vectors = self(texts)
        return normalize(vectors) if self._encoder.normalize else vectors

    @property
    def width(self) -> int:
        """Number of dimensions of a whole vector."""
        return self._encoder.hidden_size

    def unit(self, texts: Sequence[str], *, width: int | None = None) -> FloatArray:
        """Unit vectors of texts, float32 (texts, width), of all dimensions or of the leading ``width`` ones."""
        assert width is None or 1 <= width <= self.width, f"width {width} of {self.width}"
        return normalize(self(texts)[:, :width])


def normalize(vectors: FloatArray) -> FloatArray:
    """Scale vectors to length 1, float32 (texts, width)."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.maximum(lengths, 1e-12)).astype(np.float32)
