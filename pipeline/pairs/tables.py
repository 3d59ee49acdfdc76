"""Tables of pairs, read from files, packages or the Hub, with plain columns."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import compress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.families import family_of_columns, family_of_one_side, with_family
from pipeline.data.mteb_tasks import prefixed_errors
from pipeline.data.quickstart import read_package
from pipeline.data.source_files import split_files
from pipeline.data.table_checks import group_names, text_values, whole_values
from pipeline.errors import DataError
from pipeline.labelled_files.column_names import some
from pipeline.labelled_files.formats import header_readings, read_table
from pipeline.labelled_files.sources import read_content
from pipeline.pairs.columns import PairColumns, find_columns
from pipeline.pairs.hub_pairs import HubPairs, read_hub_pairs
from pipeline.pairs.qrels_files import read_queries
from pipeline.pairs.values import read_values, slice_values
from pipeline.records import MtebTask


@dataclass(frozen=True)
class PairTable:
    """The pairs of one split, as read."""

    columns: tuple[list[str], ...]
    """Texts of each column: the two sides, then given negatives."""
    values: NDArray[np.float64] | None
    """Score or label of each pair as in the data, float64 (pairs,). None if every pair is positive."""
    groups: list[str] | None
    slices: dict[str, list[str]]

    def take(self, chosen: NDArray[np.bool_]) -> PairTable:
        """Return the pairs for which the mask is true."""
        return PairTable(
            tuple(list(compress(column, chosen)) for column in self.columns),
            None if self.values is None else self.values[chosen],
            None if self.groups is None else list(compress(self.groups, chosen)),
            {name: list(compress(values, chosen)) for name, values in self.slices.items()},
        )


@dataclass(frozen=True)
class PairTables:
    """The pairs of all splits, as read."""

    task: MtebTask
    """The task, with the revision of the data and nothing undecided but the loss."""
    splits: dict[str, PairTable]
    """Pairs of ``train``, ``test`` and ``validation``, as far as the source has these splits."""
    passages: list[str]
    """Passages of a given corpus. Empty if the pairs alone have the passages."""
    notes: tuple[str, ...] = ()


def read_pair_tables(task: MtebTask, *, offline: bool) -> PairTables:
    """Read the pairs of a planned task from its source, and decide what its columns decide.

    Args:
        task: The planned task.
        offline: Read data sets of the Hub from the local cache only.
    Raises:
        DataError: the data is missing or damaged, or its columns are not those of pairs.
        LorafleetError: the Hub cannot be reached.
    """
    if task.source in ("files", "mirror"):
        return _read_files(task, offline=offline)
    hub = read_hub_pairs(task, offline=offline) if task.source == "hub" else HubPairs(*read_package(task), [])
    return tables_of_hub(task, hub)


def tables_of_hub(task: MtebTask, hub: HubPairs) -> PairTables:
    """Return the pairs of a data set that has no files of the user's.

    Raises: DataError: its columns are not those of the task, or a split has no pair.
    """
    splits, ignored = dict[str, PairTable](), list[str]()
    for split in [name for name in ("train", "validation", "test") if name in hub.tables]:
        where, table = f"{task.name}: {split}", hub.tables[split]
        if not table.num_rows:
            raise DataError(f"{where} is empty; expected at least one pair")
        found = find_columns(table.column_names, task, split=split, where=where, others_allowed=True)
        splits[split] = _pair_table(table, found, task, where)
        ignored += found.ignored
    notes = (*hub.notes, *_ignored_notes(ignored))
    return PairTables(task.changed(revision=hub.revision), splits, hub.passages, notes)


def decide_by_columns(task: MtebTask, *, offline: bool) -> MtebTask:
    """Return the task with its family, which the columns of its first training file decide if nothing else does.

    Raises: DataError: the file cannot be read, or a setting does not fit its family.
    """
    if "objective" not in task.undecided:
        return task
    path = split_files(task, offline=offline)["train"].paths[0]
    with prefixed_errors(f"{task.name}: train"):
        readings = header_readings(read_content(path), path)
    if {task.text_column, task.label_column} != {"text", "label"}:
        return with_family(task, "classification")
    # With one known side, the reader of pairs reports the missing one. With none, the reader of labelled texts does.
    families = [found for of_names in (family_of_columns, family_of_one_side) for found in map(of_names, readings)]
    return with_family(task, next(filter(None, families), task.objective))


def _read_files(task: MtebTask, *, offline: bool) -> PairTables:
    digest, notes, ignored = hashlib.sha256(), list[str](), list[str]()
    task = decide_by_columns(task, offline=offline)
    others_allowed = "columns" not in task.undecided
    splits: dict[str, PairTable] = {}
    for split, files in split_files(task, offline=offline).items():
        if split == "test" and task.corpus_location is not None:
            continue
        tables = []
        for path in files.paths:
            with prefixed_errors(f"{task.name}: {split}"):
                content = read_content(path)
                found = _columns_of_file(content, path, task, split=split, others_allowed=others_allowed)
                task = _decided(task, found)
                used = [*found.texts, found.score, task.group_column, *found.slices]
                table = read_table(content, path, columns={name: name for name in used if name is not None})
                tables.append(_pair_table(table, found, task, path))
            digest.update(split.encode() + content)
            ignored += found.ignored
        splits[split] = _joined([table for table in tables if table.columns[0]], f"{task.name}: {split}")
        if files.left_out:
            notes.append(f"skipped in the folder of {split}: {some(files.left_out)}")
    passages: list[str] = []
    if task.corpus_location is not None:
        queries = read_queries(task, offline=offline)
        splits["test"] = PairTable((queries.queries, queries.passages), None, None, queries.slices)
        passages = queries.corpus
        digest.update(queries.sha256.encode())
        notes += queries.notes
    return PairTables(
        task.changed(revision=f"sha256:{digest.hexdigest()}"), splits, passages, (*notes, *_ignored_notes(ignored))
    )


def _columns_of_file(content: bytes, path: str, task: MtebTask, *, split: str, others_allowed: bool) -> PairColumns:
    """Find the columns under the separator that shows them.

    Raises: DataError: under no separator all columns are found. The message is about the longest header.
    """
    faults = []
    for names in sorted(header_readings(content, path), key=len, reverse=True):
        try:
            return find_columns(names, task, split=split, where=path, others_allowed=others_allowed)
        except DataError as error:
            faults.append(error)
    raise faults[0]


def _decided(task: MtebTask, found: PairColumns) -> MtebTask:
    """Return the task with the columns of its first file."""
    still = tuple(field for field in task.undecided if field not in ("columns", "score_column"))
    if still == task.undecided:
        return task
    return task.changed(columns=found.texts, score_column=found.score, undecided=still)


def _pair_table(table: Any, found: PairColumns, task: MtebTask, where: str) -> PairTable:
    """Return the columns of a pyarrow table as plain lists.

    Raises: DataError: a column has nulls or another type.
    """
    texts = [text_values(table[name], name, where) for name in found.texts]
    groups = None
    if task.group_column is not None:
        groups = whole_values(group_names(table[task.group_column], task.group_column, where), task.group_column, where)
    slices = {name: slice_values(table[name], name, where) for name in found.slices}
    values = None if found.score is None else read_values(table[found.score], f"{where}: column {found.score!r}")
    return PairTable(tuple(texts), values, groups, slices)


def _joined(tables: Sequence[PairTable], where: str) -> PairTable:
    """Join the tables of all files of a split.

    Raises: DataError: there is no pair, or one file has a column of texts that another lacks.
    """
    if not tables:
        raise DataError(f"{where} is empty; expected at least one pair")
    if len(counts := {len(table.columns) for table in tables}) > 1:
        raise DataError(f"{where}: its files have {min(counts)} and {max(counts)} columns of texts; write them alike")
    columns = tuple([text for table in tables for text in table.columns[c]] for c in range(counts.pop()))
    values = [table.values for table in tables if table.values is not None]
    groups = [group for table in tables for group in table.groups or ()]
    return replace(
        tables[0],
        columns=columns,
        values=np.concatenate(values) if values else None,
        groups=groups if tables[0].groups is not None else None,
        slices={name: [v for table in tables for v in table.slices[name]] for name in tables[0].slices},
    )


def _ignored_notes(ignored: Sequence[str]) -> tuple[str, ...]:
    return (f"columns that are not read: {some(sorted(set(ignored)))}",) if ignored else ()
