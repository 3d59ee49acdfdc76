"""The pairs of one task, ready for training: checked, scaled to 0..1, split, and compared with train."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from pipeline.config import TrainConfig
from pipeline.data.families import PairKind, check_training, fitting_loss
from pipeline.data.splits import blocks_of_pairs, held_out_blocks, names_of
from pipeline.errors import DataError
from pipeline.pairs.data import PairData, PairSplit
from pipeline.pairs.faults import pair_keys, pair_notes
from pipeline.pairs.tables import PairTable, PairTables, read_pair_tables
from pipeline.pairs.values import Scale, find_scale
from pipeline.records import MtebTask

_NUM_BINS = 5  # of scores: each keeps its share in a slice of train


def load_pairs(task: MtebTask, *, config: TrainConfig, offline: bool) -> PairData:
    """Read the pairs of a task, check that they can be learnt, and hold out test and validation if they have no files.

    Test and validation that are taken from train are whole blocks of pairs: pairs that share a near-equal text or a
    group stay on one side. Given negatives do not connect pairs, since mining takes them from all over the corpus.
    Validation is empty if no block can be spared, if ``validation_fraction`` is 0, or if ``early_stopping_split`` is
    ``test``.

    Args:
        task: The planned task. What it leaves undecided, the columns of its data decide.
        config: Settings of the validation slice and of the batches.
        offline: Read data sets of the Hub from the local cache only.
    Raises:
        ConfigError: the batches are too small for the loss.
        DataError: the data is missing or damaged, or its pairs cannot be learnt.
        LorafleetError: the Hub cannot be reached.
    """
    tables = read_pair_tables(task, offline=offline)
    scale = find_scale({split: table.values for split, table in tables.splits.items()}, task.name)
    task = _decided(tables, scale)
    check_training(task, config)
    tables = _with_test(tables, task, scale)
    whole = {split: PairSplit(t.columns, scale.apply(t.values), t.slices) for split, t in tables.splits.items()}
    train, validation = _hold_out(whole, tables.splits["train"].groups, config)
    learnt = [whole["train"], *([validation] if config.refit else [])]
    if config.refit and len(validation) and len(validation.columns) != len(train.columns):
        raise DataError(
            f"{task.name}: train has given negatives and validation has none, but train.refit learns from both; give "
            "validation the same columns, or leave train.refit out"
        )
    corpus = _corpus(task, whole, tables.passages, kind=scale.kind)
    return PairData(
        task=task,
        kind=scale.kind,
        train=replace(train, slices={}),
        validation=replace(validation, slices={}),
        test=whole["test"],
        corpus=corpus,
        pair_in_train=_pairs_in(learnt, whole["test"]),
        text_in_train=_texts_in(learnt, whole["test"]),
        score_range=scale.range,
        fingerprint=_fingerprint(tables),
        test_fingerprint=_test_fingerprint(tables.splits["test"], corpus),
        notes=(*tables.notes, *pair_notes(task, scale.kind, whole, train=train, validation=validation)),
    )


def _decided(tables: PairTables, scale: Scale) -> MtebTask:
    """Return the task with its loss.

    Raises: DataError: the loss does not fit, or a split has no pair to compare with.
    """
    train = tables.splits["train"]
    loss = fitting_loss(tables.task, kind=scale.kind, num_negatives=len(train.columns) - 2)
    if len(train.columns[0]) < 2:
        raise DataError(f"{tables.task.name}: train has a single pair; expected at least two, to compare them")
    assert len({table.values is None for table in tables.splits.values()}) == 1, "each split needs the score column"
    return tables.task.changed(loss=loss, undecided=())


def _with_test(tables: PairTables, task: MtebTask, scale: Scale) -> PairTables:
    """Split test off train if it has no files. The seed is negative, so that it never equals that of validation.

    Raises: DataError: no pair can be spared.
    """
    if task.test_split is None:
        return tables
    train = tables.splits["train"]
    columns, scores, seed = train.columns, scale.apply(train.values), -1 - task.test_split.seed
    chosen = _chosen(columns, scores=scores, groups=train.groups, fraction=task.test_split.fraction, seed=seed)
    if not chosen.any():
        blocks = len(np.unique(blocks_of_pairs(columns[:2], train.groups)))
        raise DataError(
            f"{task.name}: no pair can be spared for test: train has {len(chosen)} pairs in {blocks} blocks that share "
            f"no text or group, and test_fraction is {task.test_split.fraction:g}; raise it (below 0.5), add pairs, or "
            "name a test file"
        )
    return replace(tables, splits=tables.splits | {"train": train.take(~chosen), "test": train.take(chosen)})


def _hold_out(
    whole: dict[str, PairSplit], groups: list[str] | None, config: TrainConfig
) -> tuple[PairSplit, PairSplit]:
    """Return train and validation."""
    train = whole["train"]
    if config.early_stopping_split == "test":
        return train, train.take(np.zeros(len(train), dtype=np.bool_))
    if "validation" in whole:
        return train, whole["validation"]
    chosen = _chosen(
        train.columns, scores=train.scores, groups=groups, fraction=config.validation_fraction, seed=config.seed
    )
    return train.take(~chosen), train.take(chosen)


def _chosen(
    columns: Sequence[Sequence[str]],
    *,
    scores: NDArray[np.float64] | None,
    groups: list[str] | None,
    fraction: float,
    seed: int,
) -> NDArray[np.bool_]:
    """Choose whole blocks of pairs, bool (pairs,).

    None is chosen if one side would have a single score, or if train would have a single pair.
    """
    blocks = blocks_of_pairs(columns[:2], groups)
    values = np.zeros(len(blocks)) if scores is None else scores
    bins = np.minimum((values * _NUM_BINS).astype(np.int64), _NUM_BINS - 1)
    names = names_of(blocks, columns[0] if groups is None else groups)
    chosen = held_out_blocks(blocks, bins, names=names, fraction=fraction, seed=seed)
    is_constant = scores is not None and any(len(np.unique(scores[side])) < 2 for side in (chosen, ~chosen))
    if is_constant or (~chosen).sum() < 2:
        return np.zeros(len(blocks), dtype=np.bool_)
    return chosen


def _corpus(task: MtebTask, whole: dict[str, PairSplit], passages: Sequence[str], *, kind: PairKind) -> list[str]:
    """Return the distinct passages and negatives of train, validation and test, after those of a given corpus.

    Pairs with scores or labels are not searched, so they have no corpus.
    """
    if kind != "positives":
        return []
    order = [whole[split] for split in ("train", "validation", "test") if split in whole]
    return list(
        dict.fromkeys([*passages, *(text for split in order for column in split.columns[1:] for text in column)])
    )


def _pairs_in(learnt: Sequence[PairSplit], test: PairSplit) -> NDArray[np.bool_]:
    known = {key for split in learnt for key in pair_keys(split)}
    return np.fromiter((key in known for key in pair_keys(test)), dtype=np.bool_, count=len(test))


def _texts_in(learnt: Sequence[PairSplit], test: PairSplit) -> NDArray[np.bool_]:
    known = {text for split in learnt for column in split.columns for text in column}
    sides = zip(test.columns[0], test.columns[1], strict=True)
    return np.fromiter((one in known or other in known for one, other in sides), dtype=np.bool_, count=len(test))


def _fingerprint(tables: PairTables) -> str:
    """Hash everything that was read, in the order of the rows, which training depends on."""
    digest = hashlib.sha256()
    for split in ("train", "validation", "test"):
        if split not in tables.splits:
            continue
        table = tables.splits[split]
        _add_texts(digest, [split, *table.slices])
        for column in (*table.columns, table.groups or [], *table.slices.values()):
            _add_texts(digest, column)
        digest.update(b"" if table.values is None else table.values.astype("<f8").tobytes())
    _add_texts(digest, tables.passages)
    return digest.hexdigest()


def _test_fingerprint(test: PairTable, corpus: Sequence[str]) -> str:
    """Hash the test pairs and the corpus, without their order.

    Scores are hashed as in the data, because their range may grow.
    """
    numbers = [""] * len(test.columns[0]) if test.values is None else [repr(value) for value in test.values.tolist()]
    digest = hashlib.sha256()
    for row in sorted(zip(*test.columns[:2], numbers, strict=True)):
        _add_texts(digest, row)
    _add_texts(digest, sorted(corpus))
    return digest.hexdigest()


def _add_texts(digest: hashlib._Hash, texts: Iterable[str]) -> None:
    encoded = [text.encode() for text in texts]
    # Lengths first, so that no text can pose as two.
    digest.update(np.array([len(encoded), *map(len, encoded)], dtype="<i8").tobytes())
    digest.update(b"".join(encoded))
