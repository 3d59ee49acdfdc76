"""The data of one MTEB task, ready for training: checked, with numbered labels and a validation slice."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.config import TrainConfig
from pipeline.data.catalogue import load_mteb_task
from pipeline.data.notes import count_empty, group_notes, overlap_notes, shown_label, some_names, split_notes
from pipeline.data.splits import Split, held_out, label_key, overlap
from pipeline.errors import DataError
from pipeline.records import LONGEST_LABEL, MOST_LABEL_BYTES, MtebTask

Labels = NDArray[np.int64]
"""Positions in ``TaskData.label_names``, int64 (texts,)."""

_MOST_LABELS = 10_000  # the probe's logits for more would not fit in a record


@dataclass(frozen=True)
class TaskData:
    """The texts and labels of one task, ready for training."""

    task: MtebTask
    """The task, with the revision of the data that was read."""
    mteb_task: Any
    """An ``mteb`` task with the same data, but without the validation slice and the label names."""
    label_names: tuple[str, ...]
    """Name of each class, at least two, in the sorted order of the labels in the data."""
    train_texts: list[str]
    train_labels: Labels
    validation_texts: list[str]
    """Empty if the epoch is selected on test, or if no class can spare a text."""
    validation_labels: Labels
    test_texts: list[str]
    test_labels: Labels
    test_in_train: NDArray[np.bool_]
    """Mask of the test texts that also occur in the whole train split, bool (num_test,)."""
    num_overlap: int
    """Number of true values in ``test_in_train``."""
    num_empty_train: int
    """Number of texts in the whole train split that are empty or white space. They are kept."""
    num_empty_test: int
    """Number of test texts that are empty or white space. They are kept."""
    fingerprint: str
    """SHA-256 of the label names, texts, labels and groups of all splits as read; independent of the seed."""
    test_fingerprint: str
    """SHA-256 of the test texts and labels, independent of their order and of labels that only train has."""
    notes: tuple[str, ...]
    """Warnings about valid but weak data, one sentence each."""


def load_data(task: MtebTask, *, config: TrainConfig, offline: bool) -> TaskData:
    """Read a task, check that it can be learnt, and hold out the validation slice.

    Validation is the data set's own split of that name. Without one, it is ``validation_fraction`` of each class of
    train, chosen by the seed, with near-equal texts and groups on one side. It is empty, so that train stays whole, if
    the fraction is 0 or ``early_stopping_split`` is ``test``.

    Args:
        task: The planned task.
        config: Settings of the validation slice.
        offline: Read data sets of the Hub from the local cache only.
    Raises:
        DataError: the data is missing or damaged, or its labels cannot be learnt.
        LorafleetError: the Hub cannot be reached.
    """
    loaded = load_mteb_task(task, offline=offline)
    label_names, splits = _number_labels(task.name, loaded.splits)
    _check_size(task, label_names)
    whole_train, test = splits["train"], splits["test"]
    train, validation, slice_notes = _hold_out(splits, label_names, config)
    _check_repeated_label(task, train, validation)
    test_in_train = overlap([*whole_train.texts, *(validation.texts if config.refit else ())], test.texts)
    return TaskData(
        task=loaded.task,
        mteb_task=loaded.mteb_task,
        label_names=label_names,
        train_texts=train.texts,
        train_labels=train.labels,
        validation_texts=validation.texts,
        validation_labels=validation.labels,
        test_texts=test.texts,
        test_labels=test.labels,
        test_in_train=test_in_train,
        num_overlap=int(test_in_train.sum()),
        num_empty_train=count_empty(whole_train),
        num_empty_test=count_empty(test),
        fingerprint=_fingerprint(label_names, splits),
        test_fingerprint=_test_fingerprint(loaded.splits["test"]),
        notes=(
            *loaded.notes,
            *split_notes(loaded.task, whole_train, test, label_names),
            *overlap_notes(train, validation, test),
            *group_notes(loaded.task, whole_train, test),
            *slice_notes,
        ),
    )


def _number_labels(name: str, tables: dict[str, Any]) -> tuple[tuple[str, ...], dict[str, Split]]:
    """Return the label names, and every split with labels as positions in them.

    Raises: DataError: train has a single label, or another split has labels that train lacks.
    """
    values = {split: table["label"].to_pylist() for split, table in tables.items()}
    classes = sorted(set(values["train"]))
    if len(classes) < 2:
        raise DataError(
            f"{name}: train has the single label {shown_label(classes[0])}; expected texts of at least two labels"
        )
    position = {label: number for number, label in enumerate(classes)}
    for split, column in values.items():
        if unknown := sorted(set(column) - set(classes)):
            raise DataError(
                f"{name}: {split} has labels that never occur in train: {some_names(map(shown_label, unknown))}"
                f"{_remedy(split, unknown, classes)}"
            )
    splits = {
        split: Split(
            table["text"].to_pylist(),
            np.array([position[label] for label in values[split]], dtype=np.int64),
            table["group"].to_pylist() if "group" in table.column_names else None,
        )
        for split, table in tables.items()
    }
    return _label_names(classes, tables["train"]), splits


def _check_repeated_label(task: MtebTask, train: Split, validation: Split) -> None:
    """Raises: DataError: no label has two texts, so the labels are probably ids."""
    counts = np.bincount(train.labels)
    if not validation.texts and counts.max() == 1:
        raise DataError(
            f"{task.name}: each of the {len(counts)} labels of train has a single text; "
            "expected two texts of at least one label; add texts, or check that label_column is right"
        )


def _check_size(task: MtebTask, label_names: tuple[str, ...]) -> None:
    """Refuse labels that no record of the trained adapter could hold."""
    advice = f"check that label_column = {task.label_column!r} is the right column"
    longest, total = max(label_names, key=len), len(json.dumps(label_names))
    if len(longest) > LONGEST_LABEL:
        found = f"a label of {len(longest):,} characters, {longest[:40]!r}…"
        raise DataError(f"{task.name}: train has {found}; at most {LONGEST_LABEL:,} are read; {advice}")
    if total > MOST_LABEL_BYTES:
        found = f"{len(label_names):,} labels whose names take {total:,} bytes"
        raise DataError(f"{task.name}: train has {found}; at most {MOST_LABEL_BYTES:,} are read; {advice}")
    if len(label_names) > _MOST_LABELS:
        raise DataError(
            f"{task.name}: train has {len(label_names):,} labels; at most {_MOST_LABELS:,} are read; {advice}"
        )


def _remedy(split: str, unknown: list[Any], classes: list[Any]) -> str:
    """Return advice on labels that only another split than train has, with the similar labels of train."""
    similar = {label_key(str(label)): label for label in classes}
    twins = [
        f"{shown_label(similar[key])} for {shown_label(label)}"
        for label in unknown
        if (key := label_key(str(label))) in similar
    ]
    if twins:
        return f", which has {some_names(twins)}; write them alike"
    return f"; add texts of them to train, or remove them from {split}"


def _label_names(classes: list[Any], train: Any) -> tuple[str, ...]:
    """Return ``label_text`` of each label if each has exactly one; otherwise the labels themselves."""
    plain = tuple(str(label) for label in classes)
    if isinstance(classes[0], str) or "label_text" not in train.column_names:
        return plain
    pairs = set(zip(train["label"].to_pylist(), train["label_text"].to_pylist(), strict=True))
    names = dict(pairs)
    is_one_to_one = len(pairs) == len(classes) == len(set(names.values())) and all(names.values())
    return tuple(names[label] for label in classes) if is_one_to_one else plain


def _hold_out(
    splits: dict[str, Split], label_names: tuple[str, ...], config: TrainConfig
) -> tuple[Split, Split, list[str]]:
    """Return train, validation, and notes on classes that are not in the validation slice."""
    train = splits["train"]
    none = np.zeros(len(train.texts), dtype=np.bool_)
    if config.early_stopping_split == "test":
        return train, train.take(none), []
    if "validation" in splits:
        return train, splits["validation"], []
    if config.validation_fraction == 0:
        return train, train.take(none), []
    chosen = held_out(
        train.texts, train.labels, groups=train.groups, fraction=config.validation_fraction, seed=config.seed
    )
    in_validation = set(train.labels[chosen].tolist())
    without = [shown_label(name) for label, name in enumerate(label_names) if label not in in_validation]
    notes = [f"classes too small for a validation slice, so wholly in train: {some_names(without)}"] if without else []
    return train.take(~chosen), train.take(chosen), notes


def _fingerprint(label_names: tuple[str, ...], splits: dict[str, Split]) -> str:
    digest = hashlib.sha256()
    groups = [split.groups for split in splits.values() if split.groups is not None]  # they decide the validation slice
    for texts in (list(label_names), *(split.texts for split in splits.values()), *groups):
        encoded = [text.encode() for text in texts]
        # Lengths first, so that no text can pose as two.
        digest.update(np.array([len(encoded), *map(len, encoded)], dtype="<i8").tobytes())
        digest.update(b"".join(encoded))
    for split in splits.values():
        digest.update(split.labels.astype("<i8").tobytes())
    return digest.hexdigest()


def _test_fingerprint(test: Any) -> str:
    # Hash the labels themselves: their positions change with every label that train gains or loses.
    rows = sorted(zip(test["text"].to_pylist(), map(str, test["label"].to_pylist()), strict=True))
    digest = hashlib.sha256()
    for part in (part.encode() for row in rows for part in row):
        digest.update(len(part).to_bytes(8, "little") + part)  # so that no text can pose as two
    return digest.hexdigest()
