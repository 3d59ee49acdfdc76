"""From an MTEB task to texts and labels that can be learnt: checked, numbered, with a validation slice. Knows no encoder."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.catalogue import load_mteb_task
from pipeline.config import TrainConfig
from pipeline.errors import DataError
from pipeline.packages import hash_order
from pipeline.records import MtebTask
from pipeline.scores import overlap

Labels = NDArray[np.int64]
"""Positions in ``TaskData.label_names``, int64 (texts,)."""

_MOST_NAMES = 5  # in one message


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
    """sha256 over label names, texts and labels of all splits as they were read: the same for every seed."""
    test_fingerprint: str
    """sha256 over the texts and labels of test, in whatever order: a label that is new in train does not change it."""
    notes: tuple[str, ...]
    """What is lawful but thin, one sentence each."""


@dataclass(frozen=True)
class _Split:
    texts: list[str]
    labels: Labels

    def take(self, chosen: NDArray[np.bool_]) -> _Split:
        return _Split([text for text, is_chosen in zip(self.texts, chosen, strict=True) if is_chosen], self.labels[chosen])


def load_data(task: MtebTask, *, config: TrainConfig, offline: bool) -> TaskData:
    """Read a task, check that it can be learnt, and hold out the validation slice.

    Validation is the data's own split of that name; otherwise ``validation_fraction`` of each class of train, chosen by the seed,
    with equal texts on one side; and nothing, so that train stays whole, where ``early_stopping_split`` is ``test``.

    Args:
        offline: Take from the Hub only what its local cache holds.
    Raises:
        DataError: data that is missing or damaged, or labels that cannot be learnt.
        LorafleetError: the Hub cannot be reached.
    """
    loaded = load_mteb_task(task, offline=offline)
    label_names, splits = _number_labels(task.name, loaded.splits)
    whole_train, test = splits["train"], splits["test"]
    train, validation, slice_notes = _hold_out(splits, label_names, config)
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
        num_empty_train=_count_empty(whole_train),
        num_empty_test=_count_empty(test),
        fingerprint=_fingerprint(label_names, splits),
        test_fingerprint=_test_fingerprint(loaded.splits["test"]),
        notes=(*_notes(loaded.task, whole_train, test, label_names), *_overlap_notes(train, validation, test), *slice_notes),
    )


def _number_labels(name: str, tables: dict[str, Any]) -> tuple[tuple[str, ...], dict[str, _Split]]:
    """Label names, and every split with its labels as positions in them."""
    values = {split: table["label"].to_pylist() for split, table in tables.items()}
    classes = sorted(set(values["train"]))
    if len(classes) < 2:
        raise DataError(f"{name}: train has the single label {classes[0]!r}; a classifier needs at least two classes")
    position = {label: number for number, label in enumerate(classes)}
    for split, column in values.items():
        unknown = sorted(set(column) - set(classes))
        if unknown:
            fix = f"add texts of them to train, or remove them from {split}"
            raise DataError(f"{name}: {split} has labels that never occur in train: {_some(map(str, unknown))}; {fix}")
    splits = {
        split: _Split(table["text"].to_pylist(), np.array([position[label] for label in values[split]], dtype=np.int64))
        for split, table in tables.items()
    }
    return _label_names(classes, tables["train"]), splits


def _label_names(classes: list[Any], train: Any) -> tuple[str, ...]:
    """The names that the data gives its numbers, if it gives each number exactly one of its own; else the labels as they are."""
    plain = tuple(str(label) for label in classes)
    if isinstance(classes[0], str) or "label_text" not in train.column_names:
        return plain
    pairs = set(zip(train["label"].to_pylist(), train["label_text"].to_pylist(), strict=True))
    names = dict(pairs)
    is_one_to_one = len(pairs) == len(classes) == len(set(names.values())) and all(names.values())
    return tuple(names[label] for label in classes) if is_one_to_one else plain


def _hold_out(splits: dict[str, _Split], label_names: tuple[str, ...], config: TrainConfig) -> tuple[_Split, _Split, list[str]]:
    """Train, validation, and notes on classes that the slice had to leave out."""
    train = splits["train"]
    nobody = np.zeros(len(train.texts), dtype=np.bool_)
    if config.early_stopping_split == "test":
        return train, train.take(nobody), []
    if "validation" in splits:
        return train, splits["validation"], []
    held_out = _validation_mask(train, fraction=config.validation_fraction, seed=config.seed)
    spared = set(train.labels[held_out].tolist())
    without = [name for label, name in enumerate(label_names) if label not in spared]
    notes = [f"classes too small for a validation slice, so wholly in train: {_some(without)}"] if without else []
    return train.take(~held_out), train.take(held_out), notes


def _validation_mask(train: _Split, *, fraction: float, seed: int) -> NDArray[np.bool_]:
    """Which training texts are held out, bool (texts,): of each class ``fraction`` of its texts, rounded.

    Equal texts go together, or the score that selects the epoch would be of texts already learnt; those with several labels stay in train.
    """
    labels_of: dict[str, set[int]] = {}
    for text, label in zip(train.texts, train.labels.tolist(), strict=True):
        labels_of.setdefault(text, set()).add(label)
    times = Counter(train.texts)
    room = {label: int(count * fraction + 0.5) for label, count in Counter(train.labels.tolist()).items()}
    held_out = set()
    unique = list(times)
    for index in hash_order(unique, seed=seed):
        text = unique[index]
        label = min(labels_of[text])
        if len(labels_of[text]) == 1 and times[text] <= room[label]:
            held_out.add(text)
            room[label] -= times[text]
    return np.fromiter((text in held_out for text in train.texts), dtype=np.bool_, count=len(train.texts))


def _count_empty(split: _Split) -> int:
    return sum(not text.strip() for text in split.texts)


def _notes(task: MtebTask, train: _Split, test: _Split, label_names: tuple[str, ...]) -> list[str]:
    in_train = np.bincount(train.labels, minlength=len(label_names))
    in_test = np.bincount(test.labels, minlength=len(label_names))
    notes = []
    absent = [name for name, count in zip(label_names, in_test, strict=True) if count == 0]
    if absent:
        notes.append(f"classes that do not occur in test: {_some(absent)}")
    thin = [f"{name} {count}" for name, count in zip(label_names, in_train, strict=True) if count < task.samples_per_label]
    if thin:
        notes.append(f"classes with fewer texts than the {task.samples_per_label} of a few-shot draw: {_some(thin)}")
    for split, count in (("train", _count_empty(train)), ("test", _count_empty(test))):
        if count:
            notes.append(f"empty texts in {split}, kept: {count}")
    return notes


def _overlap_notes(train: _Split, validation: _Split, test: _Split) -> list[str]:
    """Of a validation split that came with the data; a slice of ours has no text that train has."""
    notes = []
    for where, there in (("train", train), ("test", test)):
        if count := int(overlap(there.texts, validation.texts).sum()):
            notes.append(f"validation texts that are also in {where}: {count}")
    return notes


def _some(names: Iterable[str]) -> str:
    every = list(names)
    rest = len(every) - _MOST_NAMES
    return ", ".join(every[:_MOST_NAMES]) + (f" and {rest} more" if rest > 0 else "")


def _fingerprint(label_names: tuple[str, ...], splits: dict[str, _Split]) -> str:
    digest = hashlib.sha256()
    for texts in (list(label_names), *(split.texts for split in splits.values())):
        encoded = [text.encode() for text in texts]
        digest.update(np.array([len(encoded), *map(len, encoded)], dtype="<i8").tobytes())  # so that no text can pose as two
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
