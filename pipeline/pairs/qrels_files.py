"""Queries, a corpus and their relevance as three files with ids, as BEIR has them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.data.mteb_tasks import prefixed_errors
from pipeline.data.source_files import find_files
from pipeline.data.table_checks import group_names, text_values, whole_values
from pipeline.errors import DataError
from pipeline.labelled_files.column_names import some
from pipeline.labelled_files.formats import header_readings, read_table
from pipeline.labelled_files.sources import read_content
from pipeline.pairs.values import read_values, slice_values
from pipeline.records import MtebTask

_QRELS = ("query-id", "corpus-id", "score")
_IDS = ("_id", *_QRELS)


@dataclass(frozen=True)
class Queries:
    """Test queries with their relevant passages."""

    queries: list[str]
    """Query of each pair."""
    passages: list[str]
    """Passage of each pair."""
    slices: dict[str, list[str]]
    """Column of the queries' file -> its value for each pair."""
    corpus: list[str]
    """Distinct texts of the corpus, in its order."""
    sha256: str
    """Hash of the files."""
    notes: list[str]


def read_queries(task: MtebTask, *, offline: bool) -> Queries:
    """Read the queries, the corpus and the relevance of a retrieval task. A relevance above 0 makes a pair.

    Args:
        task: The planned task.
        offline: Whether files on the Hub are refused.
    Raises: DataError: a file has a fault, an id does not exist or occurs twice, or no passage is relevant.
    """
    digest = hashlib.sha256()
    columns = tuple(dict.fromkeys(("_id", "text", *task.slices)))
    queries = _read(task, "test", task.test_location, columns, offline=offline, digest=digest)
    corpus = _read(task, "corpus", task.corpus_location, ("_id", "text"), offline=offline, digest=digest)
    qrels = _read(task, "qrels", task.qrels_location, _QRELS, offline=offline, digest=digest)
    row_of_query, row_of_text = _rows_by_id(queries, f"{task.name}: test"), _rows_by_id(corpus, f"{task.name}: corpus")
    relevance = read_values(pa.array(qrels["score"]), f"{task.name}: qrels: column 'score'")
    for column, rows, what in (("query-id", row_of_query, "test"), ("corpus-id", row_of_text, "corpus")):
        if unknown := [name for name in dict.fromkeys(qrels[column]) if name not in rows]:
            raise DataError(
                f"{task.name}: qrels: {column} {some(unknown)} does not exist in {what}; "
                f"expected an _id of {what}; remove these rows, or add the ids"
            )
    pairs = [
        (row_of_query[query], row_of_text[text])
        for query, text, degree in zip(qrels["query-id"], qrels["corpus-id"], relevance, strict=True)
        if degree > 0
    ]
    if not pairs:
        raise DataError(f"{task.name}: qrels has no positive pair: no score is above 0; expected relevant passages")
    without = len(row_of_query) - len({query for query, _ in pairs})
    return Queries(
        queries=[queries["text"][query] for query, _ in pairs],
        passages=[corpus["text"][text] for _, text in pairs],
        slices={name: [queries[name][query] for query, _ in pairs] for name in task.slices},
        corpus=list(dict.fromkeys(corpus["text"])),
        sha256=digest.hexdigest(),
        notes=[f"queries of test without a relevant passage, left out: {without}"] if without else [],
    )


def _read(
    task: MtebTask, what: str, location: str | None, columns: Sequence[str], *, offline: bool, digest: Any
) -> dict[str, list[str]]:
    """Return the columns of all files of a location, as strings. The title of a passage stands before its text."""
    assert location is not None
    table: dict[str, list[str]] = {name: [] for name in columns}
    for path in find_files(task, what, location, offline=offline).paths:
        with prefixed_errors(f"{task.name}: {what}"):
            content = read_content(path)
            titles = ["title"] if what == "corpus" and "title" in max(header_readings(content, path), key=len) else []
            rows = read_table(content, path, columns={name: name for name in (*columns, *titles)})
            read = {name: _strings(rows[name], name, path) for name in (*columns, *titles)}
        digest.update(what.encode() + content)
        if titles:
            read["text"] = [f"{title} {text}".strip() for title, text in zip(read["title"], read["text"], strict=True)]
        for name in columns:
            table[name] += read[name]
    return table


def _strings(values: Any, name: str, where: str) -> list[str]:
    """Return texts as they are, and ids and slices of any type as strings."""
    if name in ("text", "title"):
        return text_values(values, name, where)
    if name in _IDS:
        return whole_values(group_names(values, name, where), name, where)
    return slice_values(values, name, where)


def _rows_by_id(table: dict[str, list[str]], where: str) -> dict[str, int]:
    """Return id -> row.

    Raises: DataError: an id occurs twice.
    """
    rows = {name: row for row, name in enumerate(table["_id"])}
    if len(rows) < len(table["_id"]):
        twice = [name for name, count in Counter(table["_id"]).items() if count > 1]
        raise DataError(f"{where}: the _id {some(twice)} occurs more than once; give each text its own")
    return rows
