"""Checks of a bulk job's input: the columns to keep, the text column, and the names that the output adds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import DataError
from pipeline.parquet.footers import Footer
from pipeline.parquet.metadata import is_utf8
from pipeline.parquet.widening import binary_type, text_type
from pipeline.storage.listing import StoredFile
from pipeline.storage.place import open_file, store_errors

_FIRST_ROWS = 64
_MOST_NAMES = 12
_RENAME = "give the adapter another name (--adapter NAME=REF)"


def check_kept_columns(
    good: Mapping[str, Footer], *, text_column: str, columns: Sequence[str] | None, of_table: Sequence[str] | None
) -> tuple[str, ...]:
    """Return the columns to keep, in their order.

    Args:
        good: The footers that could be read, by path.
        text_column: Column of the texts.
        columns: Columns to keep; None for all.
        of_table: Columns of the table that the files are; others are dropped. None if they are no table.
    Raises: DataError: a column is missing, occurs twice, or the text column holds no text.
    """
    schemas = {id(footer.schema): (path, footer.schema) for path, footer in good.items()}
    every = dict[str, None]()
    for path, schema in schemas.values():
        twice = sorted(name for name, count in Counter(schema.names).items() if count > 1)
        if twice:
            raise DataError(f"{path}: {', '.join(twice)} is the name of more than one column; rename them")
        every |= dict.fromkeys(schema.names)
        if text_column not in schema.names:
            raise DataError(
                f"{path}: no column {text_column!r}; its columns are {_some(schema.names)}; see --text-column"
            )
    if unknown := [name for name in columns or () if name not in every]:
        raise DataError(
            f"{next(iter(good))}: no column {unknown[0]!r}; its columns are {_some([*every])}; see --columns"
        )
    _check_text(good, text_column)
    return tuple(
        name for name in every if (columns is None or name in columns) and (of_table is None or name in of_table)
    )


def _check_text(good: Mapping[str, Footer], column: str) -> None:
    """Raises: DataError: the column is not text in some file, or is null in all of them."""
    kinds = {path: footer.schema.field(column).type for path, footer in good.items()}
    for path, kind in kinds.items():
        if not text_type(kind) and not binary_type(kind) and not pa.types.is_null(kind):
            raise DataError(f"{path}: column {column!r} is {kind}, not text; choose another --text-column")
    if all(pa.types.is_null(kind) for kind in kinds.values()):
        raise DataError(f"{next(iter(kinds))}: column {column!r} has no value in any row; choose another --text-column")
    binary = next((path for path, kind in kinds.items() if binary_type(kind) and good[path].num_rows), None)
    if binary is not None and not _looks_like_text(binary, column):
        raise DataError(
            f"{binary}: column {column!r} is binary, and its first values are not UTF-8 text; "
            "choose another --text-column"
        )


def _looks_like_text(path: str, column: str) -> bool:
    try:
        with closing(open_file(path)) as source:
            first = next(pq.ParquetFile(source).iter_batches(batch_size=_FIRST_ROWS, columns=[column]), None)
    except store_errors(pa.ArrowException):
        return True  # its units will report what is wrong
    values = [] if first is None else [value for value in first.column(0).cast(pa.large_binary()).to_pylist() if value]
    return not values or any(is_utf8(value) for value in values)


def check_new_names(first: str, kept: Sequence[str], new_columns: Sequence[str], stored: Sequence[StoredFile]) -> None:
    """Check that the columns that the output adds have new names. Like DuckDB and Spark, ignore case.

    Raises: DataError: the input has a column or a partition of such a name, or two adapters add the same name.
    """
    folded = Counter(name.casefold() for name in new_columns)
    if twice := [name for name in new_columns if folded[name.casefold()] > 1]:
        raise DataError(
            f"the output would have the columns {' and '.join(twice[:2])}, which many tools treat as one; {_RENAME}"
        )
    if taken := [name for name in kept if name.casefold() in folded]:
        remedy = "drop it with --columns" if taken == ["truncated"] else f"{_RENAME}, or drop the column with --columns"
        raise DataError(f"{first}: it has {_some(taken)} already, which the output would add; {remedy}")
    partitions = {part.partition("=")[0] for file in stored for part in file.below.split("/")[:-1] if "=" in part}
    if taken := sorted(name for name in partitions if name.casefold() in folded):
        raise DataError(
            f"{first}: its partition folders are called {_some(taken)}, which the output would add; {_RENAME}"
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_MOST_NAMES]) + (
        f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    )
