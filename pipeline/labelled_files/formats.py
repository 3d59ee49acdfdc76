"""Labelled files in CSV, TSV, JSON Lines or Parquet, each optionally in gzip, read as pyarrow tables.

The standard library reads CSV and JSON: it guesses no types, and names the line of a fault.
"""

from __future__ import annotations

import codecs
import gzip
import zlib
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import DataError, first_line
from pipeline.labelled_files.column_names import check_columns, some, wanted_columns
from pipeline.labelled_files.csv_files import headers_of_csv, read_csv
from pipeline.labelled_files.json_lines import keys_of_json_lines, read_json_lines

_FORMATS = {
    **dict.fromkeys((".csv", ".tsv"), "CSV"),
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "JSON Lines"),
    **dict.fromkeys((".parquet", ".parq", ".pq"), "Parquet"),
}
ENDINGS = f"{', '.join(_FORMATS)}, each optionally with .gz"
"""Endings of the files that can be read, in words."""
_BINARY = {  # first bytes of files that are not text
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


def read_table(content: bytes, path: str, *, columns: Mapping[str, str]) -> Any:
    """Read the configured columns, and ``label_text`` if it exists, as a pyarrow table.

    The format follows from the ending of the name, or else from the first bytes. gzip is detected by its first bytes.
    All columns of CSV are strings.

    Args:
        content: Bytes of the file.
        path: Name of the file, also for messages.
        columns: Config key -> column name.
    Raises: DataError: the format is another one, the file has a fault, or a column is missing or occurs twice.
    """
    content = _unpacked(content, path)
    match _checked_format(content, path):
        case "CSV":
            return read_csv(_decode(content, path), path, columns)
        case "JSON Lines":
            return read_json_lines(_decode(content, path), path, columns)
        case _:
            return _read_parquet(content, path, columns)


def header_readings(content: bytes, path: str) -> list[list[str]]:
    """Return the names of the columns: for CSV one list for each separator that its first line can be read with.

    Args:
        content: Bytes of the file.
        path: Name of the file, also for messages.
    Raises: DataError: the format is another one, or the file has a fault.
    """
    content = _unpacked(content, path)
    match _checked_format(content, path):
        case "CSV":
            return list(headers_of_csv(_decode(content, path)).values()) or [[]]
        case "JSON Lines":
            return [keys_of_json_lines(_decode(content, path), path)]
        case _:
            return [_open_parquet(content, path).schema_arrow.names]


def _unpacked(content: bytes, path: str) -> bytes:
    if not content.startswith(_GZIP):
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be unpacked: {first_line(error)}; write the file again") from None


def _checked_format(content: bytes, path: str) -> str:
    """Return the format of a file.

    Raises: DataError: name and content contradict each other, or neither shows a known format.
    """
    if not content:
        raise DataError(f"{path} is empty (0 bytes)")
    claimed, found = format_of(path), _format_seen(content)
    if claimed is None and found not in ("Parquet", "JSON Lines"):
        raise DataError(
            f"{path}: its name does not show its format, and its content is {found}; "
            f"expected a name that ends in {ENDINGS}"
        )
    if (claimed == "Parquet" or found in _BINARY.values()) and claimed not in (found, None):
        raise DataError(f"{path} is named as {claimed}, but its content is {found}; expected name and content to agree")
    if claimed == "JSON Lines" and found == "a JSON array":
        raise DataError(f"{path} is one JSON array; expected JSON Lines, one object on each line")
    return claimed or found


def _format_seen(content: bytes) -> str:
    try:
        # An incremental decoder accepts a cut inside a character.
        start = codecs.getincrementaldecoder("utf-8-sig")().decode(content[:4096])
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


def _read_parquet(content: bytes, path: str, columns: Mapping[str, str]) -> Any:
    file = _open_parquet(content, path)
    names, num_rows = file.schema_arrow.names, file.metadata.num_rows
    check_columns(names, path, columns)
    wanted = wanted_columns(names, columns)
    try:
        table = file.read(columns=wanted)
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"{path}: the columns {some(wanted)} cannot be read: {first_line(error)}; write the file again"
        ) from None
    if table.num_rows != num_rows:
        raise DataError(
            f"{path}: its footer promises {num_rows} rows, but {some(wanted)} hold {table.num_rows}; "
            "write the file again"
        )
    return table


def _open_parquet(content: bytes, path: str) -> Any:
    try:
        file = pq.ParquetFile(pa.BufferReader(content))
        _ = file.schema_arrow.names, file.metadata.num_rows
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: its footer cannot be read: {first_line(error)}; write the file again") from None
    return file


def format_of(name: str) -> str | None:
    """Return the format that the ending of a file's name stands for; None for any other ending."""
    return _FORMATS.get(PurePosixPath(name.lower().removesuffix(".gz")).suffix)
