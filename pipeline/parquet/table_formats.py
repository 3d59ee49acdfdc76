"""The live files of Delta and Iceberg tables, by each format's own library.

Other formats, and features of these two that are not supported, are refused by name.
The door to deltalake and pyiceberg.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import unquote

from pipeline.errors import InputError, first_line
from pipeline.printable import reveal
from pipeline.storage.listing import FoundFiles, written_folder
from pipeline.storage.place import Place
from pipeline.storage.tables import TableFormat

_EXTRAS: dict[str, str] = {"Delta": "deltalake", "Iceberg": "pyiceberg"}


def live_files(pattern: str, found: FoundFiles) -> FoundFiles:
    """Return the files of the newest snapshot of a table; all files if no table is involved.

    Args:
        pattern: A file, a folder or a glob, as ``find_files`` takes it.
        found: The result of ``find_files``.
    Raises: InputError: the table has another format or an unsupported feature, or is inside or above the input.
    """
    if not found.tables:
        return found
    place, given = written_folder(pattern), Place(pattern).root
    if other_tables := sorted(set(found.tables) - {given}):
        folder, kind = other_tables[-1], found.tables[other_tables[-1]]
        if folder.startswith(f"{place.root}/"):
            name = folder.removeprefix(f"{place.root}/")
            raise InputError(f"input {pattern}: holds the {kind} table {name}; classify each table in a job of its own")
        place.root = folder
        raise InputError(
            f"input {pattern}: is in the {kind} table {place}, whose log says which files are live; name that folder"
        )
    kind = found.tables[given]
    if kind not in _EXTRAS:
        raise InputError(
            f"input {place}: is a {kind} table, whose log says which files are live; lorafleet does not read that log. "
            "Export the table to plain Parquet first"
        )
    live, columns = _snapshot(place, kind)
    by_path = {file.path: file for file in found.files}
    missing = sorted(set(live) - set(by_path))
    if missing:
        raise InputError(
            f"input {place}: {missing[0]} belongs to the {kind} table and is missing ({len(missing)} such files)"
        )
    others = len(found.files) - len(live)
    skipped = found.skipped | ({f"of older versions of the {kind} table": others} if others else {})
    return replace(found, files=tuple(by_path[path] for path in sorted(live)), skipped=skipped, columns=columns)


def check_columns(found: FoundFiles, path: str, names: Sequence[str]) -> None:
    """Check a file's columns against those of the Iceberg table that it belongs to.

    Iceberg identifies columns by number, and only its own reader translates names and defaults of older files. A Delta
    table needs no check: a column that a file lacks is null, and a column that only the file has is ignored.

    Raises: InputError: the table's columns have changed since the file was written.
    """
    if (
        found.columns is not None
        and "Iceberg" in found.tables.values()
        and (others := sorted(set(names) ^ set(found.columns)))
    ):
        raise InputError(
            f"{path}: its columns are no longer those of the Iceberg table ({others[0]!r} differs); "
            "rewrite the table's files first"
        )


def _snapshot(place: Place, kind: TableFormat) -> tuple[list[str], tuple[str, ...]]:
    """Return the live files of a table, and its columns."""
    try:
        return _live_of_delta(place) if kind == "Delta" else _live_of_iceberg(place)
    except ImportError:
        raise InputError(
            f"input {place}: is a {kind} table; to read its live files, pip install 'lorafleet[{_EXTRAS[kind]}]'"
        ) from None
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001 - on a damaged or too new log both libraries may raise anything
        raise InputError(f"input {place}: its {kind} log cannot be read: {first_line(error)}") from None


def _live_of_delta(place: Place) -> tuple[list[str], tuple[str, ...]]:
    import pyarrow as pa
    from deltalake import DeltaTable

    table = DeltaTable(reveal(place.url("")))
    what = f"input {place}: Delta table, version {table.version()}"
    if table.metadata().configuration.get("delta.columnMapping.mode", "none") != "none":
        raise InputError(
            f"{what}: its columns have other names in its files (column mapping); export it to plain Parquet first"
        )
    if any(batch.num_rows for batch in table.deletion_vectors()):
        raise InputError(
            f"{what}: has deletion vectors; remove the deleted rows from its files first (REORG TABLE … APPLY (PURGE))"
        )
    live, partitions = [], table.metadata().partition_columns
    for action in pa.table(table.get_add_actions(flatten=True)).to_pylist():
        path = unquote(action["path"])
        if "://" in path or path.startswith("/"):
            raise InputError(f"{what}: its file {path} is outside of its folder; copy the table first")
        folders = dict(part.partition("=")[::2] for part in path.split("/")[:-1] if "=" in part)
        for name in partitions:
            if name not in folders:
                raise InputError(
                    f"{what}: its file {path} is in no folder {name}=…, so that column would be lost; "
                    "export the table first"
                )
        live.append(place.url(path))
    return live, tuple(field.name for field in table.schema().fields if field.name not in partitions)


def _live_of_iceberg(place: Place) -> tuple[list[str], tuple[str, ...]]:
    from pyiceberg.table import StaticTable

    table = StaticTable.from_metadata(reveal(place.url(_newest_metadata(place))))
    what = f"input {place}: Iceberg table"
    if _plain(table.location()) != _plain(place.url("")):
        raise InputError(
            f"{what}: its metadata gives its location as {table.location()}; "
            "classify it there, or export it to plain Parquet"
        )
    live = []
    for task in table.scan().plan_files():
        file: Any = task.file
        if task.delete_files:
            raise InputError(f"{what}: {file.file_path} has rows that another file deletes; compact the table first")
        if file.file_format != "PARQUET":
            raise InputError(f"{what}: {file.file_path} is {file.file_format.value}, not Parquet")
        live.append(place.url(_plain(file.file_path).removeprefix(_plain(place.url(""))).lstrip("/")))
    return live, tuple(field.name for field in table.schema().fields)


def _newest_metadata(place: Place) -> str:
    names = [name for name in place.names(under="metadata") if name.endswith(".metadata.json")]
    numbers = {name: int(found[1]) for name in names if (found := re.search(r"/v?(\d+)[^/]*$", name))}
    newest = [name for name, number in numbers.items() if number == max(numbers.values())]
    if len(newest) != 1:
        raise InputError(
            f"input {place}: cannot tell the newest of its Iceberg metadata files {', '.join(newest or names)}"
        )
    return newest[0]


def _plain(location: str) -> str:
    return re.sub(r"^file:/*", "/", location).rstrip("/")
