"""Vectors as a column of the bulk output: number formats, and a measure of what fewer bits lose."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.bulk.records import VectorLoss, VectorOptions

FloatArray = npt.NDArray[np.float32]

COMPARED_TEXTS = 512
"""Number of texts of a unit on which the loss of a number format is measured."""
NEIGHBOURS = 10
"""Number of nearest neighbours whose agreement is measured."""
_LARGEST_INT8 = 127
_TYPES = {"float32": pa.float32(), "float16": pa.float16(), "int8": pa.int8(), "binary": pa.uint8()}


class VectorFormat:
    """Number format of one column of vectors.

    ``float16`` rounds. ``int8`` holds ``value / limit * 127``, rounded, with the same limit for all dimensions, so
    cosines of int8 vectors are those of the vectors. ``binary`` holds the signs, 8 to a byte, most significant bit
    first, as ``quantize_embeddings(…, "ubinary")`` of sentence-transformers packs them.
    """

    def __init__(self, options: VectorOptions, *, limit: float = 1.0) -> None:
        """Choose a format.

        Args:
            options: Options of a planned job, whose width is set.
            limit: Largest absolute value that ``int8`` can express. Larger ones are clipped.
        """
        assert options.width is not None, "set when the job was planned"
        self.dtype, self.width, self.limit = options.dtype, options.width, limit

    @property
    def kind(self) -> pa.DataType:
        """Type of the column: a fixed-size list of ``width`` numbers, or of ``width / 8`` bytes for ``binary``."""
        return pa.list_(_TYPES[self.dtype], self.width // 8 if self.dtype == "binary" else self.width)

    def encode(self, vectors: FloatArray) -> npt.NDArray[Any]:
        """Turn finite vectors, float32 (texts, width), into the numbers of the column."""
        if self.dtype == "float16":
            return vectors.astype(np.float16)
        if self.dtype == "int8":
            scaled = np.rint(vectors * np.float32(_LARGEST_INT8 / self.limit))
            return np.clip(scaled, -_LARGEST_INT8, _LARGEST_INT8).astype(np.int8)
        return np.packbits(vectors > 0, axis=1) if self.dtype == "binary" else vectors

    def decode(self, numbers: npt.NDArray[Any]) -> FloatArray:
        """Turn numbers of the column back into vectors, float32 (texts, width). Signs become 1 and -1."""
        if self.dtype == "int8":
            return numbers * np.float32(self.limit / _LARGEST_INT8)
        if self.dtype == "binary":
            return np.unpackbits(numbers, axis=1).astype(np.float32) * 2 - 1
        return numbers.astype(np.float32)

    def column(self, numbers: npt.NDArray[Any], *, is_null: npt.NDArray[np.bool_]) -> pa.Array:
        """Return the column of some rows, from one buffer."""
        return pa.FixedSizeListArray.from_arrays(
            pa.array(numbers.reshape(-1)), type=self.kind, mask=pa.array(is_null) if is_null.any() else None
        )


class TextVectors:
    """The vectors of the distinct texts of a unit, from one adapter, in the format of the output."""

    def __init__(self, format: VectorFormat) -> None:
        self.format = format
        self.numbers: npt.NDArray[Any] = format.encode(np.empty((0, format.width), dtype=np.float32))
        self.finite: npt.NDArray[np.bool_] = np.empty(0, dtype=np.bool_)
        """Whether each text has a vector, (texts,)."""
        self.clipped = 0
        """Number of values beyond the limit of ``int8``."""
        self._compared: list[FloatArray] = []

    def learn(self, vectors: FloatArray) -> None:
        """Add the vectors of the new texts of a block, float32 (texts, width). Rows of NaN are no vectors."""
        finite = np.isfinite(vectors[:, 0])
        if not finite.all():
            vectors = np.where(finite[:, None], vectors, np.float32(0))
        room = COMPARED_TEXTS - sum(map(len, self._compared))
        if room > 0 and self.format.dtype != "float32":
            self._compared.append(vectors[:room][finite[:room]])
        if self.format.dtype == "int8":
            self.clipped += int((np.abs(vectors) > self.format.limit).sum())
        self.numbers = np.concatenate([self.numbers, self.format.encode(vectors)])
        self.finite = np.concatenate([self.finite, finite])

    def loss(self) -> VectorLoss:
        """Measure what the format loses, on the first texts of the unit."""
        exact = np.concatenate([np.empty((0, self.format.width), np.float32), *self._compared])
        stored = self.format.decode(self.format.encode(exact))
        stored /= np.maximum(np.linalg.norm(stored, axis=1, keepdims=True), np.finfo(np.float32).tiny)
        compared = len(exact)
        return VectorLoss(
            texts=compared,
            cosine=float((exact * stored).sum(axis=1).mean()) if compared else 1.0,
            neighbours=_shared_neighbours(exact, stored) if compared > NEIGHBOURS else None,
            clipped=self.clipped,
        )


def _shared_neighbours(exact: FloatArray, stored: FloatArray) -> float:
    """Share of each text's nearest neighbours that are the same for both kinds of vectors."""
    nearest = []
    for vectors in (exact, stored):
        similarities = vectors @ vectors.T
        np.fill_diagonal(similarities, -np.inf)
        is_near = np.zeros(similarities.shape, dtype=np.bool_)
        order = np.argsort(-similarities, axis=1, kind="stable")[:, :NEIGHBOURS]
        np.put_along_axis(is_near, order, True, axis=1)
        nearest.append(is_near)
    return float((nearest[0] & nearest[1]).sum() / (len(exact) * NEIGHBOURS))
