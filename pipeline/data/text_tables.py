"""Tables of texts and labels, read from the user's own files or the mirror."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.data.mteb_tasks import prefixed_errors
from pipeline.data.source_files import split_files
from pipeline.data.splits import held_out
from pipeline.data.table_checks import checked_table, columns_by_key
from pipeline.errors import DataError
from pipeline.labelled_files.column_names import some
from pipeline.labelled_files.formats import read_table
from pipeline.labelled_files.sources import read_content
from pipeline.records import CarvedTest, MtebTask


def read_text_files(task: MtebTask, *, offline: bool) -> tuple[dict[str, Any], str, tuple[str, ...]]:
    """Read the files of a task of texts and labels.

    Args:
        task: The planned task.
        offline: Whether files on the Hub are refused.
    Returns: Split -> checked pyarrow table, a hash of all files, and notes.
    Raises: DataError: a file is missing or damaged, or its columns are not text and label.
    """
    digest = hashlib.sha256()
    splits, notes = {}, []
    for split, files in split_files(task, offline=offline).items():
        tables = {}
        for path in files.paths:
            with prefixed_errors(f"{task.name}: {split}"):
                content = read_content(path)
                table = read_table(content, path, columns=columns_by_key(task))
            digest.update(split.encode() + content)
            if table.num_rows:
                tables[path] = checked_table(table, task, f"{task.name}: {split}: {path}")
        splits[split] = _joined(tables, f"{task.name}: {split}")
        if files.left_out:
            notes.append(f"skipped in the folder of {split}: {some(files.left_out)}")
    return splits, f"sha256:{digest.hexdigest()}", tuple(notes)


def carve_test(train: Any, task: MtebTask, split: CarvedTest) -> dict[str, Any]:
    """Split test off train. The seed is negative, so that it never equals that of the validation slice.

    Args:
        train: Checked pyarrow table of the whole train split.
        task: The planned task.
        split: Share and seed.
    Returns: The tables ``train`` and ``test``.
    Raises: DataError: train is too small.
    """
    labels = train["label"].combine_chunks().dictionary_encode().indices.to_numpy().astype(np.int64)
    groups = train["group"].to_pylist() if task.group_column is not None else None
    chosen = held_out(train["text"].to_pylist(), labels, groups=groups, fraction=split.fraction, seed=-1 - split.seed)
    if not chosen.any():
        found = f"{len(labels)} texts of {len(set(labels.tolist()))} labels"
        if groups is not None:
            found += f" and {len(set(groups))} groups by {task.group_column!r}"
        raise DataError(
            f"{task.name}: no text can be spared for test: train has {found}, and test_fraction is {split.fraction:g}; "
            "raise it (below 0.5), add texts, or name a test file"
        )
    return {"train": train.filter(pa.array(~chosen)), "test": train.filter(pa.array(chosen))}


def _joined(tables: dict[str, Any], where: str) -> Any:
    """Join the tables of all files, with the columns that they share.

    Raises: DataError: all files are empty, or their labels differ in type.
    """
    if not tables:
        raise DataError(f"{where} is empty; expected at least one text")
    kinds = {str(table["label"].type): path for path, table in reversed(tables.items())}
    if len(kinds) > 1:
        found = " and ".join(f"{kind} in {path}" for kind, path in kinds.items())
        raise DataError(f"{where}: labels are {found}; write them alike")
    shared = set.intersection(*(set(table.column_names) for table in tables.values()))
    return pa.concat_tables(
        [table.select([name for name in table.column_names if name in shared]) for table in tables.values()]
    )
