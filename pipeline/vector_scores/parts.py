"""Parts of a test set for which scores are given: all of it, what shares nothing with train, and slices."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pipeline.data.dataset import TaskData
from pipeline.data.notes import some_names
from pipeline.evaluation.scores import Bools, Ints
from pipeline.pairs.data import PairData
from pipeline.pairs.filled_tasks import search_data
from pipeline.vector_scores.resampling import text_groups

FEWEST_ITEMS = 20
"""Number of pairs, queries or texts below which a part of the test set has no score."""


@dataclass(frozen=True)
class Part:
    """Some items of the test set."""

    slice: str | None
    """Property that the items share. None: all items."""
    slice_value: str | None
    mask: Bools
    """Whether each item belongs to the part, bool (items,)."""
    is_user_slice: bool = False

    @property
    def num_items(self) -> int:
        """Number of items in the part."""
        return int(self.mask.sum())


@dataclass(frozen=True)
class PartsOfTest:
    """The items of a test set: pairs, queries of a search, or texts."""

    groups: Ints
    """Group of texts that each item belongs to, int (items,); see ``text_groups``."""
    parts: tuple[Part, ...]
    """Parts with a score. All items come first."""
    notes: tuple[str, ...]
    """Names of parts without a score, one sentence per property."""


def parts_of_test(data: PairData | TaskData) -> PartsOfTest:
    """Divide the test set of a task.

    A query counts as seen in train if one of its pairs does, and for each value of a slice that one of its pairs has.
    """
    if isinstance(data, TaskData):
        groups = text_groups([data.test_texts])
        found = [Part("text_in_train", "no", ~data.test_in_train)]
    else:
        item_of_pair = _item_of_pair(data)
        groups = np.zeros(item_of_pair.max() + 1, dtype=np.int64)
        groups[item_of_pair] = text_groups(data.test.columns[:2])
        found = list(_parts_of_pairs(data, item_of_pair))
    everything = Part(None, None, np.ones(len(groups), dtype=np.bool_))
    kept = [part for part in found if part.num_items >= FEWEST_ITEMS]
    small = [(p.slice or "", p.slice_value or "", p.num_items) for p in found if p.num_items < FEWEST_ITEMS]
    if isinstance(data, PairData):
        small += _rare_values(data)
    return PartsOfTest(groups, (everything, *kept), tuple(_notes(small)))


def _item_of_pair(data: PairData) -> Ints:
    return search_data(data).query_of_pair if data.kind == "positives" else np.arange(len(data.test))


def _parts_of_pairs(data: PairData, item_of_pair: Ints) -> Iterator[Part]:
    num_items = int(item_of_pair.max()) + 1

    def of_pairs(mask: Bools) -> Bools:
        items = np.zeros(num_items, dtype=np.bool_)
        items[item_of_pair[mask]] = True
        return items

    yield Part("pair_in_train", "no", ~of_pairs(data.pair_in_train))
    yield Part("text_in_train", "no", ~of_pairs(data.text_in_train))
    for column, values in data.test.slices.items():
        # A mask for every value of a column of ids would fill the memory.
        counts, every = Counter(values), np.array(values, dtype=object)
        for value in sorted(value for value, count in counts.items() if count >= FEWEST_ITEMS):
            yield Part(column, value, of_pairs(every == value), is_user_slice=True)


def _rare_values(data: PairData) -> Iterator[tuple[str, str, int]]:
    """Yield column, value and number of pairs of the slices that are certainly too small."""
    for column, values in data.test.slices.items():
        for value, count in sorted(Counter(values).items()):
            if count < FEWEST_ITEMS:
                yield column, value, count


def _notes(too_small: list[tuple[str, str, int]]) -> Iterator[str]:
    for name in dict.fromkeys(column for column, _, _ in too_small):
        small = [f"{value!r} ({count})" for column, value, count in too_small if column == name]
        yield f"no score for {name} = {some_names(small)}: fewer than {FEWEST_ITEMS} pairs, queries or texts"
