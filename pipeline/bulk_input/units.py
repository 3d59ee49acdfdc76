"""The input of a bulk job: Parquet files, checked by their footers and cut into units of rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import PurePosixPath
from typing import Literal

import pyarrow as pa

from pipeline.bulk_input.checks import check_kept_columns, check_new_names
from pipeline.errors import DataError
from pipeline.parquet.footers import Dates, Footer, read_dates, read_footers
from pipeline.parquet.schema import FileSchema, changed_types, join_schemas
from pipeline.parquet.table_formats import check_columns, live_files
from pipeline.printable import counted
from pipeline.records import Record
from pipeline.storage.listing import FoundFiles, StoredFile, find_files

_MOST_UNITS = 1_000_000
_LONGEST_STEM_BYTES = 180  # of the 255 of a file name; the rest of the temporary's name needs some


class InputFile(Record):
    """One input file, as it was when the job was planned."""

    path: str
    size: int
    version: str
    """Etag, or time of the last change."""
    num_rows: int | None
    """Number of rows. None if its footer cannot be read, so that it has no units."""


class Unit(Record):
    """A range of rows of one file: whole row groups, or a slice of one. It is written, or retried, as a whole."""

    number: int
    """Number of the unit within the whole job, from 0."""
    path: str
    output: str
    """Output file, relative to the output folder."""
    row_groups: tuple[int, ...]
    first_row: int
    """First row of the unit, counted from the start of its row groups."""
    num_rows: int
    first_row_of_file: int
    """First row of the unit, counted from the start of the file."""


class UnitFailure(Record):
    """A unit that failed, or a file that cannot be cut into units. The other units are unaffected."""

    path: str
    unit: int | None
    """Number of the unit; None for a whole file."""
    first_row: int | None
    num_rows: int | None
    reason: str


@dataclass(frozen=True)
class BulkInput:
    """The files and units of a bulk job."""

    files: tuple[InputFile, ...]
    units: tuple[Unit, ...]
    failures: tuple[UnitFailure, ...]
    """Files that cannot be read, one entry each."""
    schema: pa.Schema
    """The columns to keep, in their order, with types that hold the values of all files."""
    int96_unit: Literal["ns", "us"]
    """Time unit in which INT96 columns are read."""
    changes: tuple[str, ...]
    """Types that the output cannot keep, one ``column: before becomes after`` each."""
    skipped: dict[str, int]
    """Reason -> number of input files that are skipped."""

    @property
    def num_rows(self) -> int:
        """Number of rows of all units."""
        return sum(unit.num_rows for unit in self.units)


def plan_input(
    pattern: str,
    *,
    text_column: str,
    columns: Sequence[str] | None,
    new_columns: Sequence[str],
    rows_per_unit: int,
    limit: int | None,
) -> BulkInput:
    """List the input, check the footer of every file, and cut the files into units.

    Args:
        pattern: A file, a folder, a glob, or an fsspec URL of one. The folder of a table stands for its live files.
        text_column: Column of the texts.
        columns: Columns to keep; None for all.
        new_columns: Names of the columns that the output adds.
        rows_per_unit: Largest number of rows of a unit.
        limit: Largest number of rows of the whole job; None for all.
    Raises: InputError: no file or no row is found, a column is missing or holds no text, schemas cannot be joined, or
        the output adds a column that exists.
    """
    found = live_files(pattern, find_files(pattern))
    stored = found.files
    good, kept, dates, faults = _read_files(found, text_column=text_column, columns=columns)
    if not good:
        raise DataError(
            f"input {pattern}: none of its {counted(len(stored), 'file')} can be read; {_first_fault(faults)}"
        )
    time_unit: Literal["ns", "us"] = "us" if any(ranges.are_far for ranges in dates) else "ns"
    in_microseconds = time_unit == "us"
    schemas = [FileSchema(path, f.in_microseconds if in_microseconds else f.schema) for path, f in good.items()]
    schema = join_schemas(schemas, kept)
    check_new_names(next(iter(good)), kept, new_columns, stored)
    units = _cut(stored, good, rows_per_unit=rows_per_unit, limit=limit)
    if not units:
        raise DataError(f"input {pattern}: no rows in its {counted(len(stored), 'file')}; there is nothing to do")
    return BulkInput(
        files=tuple(_input_file(file, good.get(file.path)) for file in stored),
        units=units,
        failures=tuple(
            UnitFailure(path=p, unit=None, first_row=None, num_rows=None, reason=fault) for p, fault in faults.items()
        ),
        schema=schema,
        int96_unit=time_unit,
        changes=(
            *_changes(schema, good.values()),
            *_date_changes(dates if in_microseconds else []),
        ),
        skipped=found.skipped,
    )


def _read_files(
    found: FoundFiles, *, text_column: str, columns: Sequence[str] | None
) -> tuple[dict[str, Footer], tuple[str, ...], list[Dates], dict[str, str]]:
    """Read footers and INT96 columns: the readable footers, the columns to keep, the dates, and the faults by path.

    Raises: DataError: as ``check_kept_columns``, or for a file that does not fit its table.
    """
    paths = [file.path for file in found.files]
    footers = dict(zip(paths, read_footers(paths), strict=True))
    good = {path: footer for path, footer in footers.items() if isinstance(footer, Footer)}
    for path, footer in good.items():
        check_columns(found, path, footer.schema.names)
    kept, dates = tuple[str, ...](), dict[str, Dates | str]()
    if good:
        kept = check_kept_columns(good, text_column=text_column, columns=columns, of_table=found.columns)
        dates = _read_dates(good, kept)
    faults = {path: fault for path, fault in (footers | dates).items() if isinstance(fault, str)}
    good = {path: footer for path, footer in good.items() if path not in faults}
    return good, kept, [ranges for ranges in dates.values() if isinstance(ranges, Dates)], faults


def _date_changes(dates: Sequence[Dates]) -> list[str]:
    """Describe what dates lose that are read in microseconds."""
    return ["INT96 columns: nanoseconds are cut to microseconds"] if any(found.are_fine for found in dates) else []


def _input_file(file: StoredFile, footer: Footer | None) -> InputFile:
    return InputFile(
        path=file.path, size=file.size, version=file.version, num_rows=None if footer is None else footer.num_rows
    )


def _first_fault(faults: Mapping[str, str]) -> str:
    path, fault = next(iter(faults.items()))
    return f"{path}: {fault}"


def _read_dates(good: Mapping[str, Footer], kept: Sequence[str]) -> dict[str, Dates | str]:
    """Read the INT96 columns of the files that have any: file -> their range, or why they cannot be read."""
    chosen, paths_of = set(kept), dict[tuple[str, ...], list[str]]()
    for path, footer in good.items():
        int96_columns = tuple(name for name, kinds in footer.kinds.items() if "int96" in kinds and name in chosen)
        paths_of.setdefault(int96_columns, []).append(path)
    dates: dict[str, Dates | str] = {}
    for columns, paths in paths_of.items():
        if columns:
            dates |= zip(paths, read_dates(paths, columns), strict=True)
    return dates


def _changes(schema: pa.Schema, footers: Collection[Footer]) -> list[str]:
    changes = dict[str, None]()
    for kinds in {id(footer.kinds): footer.kinds for footer in footers}.values():  # most files share their kinds
        changes |= dict.fromkeys(f"{name}: {change}" for name, change in changed_types(schema, kinds).items())
    kept = set(schema.names)
    for footer in footers:
        changes |= dict.fromkeys(f"{name}: {change}" for name, change in footer.lost_types.items() if name in kept)
    left_out = dict.fromkeys(key for footer in footers for key in footer.left_out)
    changes |= dict.fromkeys(f"footer key {key}: cannot be parsed, and is dropped" for key in left_out)
    labels = {footer.pandas_labels for footer in footers} - {""}
    return [*changes, *(f"labels of the columns in pandas: {kind} becomes text" for kind in sorted(labels))]


def _cut(
    stored: Sequence[StoredFile], good: Mapping[str, Footer], *, rows_per_unit: int, limit: int | None
) -> tuple[Unit, ...]:
    most = sum(footer.num_rows // rows_per_unit for footer in good.values())
    if most > _MOST_UNITS and (limit is None or limit // rows_per_unit > _MOST_UNITS):
        raise DataError(
            f"{most:,} units of {rows_per_unit:,} rows are more than {_MOST_UNITS:,}; choose a larger --rows-per-unit"
        )
    units: list[Unit] = []
    left = limit
    stems = _stems(stored)
    for path, footer in good.items():
        for index, (row_groups, first_row, num_rows, first_of_file) in enumerate(
            _ranges(footer.row_groups, rows_per_unit)
        ):
            take = num_rows if left is None else min(num_rows, left)
            if take <= 0:
                return tuple(units)
            left = None if left is None else left - take
            units.append(
                Unit(
                    number=len(units),
                    path=path,
                    output=f"{stems[path]}-{index:05d}.parquet",
                    row_groups=row_groups,
                    first_row=first_row,
                    num_rows=take,
                    first_row_of_file=first_of_file,
                )
            )
    return tuple(units)


def _ranges(row_groups: Sequence[int], rows_per_unit: int) -> Iterator[tuple[tuple[int, ...], int, int, int]]:
    """Cut a file into units: yield (row groups, first row within them, rows, first row within the file)."""
    groups: list[int] = []
    rows, start = 0, 0
    for group, num_rows in enumerate(row_groups):
        if groups and rows + num_rows > rows_per_unit:
            yield tuple(groups), 0, rows, start
            groups, start, rows = [], start + rows, 0
        if num_rows > rows_per_unit:
            for first in range(0, num_rows, rows_per_unit):
                yield (group,), first, min(rows_per_unit, num_rows - first), start + first
            start += num_rows
        elif num_rows:
            groups.append(group)
            rows += num_rows
    if groups:
        yield tuple(groups), 0, rows, start


def _stems(files: Sequence[StoredFile]) -> dict[str, str]:
    """Return the prefix of the output files of each input file, by path.

    It depends on that file alone, so that repairing another file renames nothing. Partition folders (``key=value``) are
    kept, so that the output can be read like the input; other folders are dropped. A name that is too long is cut. If
    it is cut, or if two files would share a prefix, a part of the path's hash is added.
    """
    stems: dict[str, str] = {}
    for file in files:
        pure = PurePosixPath(file.below)
        # Readers of the output skip names that begin with these; an input file that was named itself may have one.
        visible = pure.stem.lstrip("._") or "part"
        encoded = visible.encode(errors="surrogateescape")
        if len(encoded) > _LONGEST_STEM_BYTES:
            visible = f"{encoded[:_LONGEST_STEM_BYTES].decode(errors='ignore')}-{_path_hash(file.path)}"
        stems[file.path] = "/".join([*(part for part in pure.parent.parts if "=" in part), visible])
    times = Counter(stems.values())
    return {path: stem if times[stem] == 1 else f"{stem}-{_path_hash(path)}" for path, stem in stems.items()}


def _path_hash(path: str) -> str:
    return sha256(path.encode()).hexdigest()[:8]
