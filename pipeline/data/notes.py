"""Notes for the user on data that is valid but weak, and labels as messages show them."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Iterable

import numpy as np

from pipeline.data.splits import Split, label_key, overlap
from pipeline.records import MtebTask


def count_empty(split: Split) -> int:
    """Return the number of texts that are empty or white space."""
    return sum(not text.strip() for text in split.texts)


def split_notes(task: MtebTask, train: Split, test: Split, label_names: tuple[str, ...]) -> list[str]:
    """Return notes on train and test: how test was made, and thin, absent, similar and empty entries."""
    in_train = np.bincount(train.labels, minlength=len(label_names))
    in_test = np.bincount(test.labels, minlength=len(label_names))
    notes = []
    if task.test_split is not None:
        share = f"{len(test.texts)} of {len(test.texts) + len(train.texts)} texts of train"
        keys = f"test_fraction {task.test_split.fraction:g}, test_seed {task.test_split.seed}"
        grouped = "" if task.group_column is None else f" and texts with the same {task.group_column!r}"
        notes.append(f"test is {share} ({keys}); near-equal texts{grouped} are on one side")
    absent = [shown_label(name) for name, count in zip(label_names, in_test, strict=True) if count == 0]
    if absent:
        why = "without a text to spare for" if task.test_split else "that do not occur in"
        notes.append(f"classes {why} test: {some_names(absent)}")
    if twins := _twins(label_names):
        notes.append(
            f"labels that differ only in case, spaces or Unicode form are separate classes: {some_names(twins)}"
        )
    thin = [
        f"{shown_label(name)} {count}"
        for name, count in zip(label_names, in_train, strict=True)
        if count < task.samples_per_label
    ]
    if thin:
        notes.append(
            f"classes with fewer texts than the {task.samples_per_label} of a few-shot draw: {some_names(thin)}"
        )
    for split, count in (("train", count_empty(train)), ("test", count_empty(test))):
        if count:
            notes.append(f"empty texts in {split}, kept: {count}")
    return notes


def overlap_notes(train: Split, validation: Split, test: Split) -> list[str]:
    """Return notes on validation texts that are also in train or test.

    A validation split of the data set may have them; a slice of train has none of train's texts.
    """
    notes = []
    for where, split in (("train", train), ("test", test)):
        if count := int(overlap(split.texts, validation.texts).sum()):
            notes.append(f"validation texts that are also in {where}: {count}")
    return notes


def group_notes(task: MtebTask, train: Split, test: Split) -> list[str]:
    """Return a note on groups that are both in train and in test."""
    if train.groups is None or test.groups is None:
        return []
    test_groups = set(test.groups)
    shared = test_groups.intersection(train.groups)
    return (
        [f"groups by {task.group_column!r} that are in train and in test: {len(shared)} of test's {len(test_groups)}"]
        if shared
        else []
    )


def _twins(label_names: tuple[str, ...]) -> list[str]:
    alike = defaultdict(list)
    for name in label_names:
        alike[label_key(name)].append(shown_label(name))
    return [" and ".join(names) for names in alike.values() if len(names) > 1]


_MOST_NAMES = 5  # in one message


def shown_label(label: str | int) -> str:
    """Quote a label for a message, so that no two labels look the same."""
    return ascii(label) if isinstance(label, str) and not unicodedata.is_normalized("NFKC", label) else repr(label)


def some_names(names: Iterable[str]) -> str:
    """List the first names, and count the rest: ``a, b and 3 more``."""
    every = list(names)
    rest = len(every) - _MOST_NAMES
    return ", ".join(every[:_MOST_NAMES]) + (f" and {rest} more" if rest > 0 else "")
