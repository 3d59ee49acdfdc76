"""Errors of the arms on labelled test pairs: how many in each slice, and which pairs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from pipeline.compare.statistics import Series, thresholds_of
from pipeline.pairs.data import PairData
from pipeline.records import Record
from pipeline.vector_scores.pair_metrics import best_threshold

_MOST_VALUES = 12


class ErrorCount(Record):
    """Errors of an arm in a slice of test."""

    arm: str
    slice: str
    slice_value: str
    num_negative: int
    """Pairs with label 0."""
    num_positive: int
    false_positives: float
    """Pairs with label 0 above the threshold, mean over the seeds."""
    false_negatives: float
    """Pairs with label 1 below the threshold, mean over the seeds."""


class WrongPair(Record):
    """A test pair on the wrong side of the threshold for most seeds of some trained arm."""

    row: int
    """Number of the test pair, from 0."""
    sentence1: str
    sentence2: str
    label: int
    slices: dict[str, str]
    wrong_arms: tuple[str, ...]
    similarity: dict[str, float]
    """Mean cosine over the seeds, by arm."""


@dataclass(frozen=True)
class PairErrors:
    """Sides of the threshold on which each arm and seed puts the labelled test pairs."""

    data: PairData
    series: Sequence[Series]

    @property
    def arms(self) -> list[str]:
        """Names of the arms, in the order of the series."""
        return list(dict.fromkeys(one.arm for one in self.series))

    @property
    def is_optimistic(self) -> bool:
        """Whether test itself chose the thresholds, because no validation pairs could."""
        return thresholds_of(self.series) is None

    @cached_property
    def labels(self) -> npt.NDArray[np.bool_]:
        """Whether each test pair has label 1, bool (pairs,)."""
        assert self.data.test.scores is not None, "labelled pairs have labels"
        return np.asarray(self.data.test.scores == 1)

    @cached_property
    def similarity(self) -> dict[str, npt.NDArray[np.float64]]:
        """Cosine of each pair, by arm, float64 (seeds, pairs)."""
        return {arm: np.stack([s.arrays["similarity"][0] for s in self.series if s.arm == arm]) for arm in self.arms}

    @cached_property
    def called(self) -> dict[str, npt.NDArray[np.bool_]]:
        """Whether each pair is called positive, by arm, bool (seeds, pairs)."""
        chosen = thresholds_of(self.series)
        if chosen is not None:
            thresholds = chosen["f1"]
        else:
            gold = self.labels.astype(np.float64)
            best = [best_threshold(gold, one.arrays["similarity"][0], metric="f1") for one in self.series]
            thresholds = np.array([np.inf if found is None else found.threshold for found in best])
        by_arm = {
            arm: np.array([t for t, one in zip(thresholds, self.series, strict=True) if one.arm == arm])
            for arm in self.arms
        }
        return {arm: self.similarity[arm] >= by_arm[arm][:, np.newaxis] for arm in self.arms}

    def counts(self) -> list[ErrorCount]:
        """Errors by slice, of the twelve most frequent values of each column."""
        found = []
        for column, values in self.data.test.slices.items():
            every = np.array(values, dtype=object)
            for value, _ in sorted(Counter(values).most_common(_MOST_VALUES)):
                chosen = every == value
                negative, positive = chosen & ~self.labels, chosen & self.labels
                found += [
                    ErrorCount(
                        arm=arm,
                        slice=column,
                        slice_value=value,
                        num_negative=int(negative.sum()),
                        num_positive=int(positive.sum()),
                        false_positives=float(self.called[arm][:, negative].sum(axis=1).mean()),
                        false_negatives=float((~self.called[arm][:, positive]).sum(axis=1).mean()),
                    )
                    for arm in self.arms
                ]
        return found

    def pairs(self) -> list[WrongPair]:
        """Pairs that some trained arm gets wrong, those that most arms get wrong first."""
        wrong = {arm: (self.called[arm] != self.labels).mean(axis=0) > 0.5 for arm in self.arms if arm != "frozen"}
        count = np.sum(list(wrong.values()), axis=0) if wrong else np.zeros(len(self.labels))
        first, second = self.data.test.columns[:2]
        return [
            WrongPair(
                row=int(row),
                sentence1=first[row],
                sentence2=second[row],
                label=int(self.labels[row]),
                slices={column: values[row] for column, values in self.data.test.slices.items()},
                wrong_arms=tuple(arm for arm, of_arm in wrong.items() if of_arm[row]),
                similarity={arm: float(found[:, row].mean()) for arm, found in self.similarity.items()},
            )
            for row in np.lexsort((np.arange(len(count)), -count))
            if count[row]
        ]
