"""Data of pairs of texts: the sides of each pair, its similarity, and what test shares with train."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import compress

import numpy as np
from numpy.typing import NDArray

from pipeline.data.families import PairKind
from pipeline.records import MtebTask


@dataclass(frozen=True)
class PairSplit:
    """The pairs of one split."""

    columns: tuple[list[str], ...]
    """Texts of each column, of equal length: the two sides (query and passage for retrieval), then given negatives."""
    scores: NDArray[np.float64] | None
    """Similarity of each pair, 0..1, float64 (pairs,). Labels are 0.0 and 1.0. None if every pair is positive."""
    slices: dict[str, list[str]]
    """Column of ``MtebTask.slices`` -> its value for each pair. Test only."""

    def __len__(self) -> int:
        return len(self.columns[0])

    def take(self, chosen: NDArray[np.bool_]) -> PairSplit:
        """Return the pairs for which the mask is true."""
        return PairSplit(
            tuple(list(compress(column, chosen)) for column in self.columns),
            None if self.scores is None else self.scores[chosen],
            {name: list(compress(values, chosen)) for name, values in self.slices.items()},
        )


@dataclass(frozen=True)
class PairData:
    """The pairs of one task, ready for training. Texts have no prefix yet."""

    task: MtebTask
    """The task, with the revision of the data that was read."""
    kind: PairKind
    """Meaning of the pairs: graded scores, 0/1 labels, or all positive."""
    train: PairSplit
    validation: PairSplit
    """Empty if no pair can be spared."""
    test: PairSplit
    corpus: list[str]
    """Distinct passages, which every query searches: a given corpus, then those of all splits with the negatives.

    Empty for pairs with scores or labels, which are not searched."""
    pair_in_train: NDArray[np.bool_]
    """Mask of the test pairs that stand word for word in train, in either order, bool (num_test,)."""
    text_in_train: NDArray[np.bool_]
    """Mask of the test pairs of which a side also occurs in train, also as a negative, bool (num_test,)."""
    score_range: tuple[float, float] | None
    """Scores of the data that became 0 and 1. None without scores."""
    fingerprint: str
    """SHA-256 of all splits in the order of their rows, independent of the seed and of the file format."""
    test_fingerprint: str
    """SHA-256 of the test pairs and of the corpus, independent of their order."""
    notes: tuple[str, ...]
    """Warnings about valid but weak data, one sentence each."""
