"""Training texts as token arrays, and the batches of an epoch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from pipeline.encoder.encoder import Batch
from pipeline.encoder.tokeniser import IntArray, Tokens

_BATCHES_PER_BUCKET = 256

Inputs = tuple[Batch | Tensor, ...]
"""Tensors of one batch on the encoder's device. The first has one row per example."""


@dataclass(frozen=True)
class LabelledTokens:
    """Tokenised texts with their classes, int64 (texts,)."""

    tokens: Tokens
    labels: IntArray

    def __add__(self, other: LabelledTokens) -> LabelledTokens:
        return LabelledTokens(joined([self.tokens, other.tokens]), np.concatenate([self.labels, other.labels]))


def joined(parts: Sequence[Tokens]) -> Tokens:
    """Token ids of the texts of several parts, one after the other."""
    lengths = np.concatenate([part.lengths for part in parts])
    return Tokens(
        np.concatenate([part.ids for part in parts]),
        np.concatenate([[0], np.cumsum(lengths)]),
        np.concatenate([part.truncated for part in parts]),
    )


def chosen(tokens: Tokens, rows: IntArray) -> Tokens:
    """Token ids of some texts, in the order of their numbers in ``rows``, (texts,)."""
    lengths = tokens.lengths[rows]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    positions = np.arange(offsets[-1]) + np.repeat(tokens.offsets[rows] - offsets[:-1], lengths)
    return Tokens(tokens.ids[positions], offsets, tokens.truncated[rows])


def epoch_batches(lengths: IntArray, *, batch_size: int, order: np.random.Generator) -> Iterator[IntArray]:
    """Rows of one epoch in random batches of texts of similar length, so that there is little padding.

    Args:
        lengths: Tokens per text, (texts,).
        batch_size: Texts per batch. One batch may be smaller.
        order: Source of randomness for the batches and their order.
    """
    shuffled = order.permutation(len(lengths))
    bucket = batch_size * _BATCHES_PER_BUCKET
    batches: list[npt.NDArray[np.int64]] = []
    for start in range(0, len(shuffled), bucket):
        rows = shuffled[start : start + bucket]
        rows = rows[np.argsort(lengths[rows], kind="stable")]
        batches.extend(rows[i : i + batch_size] for i in range(0, len(rows), batch_size))
    for index in order.permutation(len(batches)):
        yield batches[index]


def token_arrays(data: LabelledTokens) -> tuple[npt.NDArray[Any], ...]:
    """Arrays of the training data: token ids, offsets and labels."""
    return data.tokens.ids, data.tokens.offsets, data.labels


def arrays_sha256(*arrays: npt.NDArray[Any]) -> str:
    """SHA-256 of the bytes of arrays."""
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()
