"""From an MTEB task to texts and labels that can be learnt: checked, numbered, with a validation slice. Knows no encoder."""

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

_MOST_LABELS = 10_000  # the probe's logits for more would not fit into a record


@dataclass(frozen=True)
class TaskData:
    """The texts and labels of one task, ready to be learnt from."""

    task: MtebTask
    """With the revision of what was read."""
    mteb_task: Any
    """The same data as a real mteb task; it knows neither validation slice nor label names."""
    label_names: tuple[str, ...]
    """One name per class, at least two; in the order of the labels in the data, so by number where they are numbers."""
    train_texts: list[str]
    train_labels: Labels
    validation_texts: list[str]
    """Empty where the epoch is selected on test, or where no class can spare a text."""
    validation_labels: Labels
    test_texts: list[str]
    test_labels: Labels
    test_in_train: NDArray[np.bool_]
    """Which test texts also occur in the whole train split, bool (num_test,)."""
    num_overlap: int
    """Of ``test_in_train``."""
    num_empty_train: int
    """Texts of the whole train split with nothing but white space; they are kept."""
    num_empty_test: int
    fingerprint: str
    """sha256 over label names, texts, labels and groups of all splits as they were read: the same for every seed."""
    test_fingerprint: str
    """sha256 over the texts and labels of test, in whatever order: a label that is new in train does not change it."""
    notes: tuple[str, ...]
    """What is lawful but thin, one sentence each."""


def load_data(task: MtebTask, *, config: TrainConfig, offline: bool) -> TaskData:
    """Read a task, check that it can be learnt, and hold out the validation slice.

    Validation is the data's own split of that name; otherwise ``validation_fraction`` of each class of train, chosen by the seed, with
    near-equal texts and groups on one side; and nothing, so that train stays whole, where ``early_stopping_split`` is ``test``.

    Args:
        offline: Take from the Hub only what its local cache holds.
    Raises:
        DataError: data that is missing or damaged, or labels that cannot be learnt.
        LorafleetError: the Hub cannot be reached.
    """
    loaded = load_mteb_task(task, offline=offline)
    label_names, splits = _number_labels(task.name, loaded.splits)
    _check_size(task, label_names)
    whole_train, test = splits["train"], splits["test"]
    train, validation, slice_notes = _hold_out(splits, label_names, config)
    if not validation.texts and np.bincount(train.labels).max() == 1:
        found = f"each of the {len(label_names)} labels of train has a single text"
        raise DataError(
            f"{task.name}: {found}; expected two texts of at least one label; add texts, or check that label_column is right"
        )
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
    """Label names, and every split with its labels as positions in them."""
    values = {split: table["label"].to_pylist() for split, table in tables.items()}
    classes = sorted(set(values["train"]))
    if len(classes) < 2:
        raise DataError(
            f"{name}: train has the single label {shown_label(classes[0])}; a classifier needs at least two classes"
        )
    position = {label: number for number, label in enumerate(classes)}
    for split, column in values.items():
        unknown = sorted(set(column) - set(classes))
        if unknown:
            known = {label_key(str(label)): label for label in classes}
            twins = [
                f"{shown_label(known[key])} for {shown_label(label)}"
                for label in unknown
                if (key := label_key(str(label))) in known
            ]
            fix = (
                f"which has {some_names(twins)}; write them alike"
                if twins
                else f"add texts of them to train, or remove them from {split}"
            )
            sign = "," if twins else ";"
            raise DataError(
                f"{name}: {split} has labels that never occur in train: {some_names(map(shown_label, unknown))}{sign} {fix}"
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


def _check_size(task: MtebTask, label_names: tuple[str, ...]) -> None:
    """Refuse names that no record of the trained adapter could hold."""
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


def _label_names(classes: list[Any], train: Any) -> tuple[str, ...]:
    """The names that the data gives its numbers, if it gives each number exactly one of its own; else the labels as they are."""
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
    """Train, validation, and notes on classes that the slice had to leave out."""
    train = splits["train"]
    nobody = np.zeros(len(train.texts), dtype=np.bool_)
    if config.early_stopping_split == "test":
        return train, train.take(nobody), []
    if "validation" in splits:
        return train, splits["validation"], []
    chosen = held_out(
        train.texts, train.labels, groups=train.groups, fraction=config.validation_fraction, seed=config.seed
    )
    spared = set(train.labels[chosen].tolist())
    without = [shown_label(name) for label, name in enumerate(label_names) if label not in spared]
    notes = [f"classes too small for a validation slice, so wholly in train: {some_names(without)}"] if without else []
    return train.take(~chosen), train.take(chosen), notes


def _fingerprint(label_names: tuple[str, ...], splits: dict[str, Split]) -> str:
    digest = hashlib.sha256()
    groups = [split.groups for split in splits.values() if split.groups is not None]  # they decide the validation slice
    for texts in (list(label_names), *(split.texts for split in splits.values()), *groups):
        encoded = [text.encode() for text in texts]
        digest.update(
            np.array([len(encoded), *map(len, encoded)], dtype="<i8").tobytes()
        )  # so that no text can pose as two
        digest.update(b"".join(encoded))
    for split in splits.values():
        digest.update(split.labels.astype("<i8").tobytes())
    return digest.hexdigest()


def _test_fingerprint(test: Any) -> str:
    # By the labels' own values, not by their positions: those move with every label that train gains or loses.
    rows = sorted(zip(test["text"].to_pylist(), map(str, test["label"].to_pylist()), strict=True))
    digest = hashlib.sha256()
    for part in (part.encode() for row in rows for part in row):
        digest.update(len(part).to_bytes(8, "little") + part)  # so that no text can pose as two
    return digest.hexdigest()
