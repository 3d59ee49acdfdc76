"""Files of the user's own: found, told apart, and read as columns. CSV, TSV, JSON Lines and Parquet, each perhaps in gzip.

CSV and JSON are read by the standard library, which guesses no type and names the line of a fault.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass

from pipeline.data.column_names import some
from pipeline.data.formats import ENDINGS, format_of
from pipeline.errors import DataError, first_line
from pipeline.storage.listing import written_folder
from pipeline.storage.place import Place, open_file, store_errors
from pipeline.storage.tables import tables_around

_SPLIT_NAME = re.compile(r"(?<![a-z])(train|test|valid|val|dev|eval)(?:ing|idation|uation)?(?![a-z])", re.IGNORECASE)


@dataclass(frozen=True)
class SourceFiles:
    """The files that a location stands for."""

    paths: tuple[str, ...]
    """Sorted; with the protocol, where there is one."""
    left_out: tuple[str, ...]
    """Names of the other files of a folder."""


def find_sources(location: str) -> SourceFiles:
    """List the file, the files of the folder and of those below it, or the files that the glob matches.

    Of a folder, files count that have one of the endings of ``_FORMATS``. Names that begin with ``_`` or ``.`` do not count, unless they
    are Hive's ``_key=value``.

    Raises: DataError: there is none, the place cannot be reached, or it is not clear what belongs to it.
    """
    with _reachable(location):
        place = Place(location)
        if place.fs.isfile(place.root):
            _refuse_tables(place, location, [place.root])
            return SourceFiles((place.url(""),), ())
        is_folder = place.fs.isdir(place.root)
        found = (
            [place.root] if is_folder else sorted(place.fs.glob(place.root)) if re.search(r"[*?[]", place.root) else []
        )
        names = [name for path in found for name in _files(place, path)]
        if not found:
            there = "is neither a file nor a folder" if place.fs.exists(place.root) else "does not exist"
            raise DataError(f"{location} {there}; expected a file, a folder or a glob")
        top = place.root if is_folder else written_folder(location).root
        _refuse_tables(place, location, names)
    taken = [name for name in names if _is_seen(name, below=top) and (name in found or format_of(name) is not None)]
    left_out = tuple(sorted(name.removeprefix(f"{top}/") for name in set(names) - set(taken)))
    if not taken:
        there = f"; it has {some(left_out)}" if left_out else ""
        raise DataError(f"{location} has no file to learn from{there}; expected files that end in {ENDINGS}")
    _refuse_mixed_formats(location, taken)
    _refuse_mixed_splits(location, taken, below=top)
    protocol = place.url("").removesuffix(place.root)
    return SourceFiles(tuple(f"{protocol}{name}" for name in sorted(set(taken))), left_out)


def read_content(path: str) -> bytes:
    """The bytes of a file as they are stored.

    Raises: DataError: it cannot be read.
    """
    with _reachable(path), closing(open_file(path)) as file:
        return file.read()


# --- find ---


@contextmanager
def _reachable(location: str) -> Iterator[None]:
    """What file systems raise, as one sentence. It names what could not be read, and claims no more."""
    try:
        yield
    except store_errors(ValueError, RuntimeError) as error:  # RuntimeError: pathlib, of links that lead to each other
        raise DataError(f"{location} cannot be read: {first_line(error)}") from None


def _files(place: Place, path: str) -> list[str]:
    """The file itself, or those below the folder; links are followed to files, not to folders."""
    if place.fs.isfile(path):
        return [path]
    every = place.fs.find(path, detail=True)
    return [
        name for name, info in every.items() if info["type"] == "file" or (info.get("islink") and place.fs.isfile(name))
    ]


def _is_seen(name: str, *, below: str) -> bool:
    parts = name.removeprefix(f"{below}/").split("/")
    return not any(part.startswith(".") or (part.startswith("_") and "=" not in part) for part in parts)


def _refuse_tables(place: Place, location: str, names: Sequence[str]) -> None:
    """A table is not the heap of its files: some of them hold rows that were deleted."""
    if tables := tables_around(place.fs, names):
        place.root, kind = min(tables.items())
        raise DataError(
            f"{location} has files of the {kind} table {place}, whose files also hold deleted rows; export the table to plain Parquet first"
        )


def _refuse_mixed_formats(location: str, names: Sequence[str]) -> None:
    formats = {format_of(name): name for name in reversed(names) if format_of(name) is not None}
    if len(formats) > 1:
        raise DataError(
            f"{location} holds {' and '.join(sorted(map(str, formats)))} ({some(sorted(formats.values()))}), which may be the same texts "
            "twice; name one kind with a glob, such as folder/*.csv"
        )
    packed = {name[: -len(".gz")] for name in names if name.lower().endswith(".gz")}
    if twice := packed.intersection(names):
        found = f"holds {some(sorted(twice))}, and with .gz too"
        raise DataError(f"{location} {found}, which may be the same texts twice; keep one of each")


def _refuse_mixed_splits(location: str, names: Sequence[str], *, below: str) -> None:
    parts = {(part, name) for name in names for part in name.removeprefix(f"{below}/").split("/")}
    splits = {
        found[1].lower(): name for part, name in sorted(parts, reverse=True) if (found := _SPLIT_NAME.search(part))
    }
    if len(splits) > 1:
        raise DataError(
            f"{location} holds files of more than one split ({some(sorted(splits.values()))}); name those of each split in train and test"
        )


# --- tell apart ---


# --- read ---
