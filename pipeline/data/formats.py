"""The formats of labelled files: Parquet, CSV and JSON Lines, read into one kind of table."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import DataError, first_line

_FORMATS = {
    **dict.fromkeys((".csv", ".tsv"), "CSV"),
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "JSON Lines"),
    **dict.fromkeys((".parquet", ".parq", ".pq"), "Parquet"),
}


_BINARY = {  # how files begin that are no text
    b"PAR1": "Parquet",
    b"PARE": "encrypted Parquet",
    b"ARROW1": "Arrow",
    b"PK\x03\x04": "a zip archive or an Excel sheet",
    b"\xd0\xcf\x11\xe0": "an old Excel sheet",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstandard",
    b"ORC": "ORC",
    b"Obj\x01": "Avro",
    b"SQLite format 3": "an SQLite database",
}


_GZIP = b"\x1f\x8b"


_SEPARATORS = (",", ";", "\t", "|")


_MOST_NAMES = 12  # in one message


_JSON_KINDS = {
    str: "a string",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "an object",
}


def read_table(content: bytes, path: str, *, columns: Mapping[str, str]) -> Any:
    """The columns, and ``label_text`` if there is one, as a pyarrow table. What CSV holds is strings, all of it.

    The ending of the name says what the file is, or else how it begins. gzip is seen by its first bytes.

    Args:
        content: Of the file.
        path: For messages.
        columns: Key of the config -> name of the column.
    Raises: DataError: another format, a fault in it, a column that is missing or there twice.
    """
    if content.startswith(_GZIP):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path} cannot be unpacked: {first_line(error)}; write the file again") from None
    match _checked_format(content, path):
        case "CSV":
            return _read_csv(_decode(content, path), path, columns)
        case "JSON Lines":
            return _read_json_lines(_decode(content, path), path, columns)
        case _:
            return _read_parquet(content, path, columns)


def some(names: Sequence[str]) -> str:
    """The first of the names as Python writes them, and how many more there are."""
    rest = len(names) - _MOST_NAMES
    return ", ".join(map(repr, names[:_MOST_NAMES])) + (f" and {rest} more" if rest > 0 else "")


def _checked_format(content: bytes, path: str) -> str:
    """The format that the name claims and the content does not contradict."""
    if not content:
        raise DataError(f"{path} is empty (0 bytes)")
    claimed, found = format_of(path), _format_seen(content)
    if claimed is None and found not in ("Parquet", "JSON Lines"):
        raise DataError(
            f"{path}: its name does not say what it is, and its content is {found}; expected a name that ends in {ENDINGS}"
        )
    if (claimed == "Parquet" or found in _BINARY.values()) and claimed not in (found, None):
        raise DataError(
            f"{path} is named as {claimed}, but its content is {found}; expected a name and a content that agree"
        )
    if claimed == "JSON Lines" and found == "a JSON array":
        raise DataError(f"{path} is one JSON array; expected JSON Lines, one object on each line")
    return claimed or found


def _format_seen(content: bytes) -> str:
    try:
        start = codecs.getincrementaldecoder("utf-8-sig")().decode(
            content[:4096]
        )  # incremental: the cut may be in a character
    except UnicodeDecodeError:
        start = "\0"
    if "\0" in start:
        return next((name for magic, name in _BINARY.items() if content.startswith(magic)), "not text in UTF-8")
    first = start.lstrip()[:1]
    return {"{": "JSON Lines", "[": "a JSON array"}.get(first, "text")


def _decode(content: bytes, path: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        where = f"byte {error.start} (0x{content[error.start]:02x}, line {line})"
        raise DataError(f"{path} is not UTF-8: {where} cannot be decoded; write the file again in UTF-8") from None


def _read_csv(text: str, path: str, columns: Mapping[str, str]) -> Any:
    csv.field_size_limit(2**31 - 1)  # by default a text of 131,072 characters is an error
    separator, header = _separator(text, path, columns)
    wanted = _wanted(header, columns)
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
        _check_columns(likeliest, path, columns, hint="; its first line has to name the columns")
        raise AssertionError("a header with all columns fits")
    _check_columns(headers[fitting[0]], path, columns)
    return fitting[0], headers[fitting[0]]


def _read_json_lines(text: str, path: str, columns: Mapping[str, str]) -> Any:
    decode = json.JSONDecoder(object_pairs_hook=_object, parse_constant=lambda name: None).decode  # NaN: no value
    rows, lines, names = [], [], dict[str, None]()
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = decode(line)
        except json.JSONDecodeError as error:
            fault = f"line {number} is not JSON: {error.msg} at column {error.colno}"
            raise DataError(f"{path}: {fault}; expected one object on each line") from None
        except (
            ValueError,
            RecursionError,
        ) as error:  # a key twice; a number of thousands of digits; thousands of brackets
            raise DataError(
                f"{path}: line {number}: {first_line(error).partition(';')[0]}; write the file again"
            ) from None
        if not isinstance(row, dict):
            raise DataError(
                f"{path}: line {number} is {_JSON_KINDS.get(type(row), 'null')}; expected an object, such as {{...}}"
            )
        names |= dict.fromkeys(row)
        rows.append(tuple(map(row.get, (*columns.values(), "label_text"))))
        lines.append(number)
    _check_columns(list(names), path, columns)
    wanted = _wanted(list(names), columns)
    by_name = dict(zip((*columns.values(), "label_text"), zip(*rows, strict=True), strict=True))
    return pa.table({name: _json_column(by_name[name], lines, f"{path}: column {name!r}") for name in wanted})


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        times = Counter(name for name, _ in pairs)
        raise ValueError(
            f"the key {next(name for name, count in times.items() if count > 1)!r} occurs twice in an object"
        )
    return values


def _json_column(values: Sequence[Any], lines: Sequence[int], where: str) -> Any:
    """An array of the one kind of value that the column has."""
    first: dict[str, int] = {}
    for value, line in zip(values, lines, strict=True):
        if value is not None:
            first.setdefault(_JSON_KINDS[type(value)], line)
    if len(first) > 1:
        found = " and ".join(f"{kind} (line {line})" for kind, line in first.items())
        raise DataError(f"{where} holds {found}; write them alike")
    if (
        "a list" in first or "an object" in first
    ):  # nobody can learn from these: only the type is needed, for the message
        return pa.nulls(len(values), pa.list_(pa.null()) if "a list" in first else pa.struct([]))
    try:
        return pa.array(values)
    except UnicodeEncodeError:
        line = next(
            line for value, line in zip(values, lines, strict=True) if value is not None and not _is_encodable(value)
        )
        raise DataError(
            f"{where}: line {line} holds half a surrogate pair (\\ud800 to \\udfff), which is no character"
        ) from None
    except (OverflowError, pa.ArrowInvalid):
        raise DataError(f"{where} holds a whole number that needs more than 64 bits; write it as a string") from None


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_parquet(content: bytes, path: str, columns: Mapping[str, str]) -> Any:
    try:
        file = pq.ParquetFile(pa.BufferReader(content))
        names, num_rows = file.schema_arrow.names, file.metadata.num_rows
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: its footer cannot be read: {first_line(error)}; write the file again") from None
    _check_columns(names, path, columns)
    wanted = _wanted(names, columns)
    try:
        table = file.read(columns=wanted)
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"{path}: the columns {some(wanted)} cannot be read: {first_line(error)}; write the file again"
        ) from None
    if table.num_rows != num_rows:
        raise DataError(
            f"{path}: its footer promises {num_rows} rows, but {some(wanted)} hold {table.num_rows}; write the file again"
        )
    return table


def _check_columns(names: Sequence[str], path: str, columns: Mapping[str, str], *, hint: str = "") -> None:
    for key, column in columns.items():
        if column not in names:
            shown = some(
                [name if len(name) <= 60 else f"{name[:60]}…" for name in names]
            )  # a first line without names is text
            there = f"but {shown}" if names else "and no other"
            raise DataError(
                f"{path} has no column {column!r}, {there}; set {key} for this MTEB task in the config{hint}"
            )
        if (count := names.count(column)) > 1:
            raise DataError(f"{path} has {count} columns named {column!r}; give each its own name")


def _wanted(names: Sequence[str], columns: Mapping[str, str]) -> list[str]:
    also = ["label_text"] if names.count("label_text") == 1 else []
    return list(dict.fromkeys((*columns.values(), *also)))


ENDINGS = f"{', '.join(_FORMATS)}, each perhaps with .gz"


def format_of(name: str) -> str | None:
    """Format that a file's name promises; None if it promises none."""
    return _FORMATS.get(PurePosixPath(name.lower().removesuffix(".gz")).suffix)
