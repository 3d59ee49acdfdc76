"""Detection of tables: folders with a log that says which of their files are live."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from pipeline.storage.place import is_local, store_errors, without_query

_READERS = 16

TableFormat = Literal["Delta", "Iceberg", "Hudi", "Spark Structured Streaming"]
"""Table formats that log which files of a folder are live."""
_LOGS: dict[str, TableFormat] = {
    "_delta_log": "Delta",
    ".hoodie": "Hudi",
    "_spark_metadata": "Spark Structured Streaming",
}


def tables_around(fs: Any, files: Collection[str]) -> dict[str, TableFormat]:
    """Find the tables that contain some of the files, at any depth.

    Args:
        fs: The file system of the files.
        files: Existing names, in the form that ``fs`` takes. Local links are followed to the folder of their target.
    Returns: Folder of each table -> its format.
    """
    every = {folder for name in _one_per_folder(fs, files) for folder in _folders_above(name)}
    with ThreadPoolExecutor(_READERS) as pool:
        formats = zip(every, pool.map(lambda folder: _table_format(fs, folder), every), strict=True)
        return {folder: kind for folder, kind in formats if kind is not None}


def _one_per_folder(fs: Any, files: Collection[str]) -> set[str]:
    """Return one name in each folder that contains some of the files."""
    if not is_local(fs):
        return set({name.rpartition("/")[0]: name for name in map(without_query, files)}.values())
    parents = {(path.resolve() if path.is_symlink() else path).parent for path in map(Path, files)}
    return {str(parent.resolve() / "file") for parent in parents}


def _folders_above(name: str) -> Iterator[str]:
    """Yield the folder of a file and its ancestors, up to the root, the bucket or the host."""
    protocol, sign, path = name.rpartition("://")
    parts = path.split("/")
    for end in range(len(parts) - 1, 0, -1):
        yield f"{protocol}{sign}{'/'.join(parts[:end])}"


def _table_format(fs: Any, folder: str) -> TableFormat | None:
    """Return the format of the table that a folder is.

    None for a folder that is no table or may not be listed: its files cannot be told from others.
    """
    try:
        if folder.startswith(("http://", "https://")):  # some servers answer for every name
            inside = {str(name).rstrip("/").rpartition("/")[2] for name in fs.ls(folder, detail=False)}
            found = [kind for log, kind in _LOGS.items() if log in inside]
            has_metadata = "metadata" in inside
        else:
            found = [kind for log, kind in _LOGS.items() if fs.isdir(f"{folder}/{log}")]
            has_metadata = fs.isdir(f"{folder}/metadata")
        if not found and has_metadata:
            found = [
                "Iceberg" for name in fs.ls(f"{folder}/metadata", detail=False) if str(name).endswith(".metadata.json")
            ]
    except (FileNotFoundError, NotADirectoryError, PermissionError, ValueError, NotImplementedError):
        return None  # the Hub's file system raises ValueError above a repository
    except store_errors():
        if folder.startswith(("http://", "https://")):  # most servers do not list folders
            return None
        raise
    return found[0] if found else None
