"""CSV and TSV files of texts and labels."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any

import pyarrow as pa

from pipeline.errors import DataError
from pipeline.labelled_files.column_names import check_columns, wanted_columns

_SEPARATORS = (",", ";", "\t", "|")


def read_csv(text: str, path: str, columns: Mapping[str, str]) -> Any:
    """Read a CSV or TSV file as a pyarrow table of strings.

    Args:
        text: Content of the file. Its first line names the columns.
        path: Name of the file, for messages.
        columns: Config key -> column name.
    Raises: DataError: a column is missing, or a row does not fit the header.
    """
    csv.field_size_limit(2**31 - 1)  # the default refuses texts of 131,072 characters
    separator, header = _separator(text, path, columns)
    wanted = wanted_columns(header, columns)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    values_of, rows, num_empty = itemgetter(*map(header.index, wanted)), [], 0
    try:
        for row in reader:
            if len(row) == len(header):
                rows.append(values_of(row))
            elif not row:
                num_empty += 1  # an empty line is no row
            else:
                raise DataError(
                    f"{path}: line {reader.line_num} ends a row of {len(row)} values, "
                    f"but the header names {len(header)} columns; "
                    f"put a value that holds {separator!r} or a line break in quotation marks"
                )
    except csv.Error as error:
        raise DataError(
            f"{path}: line {reader.line_num}: {error}; double a quotation mark inside quotation marks"
        ) from None
    if separator == "\t" and reader.line_num > len(rows) + num_empty and _is_whole_without_quotes(text, header):
        raise DataError(
            f"{path}: quotation marks join lines that are rows without them; "
            "double those that belong to a text, or use JSON Lines"
        )
    values = list(zip(*rows[1:], strict=True)) or [()] * len(wanted)
    return pa.table({name: pa.array(column, pa.string()) for name, column in zip(wanted, values, strict=True)})


def headers_of_csv(text: str) -> dict[str, list[str]]:
    """Return the names of the columns in the first line, by each separator that can read it."""
    csv.field_size_limit(2**31 - 1)  # the default refuses texts of 131,072 characters
    headers = {}
    for separator in _SEPARATORS:
        try:
            headers[separator] = next(
                filter(None, csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)), []
            )
        except csv.Error:
            continue
    return headers


def _is_whole_without_quotes(text: str, header: Sequence[str]) -> bool:
    """Return whether each line is a row by itself. Many TSV files use quotation marks as plain characters."""
    return all(line.count("\t") == len(header) - 1 for line in io.StringIO(text) if line.strip())


def _separator(text: str, path: str, columns: Mapping[str, str]) -> tuple[str, list[str]]:
    """Return the separator under which the first line names the columns, and all names in that line.

    Raises: DataError: no separator fits, or several do.
    """
    headers = headers_of_csv(text)
    fitting = [separator for separator, header in headers.items() if set(columns.values()) <= set(header)]
    if len(fitting) > 1:
        raise DataError(
            f"{path}: its first line names the columns with {' and with '.join(map(repr, fitting))} between them; "
            "rename them"
        )
    if not fitting:
        likeliest = max(headers.values(), key=len, default=[])
        check_columns(likeliest, path, columns, hint="; its first line must name the columns")
        raise AssertionError("a header with all columns fits")
    check_columns(headers[fitting[0]], path, columns)
    return fitting[0], headers[fitting[0]]
