"""TODO."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any

import pyarrow as pa

from pipeline.data.column_names import check_columns, wanted_columns
from pipeline.errors import DataError

_SEPARATORS = (",", ";", "\t", "|")


def read_csv(text: str, path: str, columns: Mapping[str, str]) -> Any:
    csv.field_size_limit(2**31 - 1)  # by default a text of 131,072 characters is an error
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
                found = f"line {reader.line_num} ends a row of {len(row)} values, but the header names {len(header)} columns"
                raise DataError(
                    f"{path}: {found}; a value that holds {separator!r} or a line break has to be in quotation marks"
                )
    except csv.Error as error:
        raise DataError(
            f"{path}: line {reader.line_num}: {error}; a quotation mark inside quotation marks has to be doubled"
        ) from None
    if separator == "\t" and reader.line_num > len(rows) + num_empty and _is_whole_without_quotes(text, header):
        raise DataError(
            f"{path}: quotation marks join lines that are rows without them; double those that belong to a text, or use JSON Lines"
        )
    values = list(zip(*rows[1:], strict=True)) or [()] * len(wanted)
    return pa.table({name: pa.array(of_column, pa.string()) for name, of_column in zip(wanted, values, strict=True)})


def _is_whole_without_quotes(text: str, header: Sequence[str]) -> bool:
    """Whether each line is a row by itself. Many TSV files mean their quotation marks as signs like others."""
    return all(line.count("\t") == len(header) - 1 for line in io.StringIO(text) if line.strip())


def _separator(text: str, path: str, columns: Mapping[str, str]) -> tuple[str, list[str]]:
    """The separator under which the first line names the columns, and their names."""
    headers = {}
    for separator in _SEPARATORS:
        try:
            headers[separator] = next(
                filter(None, csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)), []
            )
        except csv.Error:
            continue
    fitting = [separator for separator, header in headers.items() if set(columns.values()) <= set(header)]
    if len(fitting) > 1:
        raise DataError(
            f"{path}: its first line names the columns with {' and with '.join(map(repr, fitting))} between them; rename them"
        )
    if not fitting:
        likeliest = max(headers.values(), key=len, default=[])
        check_columns(likeliest, path, columns, hint="; its first line has to name the columns")
        raise AssertionError("a header with all columns fits")
    check_columns(headers[fitting[0]], path, columns)
    return fitting[0], headers[fitting[0]]
