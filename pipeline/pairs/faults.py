"""Pairs that are valid but weak: counted, kept, and reported."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

from pipeline.data.families import PairKind
from pipeline.pairs.data import PairData, PairSplit
from pipeline.records import DataSummary, MtebTask, PairFaults, PairSummary


def count_faults(splits: Sequence[PairSplit]) -> PairFaults:
    """Count the weak pairs of some splits together."""
    values = defaultdict[tuple[str, str], set[float | None]](set)
    num_pairs = num_empty = num_identical = 0
    for split in splits:
        num_pairs += len(split)
        scores: Sequence[float | None] = [None] * len(split) if split.scores is None else split.scores.tolist()
        for one, other, key, score in zip(*split.columns[:2], pair_keys(split), scores, strict=True):
            num_empty += not one.strip() or not other.strip()
            num_identical += one == other
            values[key].add(score)
    return PairFaults(
        num_empty=num_empty,
        num_identical=num_identical,
        num_duplicates=num_pairs - sum(map(len, values.values())),
        num_conflicts=sum(len(found) > 1 for found in values.values()),
    )


def pair_keys(split: PairSplit) -> Iterator[tuple[str, str]]:
    """Yield the two sides of each pair in sorted order, so that a pair and its reverse are equal."""
    for one, other in zip(split.columns[0], split.columns[1], strict=True):
        yield (one, other) if one <= other else (other, one)


def summarise_pairs(
    data: PairData, *, num_truncated_train: int, num_truncated_test: int, token_quantiles: tuple[int, ...]
) -> DataSummary:
    """Summarise the data of a task of pairs.

    Args:
        data: The pairs.
        num_truncated_train: Texts of train and validation cut at ``max_tokens``.
        num_truncated_test: Texts of test cut at ``max_tokens``.
        token_quantiles: 10th, 50th and 90th percentile of tokens per training text.
    """
    train, test = count_faults([data.train, data.validation]), count_faults([data.test])
    num_pair_in_train = int(data.pair_in_train.sum())
    return DataSummary(
        num_train=len(data.train),
        num_validation=len(data.validation),
        num_test=len(data.test),
        label_names=(),
        num_overlap=num_pair_in_train,
        num_empty_train=train.num_empty,
        num_empty_test=test.num_empty,
        num_truncated_train=num_truncated_train,
        num_truncated_test=num_truncated_test,
        fingerprint=data.fingerprint,
        notes=data.notes,
        token_quantiles=token_quantiles,
        test_fingerprint=data.test_fingerprint,
        pairs=PairSummary(
            kind=data.kind,
            train=train,
            test=test,
            num_pair_in_train=num_pair_in_train,
            num_text_in_train=int(data.text_in_train.sum()),
            num_passages=len(data.corpus),
            score_range=data.score_range,
        ),
    )


def pair_notes(
    task: MtebTask, kind: PairKind, whole: dict[str, PairSplit], *, train: PairSplit, validation: PairSplit
) -> list[str]:
    """Return notes on how the splits were made, and on weak pairs.

    Args:
        task: The task.
        kind: Meaning of the pairs.
        whole: Pairs of each split, with a validation slice still in train.
        train: Pairs of train without the validation slice.
        validation: Pairs of validation.
    """
    notes = []
    if task.test_split is not None:
        share = f"{len(whole['test'])} of {len(whole['test']) + len(whole['train'])} pairs of train"
        keys = f"test_fraction {task.test_split.fraction:g}, test_seed {task.test_split.seed}"
        grouped = "" if task.group_column is None else f" or a {task.group_column!r}"
        notes.append(f"test is {share} ({keys}); pairs that share a near-equal text{grouped} are on one side")
    if kind == "positives" and task.objective == "text-matching":
        notes.append("no column of scores or labels, so every pair counts as a positive one")
    scores = whole["train"].scores
    if kind == "scores" and scores is not None and len(np.unique(scores)) == 2:
        notes.append("train has only two different scores; write them as 0 and 1 to have them read as labels")
    for split in ("train", "validation", "test"):
        if split in whole:
            notes += _fault_notes(split, whole[split], task, kind)
    if validation is not train:
        notes += _overlap_notes(train, validation, whole["test"])
    return notes


def _fault_notes(split: str, pairs: PairSplit, task: MtebTask, kind: PairKind) -> list[str]:
    faults = count_faults([pairs])
    negatives = sum(
        text == passage for column in pairs.columns[2:] for text, passage in zip(column, pairs.columns[1], strict=True)
    )
    counts = {
        f"pairs with an empty side in {split}, kept": faults.num_empty,
        f"pairs with two equal sides in {split}, kept": faults.num_identical,
        f"pairs of {split} that occur before in it, kept": faults.num_duplicates,
        f"pairs of {split} with more than one {'label' if kind == 'labels' else 'score'}, kept": faults.num_conflicts,
        f"negatives of {split} that are the passage of their own pair, kept": negatives,
    }
    return [f"{what}: {count}" for what, count in counts.items() if count]


def _overlap_notes(train: PairSplit, validation: PairSplit, test: PairSplit) -> list[str]:
    """Return notes on validation pairs that are also in train or test."""
    keys, notes = list(pair_keys(validation)), []
    for where, split in (("train", train), ("test", test)):
        known = set(pair_keys(split))
        if count := sum(key in known for key in keys):
            notes.append(f"validation pairs that are also in {where}: {count}")
    return notes
