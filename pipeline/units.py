"""What a bulk job reads: Parquet files, checked by their footers, and cut into units of rows. Reads no data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from hashlib import sha256
from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import DataError, first_line
from pipeline.printable import counted
from pipeline.records import Record
from pipeline.storage import StoredFile, find_files, open_file, store_errors

_READERS = 16


class InputFile(Record):
    """One input file, as it was when the job began."""

    path: str
    size: int
    version: str
    """Its etag, or the time of its last change."""
    num_rows: int | None
    """None where its footer cannot be read: it has no units then, and those of later files have other numbers."""


class Unit(Record):
    """A range of rows of one file: whole row groups, or a slice of a large one. What is done, or done again, as a whole."""

    number: int
    """Over the whole job."""
    path: str
    output: str
    """Name of its output file, relative to the output folder."""
    row_groups: tuple[int, ...]
    first_row: int
    """Within the row groups."""
    num_rows: int
    first_row_of_file: int
    """Of the unit, counted from the start of the file."""


class UnitFailure(Record):
    """A unit, or a file that could not even be cut into units, without output. The others did not care."""

    path: str
    unit: int | None
    """None for a whole file."""
    first_row: int | None
    num_rows: int | None
    reason: str


@dataclass(frozen=True)
class BulkInput:
    """All that is to be done."""

    files: tuple[InputFile, ...]
    units: tuple[Unit, ...]
    failures: tuple[UnitFailure, ...]
    """Files that cannot be read."""
    columns: tuple[str, ...]
    """Those that are kept, in their order."""

    @property
    def num_rows(self) -> int:
        """Of all units."""
        return sum(unit.num_rows for unit in self.units)


def plan_input(
    pattern: str, *, text_column: str, columns: Sequence[str] | None, new_columns: Sequence[str], rows_per_unit: int, limit: int | None
) -> BulkInput:
    """List the input, check every file's footer, and cut it into units.

    Args:
        pattern: A file, a folder, a glob, or an fsspec URL of one.
        text_column: What is classified.
        columns: Those to keep; all where left out.
        new_columns: Names that the output adds.
        rows_per_unit: Rows of a unit, at most.
        limit: Rows of the whole job, at most.
    Raises: InputError: no file, no row, no such column, not text, schemas that differ, a name that is taken.
    """
    stored = find_files(pattern)
    with ThreadPoolExecutor(_READERS) as pool:
        footers = list(pool.map(_read_footer, stored))
    good = [(file, footer) for file, footer in zip(stored, footers, strict=True) if isinstance(footer, _Footer)]
    failures = tuple(
        UnitFailure(path=file.path, unit=None, first_row=None, num_rows=None, reason=footer)
        for file, footer in zip(stored, footers, strict=True)
        if isinstance(footer, str)
    )
    if not good:
        raise DataError(f"input {pattern}: none of its {counted(len(stored), 'file')} can be read; {stored[0].path}: {failures[0].reason}")
    kept = _check_columns(good, text_column=text_column, columns=columns, new_columns=new_columns)
    units = _cut(stored, good, rows_per_unit=rows_per_unit, limit=limit)
    if not units:
        raise DataError(f"input {pattern}: no rows in its {counted(len(stored), 'file')}; there is nothing to classify")
    files = tuple(
        InputFile(path=file.path, size=file.size, version=file.version, num_rows=footer.num_rows if isinstance(footer, _Footer) else None)
        for file, footer in zip(stored, footers, strict=True)
    )
    return BulkInput(files, units, failures, kept)


def text_type(kind: pa.DataType) -> bool:
    """Whether a column of this type holds text."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


@dataclass(frozen=True)
class _Footer:
    schema: pa.Schema
    row_groups: tuple[int, ...]
    """Rows of each."""

    @property
    def num_rows(self) -> int:
        return sum(self.row_groups)


def _read_footer(file: StoredFile) -> _Footer | str:
    """The footer, or why there is none."""
    try:
        with closing(open_file(file.path)) as source:
            parquet = pq.ParquetFile(source)
            groups = tuple(parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups))
            return _Footer(parquet.schema_arrow, groups)
    except store_errors(pa.ArrowException) as error:
        if file.size == 0:
            return "the file is empty (0 bytes)"
        return f"not a whole Parquet file: {first_line(error)}"


def _check_columns(
    good: Sequence[tuple[StoredFile, _Footer]], *, text_column: str, columns: Sequence[str] | None, new_columns: Sequence[str]
) -> tuple[str, ...]:
    first, schema = good[0][0], good[0][1].schema
    for file, footer in good:
        twice = sorted({name for name in footer.schema.names if footer.schema.names.count(name) > 1})
        if twice:
            raise DataError(f"{file.path}: {', '.join(twice)} is the name of more than one column; rename them")
    for name in (text_column, *(columns or ())):
        if name not in schema.names:
            raise DataError(f"{first.path}: no column {name!r}; its columns are {', '.join(schema.names)}; see --text-column and --columns")
    if not text_type(schema.field(text_column).type):
        raise DataError(f"{first.path}: column {text_column!r} is {schema.field(text_column).type}, not text; choose another --text-column")
    kept = tuple(name for name in schema.names if columns is None or name in columns)
    taken = sorted(set(kept) & set(new_columns))
    if taken:
        raise DataError(
            f"{first.path}: it has {', '.join(taken)} already, which the output adds; name the adapter anew (--adapter NAME=REF), "
            "or leave the column out with --columns"
        )
    needed = sorted({*kept, text_column}, key=schema.names.index)
    expected = [(name, schema.field(name).type) for name in needed]
    for file, footer in good[1:]:
        other = footer.schema
        found = [(name, other.field(name).type if name in other.names else "missing") for name in needed]
        if found != expected or (columns is None and set(other.names) != set(schema.names)):
            here = next((f"{n} is {t} there and {e[1]} here" for (n, t), e in zip(found, expected, strict=True) if t != e[1]), None)
            extra = ", ".join(sorted(set(other.names) - set(schema.names)))
            raise DataError(
                f"{file.path}: its schema is not that of {first.path}: {here or f'it has {extra} besides'}; "
                "classify them in two jobs, or choose the columns that they share with --columns"
            )
    return kept


def _cut(
    stored: Sequence[StoredFile], good: Sequence[tuple[StoredFile, _Footer]], *, rows_per_unit: int, limit: int | None
) -> tuple[Unit, ...]:
    units: list[Unit] = []
    left = limit
    stems = _stems(stored)
    for file, footer in good:
        for index, (row_groups, first_row, num_rows, first_of_file) in enumerate(_ranges(footer.row_groups, rows_per_unit)):
            take = num_rows if left is None else min(num_rows, left)
            if take <= 0:
                return tuple(units)
            left = None if left is None else left - take
            units.append(
                Unit(
                    number=len(units),
                    path=file.path,
                    output=f"{stems[file.path]}-{index:05d}.parquet",
                    row_groups=row_groups,
                    first_row=first_row,
                    num_rows=take,
                    first_row_of_file=first_of_file,
                )
            )
    return tuple(units)


def _ranges(row_groups: Sequence[int], rows_per_unit: int) -> list[tuple[tuple[int, ...], int, int, int]]:
    """(row groups, first row within them, rows, first row within the file) of each unit of a file."""
    ranges: list[tuple[tuple[int, ...], int, int, int]] = []
    together: list[int] = []
    rows, start = 0, 0
    for group, of_group in enumerate(row_groups):
        if together and rows + of_group > rows_per_unit:
            ranges.append((tuple(together), 0, rows, start))
            together, start, rows = [], start + rows, 0
        if of_group > rows_per_unit:
            slices = range(0, of_group, rows_per_unit)
            ranges.extend(((group,), first, min(rows_per_unit, of_group - first), start + first) for first in slices)
            start += of_group
        elif of_group:
            together.append(group)
            rows += of_group
    if together:
        ranges.append((tuple(together), 0, rows, start))
    return ranges


def _stems(files: Sequence[StoredFile]) -> dict[str, str]:
    """What the output files of each input file begin with. It depends on that file alone, so that one that is mended later shifts no other.

    Partition folders (``key=value``) are kept, so that the output can be read as the input was; other folders are not, and where two
    files would meet, each gets a part of its path's hash.
    """
    stems: dict[str, str] = {}
    for file in files:
        pure = PurePosixPath(file.below)
        stems[file.path] = "/".join([*(part for part in pure.parent.parts if "=" in part), pure.stem])
    times = Counter(stems.values())
    return {path: stem if times[stem] == 1 else f"{stem}-{sha256(path.encode()).hexdigest()[:8]}" for path, stem in stems.items()}
