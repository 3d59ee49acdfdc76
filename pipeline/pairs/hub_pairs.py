"""Pairs of mteb's data sets on the Hub: sentences with a score or a label, and queries with relevant passages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.data.mteb_tasks import find_mteb_task, load_mteb_data
from pipeline.errors import DataError
from pipeline.records import MtebTask


@dataclass(frozen=True)
class HubPairs:
    """Pairs of a data set on the Hub."""

    tables: dict[str, Any]
    """Split -> pyarrow table with the columns of the task."""
    revision: str
    passages: list[str]
    """Texts of the corpus of a retrieval task. Empty for other tasks."""
    notes: tuple[str, ...] = ()


_SPLITS = {"train": ("train",), "validation": ("validation", "dev"), "test": ("test",)}  # and their names on the Hub


def read_hub_pairs(task: MtebTask, *, offline: bool) -> HubPairs:
    """Let mteb load and transform the data set of a task of pairs.

    Args:
        task: The planned task.
        offline: Read from the local cache of the Hub only.
    Raises:
        DataError: the data set is missing, damaged, or lacks a split.
        LorafleetError: the Hub cannot be reached.
    """
    mteb_task = find_mteb_task(task.name, subset=task.subset)
    if task.objective == "retrieval":
        return read_retrieval(task, mteb_task, offline=offline)
    return read_sentence_pairs(task, mteb_task, offline=offline)


def read_sentence_pairs(task: MtebTask, mteb_task: Any, *, offline: bool) -> HubPairs:
    """Read a task of type STS or PairClassification; errors as ``read_hub_pairs``."""
    place = load_mteb_data(task.name, mteb_task, offline=offline)
    parts = mteb_task.dataset[task.subset] if mteb_task.metadata.is_multilingual else mteb_task.dataset
    splits = {split: part for split in _SPLITS if (part := _first(parts, split)) is not None}
    _check_splits(task.name, splits, list(parts), place)
    tables = {split: _unfolded(part.with_format("arrow")[:], task) for split, part in splits.items()}
    return HubPairs(tables, mteb_task.metadata.revision, [])


def read_retrieval(task: MtebTask, mteb_task: Any, *, offline: bool) -> HubPairs:
    """Read a task of type Retrieval; errors as ``read_hub_pairs``.

    mteb loads the splits that are to be evaluated, so train is asked for as one of them. A relevance above 0 makes a
    pair. Pairs are sorted by their ids, because mteb reads them in no certain order.
    """
    mteb_task.filter_eval_splits(["train", "test"])  # a split that the data set lacks is an error of ``datasets``
    place = load_mteb_data(task.name, mteb_task, offline=offline)
    parts = mteb_task.dataset[task.subset]
    # For a split that the data set lacks, mteb takes its only one.
    is_twice = parts["train"]["relevant_docs"] == parts["test"]["relevant_docs"]
    _check_splits(task.name, ["test"] if is_twice else parts, list(parts)[is_twice:], place)
    tables, notes, passages = {}, list[str](), dict[str, None]()
    for split, part in parts.items():
        texts = {row["id"]: " ".join(filter(None, (row.get("title"), row["text"]))) for row in part["corpus"]}
        queries = dict(zip(part["queries"]["id"], part["queries"]["text"], strict=True))
        ids = sorted(
            (q, p) for q, degrees in part["relevant_docs"].items() for p, degree in degrees.items() if degree > 0
        )
        pairs = [(queries[query], texts[passage]) for query, passage in ids if query in queries and passage in texts]
        if len(pairs) < len(ids):
            notes.append(f"relevant passages of {split} that are not in the corpus, left out: {len(ids) - len(pairs)}")
        tables[split] = pa.table({"query": [query for query, _ in pairs], "passage": [text for _, text in pairs]})
        passages |= dict.fromkeys(texts.values())
    return HubPairs(tables, mteb_task.metadata.revision, list(passages), tuple(notes))


def _first(parts: Any, split: str) -> Any | None:
    return next((parts[name] for name in _SPLITS[split] if name in parts), None)


def _check_splits(name: str, splits: Any, found: list[str], place: str) -> None:
    for split in ("train", "test"):
        if split not in splits:
            raise DataError(
                f"{name}: expected a split {split!r}, found {', '.join(sorted(found))} in {place}; "
                "name your own files in train"
            )


def _unfolded(table: Any, task: MtebTask) -> Any:
    """Return one row for each pair. A pair classification may hold all pairs as lists in one row."""
    used = [name for name in (*task.columns, task.score_column) if name in table.column_names]
    if not used or not pa.types.is_list(table[used[0]].type):
        return table
    return pa.table({name: pa.chunked_array([chunk.flatten() for chunk in table[name].chunks]) for name in used})
