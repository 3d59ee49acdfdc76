"""What a bulk job reads: Parquet files, checked by their footers, and cut into units of rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import PurePosixPath
from typing import Literal

import pyarrow as pa

from pipeline.bulk.footers import Dates, Footer, read_dates, read_footers
from pipeline.bulk.input_checks import check_kept_columns, check_new_names
from pipeline.bulk.schema import FileSchema, changed_types, join_schemas
from pipeline.bulk.table_formats import check_columns, live_files
from pipeline.errors import DataError
from pipeline.printable import counted
from pipeline.records import Record
from pipeline.storage.listing import StoredFile, find_files

_MOST_UNITS = 1_000_000
_LONGEST_STEM_BYTES = 180  # a file's name has 255, of which the rest of the unit's and its temporary's take some


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
    schema: pa.Schema
    """The columns that are kept, in their order, in types that hold the values of all files."""
    int96_unit: Literal["ns", "us"]
    """Unit of time in which INT96 columns are read."""
    changes: tuple[str, ...]
    """What the output has in another form than the input, one ``column: before becomes after`` each."""
    skipped: dict[str, int]
    """Reason -> files of the input that are not read."""

    @property
    def num_rows(self) -> int:
        """Of all units."""
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
    """List the input, check every file's footer, and cut it into units.

    Args:
        pattern: A file, a folder, a glob, or an fsspec URL of one; a table's folder stands for its live files.
        text_column: The column that is classified.
        columns: Those to keep; all where left out.
        new_columns: Names that the output adds.
        rows_per_unit: Rows of a unit, at most.
        limit: Rows of the whole job, at most.
    Raises: InputError: no file, no row, no such column, not text, schemas that cannot be joined, a name that is taken.
    """
    found = live_files(pattern, find_files(pattern))
    stored = found.files
    footers = dict(zip((file.path for file in stored), read_footers([file.path for file in stored]), strict=True))
    good = {path: footer for path, footer in footers.items() if isinstance(footer, Footer)}
    for path, footer in good.items():
        check_columns(found, path, footer.schema.names)
    kept, dates = tuple[str, ...](), dict[str, Dates | str]()
    if good:
        kept = check_kept_columns(good, text_column=text_column, columns=columns, of_table=found.columns)
        dates = _read_dates(good, kept)
    faults = {path: fault for path, fault in (footers | dates).items() if isinstance(fault, str)}
    good = {path: footer for path, footer in good.items() if path not in faults}
    if not good:
        raise DataError(
            f"input {pattern}: none of its {counted(len(stored), 'file')} can be read; {_first_fault(faults)}"
        )
    known = [found for found in dates.values() if isinstance(found, Dates)]
    unit: Literal["ns", "us"] = "us" if any(found.are_far for found in known) else "ns"
    files = [
        FileSchema(path, footer.in_microseconds if unit == "us" else footer.schema) for path, footer in good.items()
    ]
    schema = join_schemas(files, kept)
    check_new_names(next(iter(good)), kept, new_columns, stored)
    units = _cut(stored, good, rows_per_unit=rows_per_unit, limit=limit)
    if not units:
        raise DataError(f"input {pattern}: no rows in its {counted(len(stored), 'file')}; there is nothing to classify")
    cut = unit == "us" and any(found.are_fine for found in known)
    return BulkInput(
        files=tuple(_input_file(file, good.get(file.path)) for file in stored),
        units=units,
        failures=tuple(
            UnitFailure(path=p, unit=None, first_row=None, num_rows=None, reason=fault) for p, fault in faults.items()
        ),
        schema=schema,
        int96_unit=unit,
        changes=(
            *_changes(schema, good.values()),
            *(["INT96 columns: nanoseconds are cut to microseconds"] if cut else []),
        ),
        skipped=found.skipped,
    )


def _input_file(file: StoredFile, footer: Footer | None) -> InputFile:
    return InputFile(
        path=file.path, size=file.size, version=file.version, num_rows=None if footer is None else footer.num_rows
    )


def _first_fault(faults: Mapping[str, str]) -> str:
    path, fault = next(iter(faults.items()))
    return f"{path}: {fault}"


def _read_dates(good: Mapping[str, Footer], kept: Sequence[str]) -> dict[str, Dates | str]:
    """File -> what its INT96 columns hold, of files that have any."""
    chosen, paths_of = set(kept), dict[tuple[str, ...], list[str]]()
    for path, footer in good.items():
        old = tuple(name for name, kinds in footer.kinds.items() if "int96" in kinds and name in chosen)
        paths_of.setdefault(old, []).append(path)
    dates: dict[str, Dates | str] = {}
    for columns, paths in paths_of.items():
        if columns:
            dates |= zip(paths, read_dates(paths, columns), strict=True)
    return dates


def _changes(schema: pa.Schema, footers: Collection[Footer]) -> list[str]:
    changes = dict[str, None]()
    for kinds in {id(footer.kinds): footer.kinds for footer in footers}.values():  # most files share theirs
        changes |= dict.fromkeys(f"{name}: {change}" for name, change in changed_types(schema, kinds).items())
    kept = set(schema.names)
    for footer in footers:
        changes |= dict.fromkeys(f"{name}: {change}" for name, change in footer.lost_types.items() if name in kept)
    left_out = dict.fromkeys(key for footer in footers for key in footer.left_out)
    changes |= dict.fromkeys(f"footer key {key}: cannot be understood, and is left out" for key in left_out)
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
    """(row groups, first row within them, rows, first row within the file) of each unit of a file."""
    together: list[int] = []
    rows, start = 0, 0
    for group, of_group in enumerate(row_groups):
        if together and rows + of_group > rows_per_unit:
            yield tuple(together), 0, rows, start
            together, start, rows = [], start + rows, 0
        if of_group > rows_per_unit:
            for first in range(0, of_group, rows_per_unit):
                yield (group,), first, min(rows_per_unit, of_group - first), start + first
            start += of_group
        elif of_group:
            together.append(group)
            rows += of_group
    if together:
        yield tuple(together), 0, rows, start


def _stems(files: Sequence[StoredFile]) -> dict[str, str]:
    """What the output files of each input file begin with. It depends on that file alone, so that one that is mended later shifts no other.

    Partition folders (``key=value``) are kept, so that the output can be read as the input was; other folders are not. A name that is too
    long is cut. Where it is, and where two files would meet, each gets a part of its path's hash.
    """
    stems: dict[str, str] = {}
    for file in files:
        pure = PurePosixPath(file.below)
        visible = (
            pure.stem.lstrip("._") or "part"
        )  # the file may have been named itself; readers of the output skip such names
        encoded = visible.encode(errors="surrogateescape")
        if len(encoded) > _LONGEST_STEM_BYTES:
            visible = f"{encoded[:_LONGEST_STEM_BYTES].decode(errors='ignore')}-{_path_hash(file.path)}"
        stems[file.path] = "/".join([*(part for part in pure.parent.parts if "=" in part), visible])
    times = Counter(stems.values())
    return {path: stem if times[stem] == 1 else f"{stem}-{_path_hash(path)}" for path, stem in stems.items()}


def _path_hash(path: str) -> str:
    return sha256(path.encode()).hexdigest()[:8]
