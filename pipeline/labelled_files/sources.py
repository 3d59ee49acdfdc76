"""A user's own files: found on any file system, checked to be one set of texts, and read."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass

from pipeline.errors import DataError, first_line
from pipeline.labelled_files.column_names import some
from pipeline.labelled_files.formats import ENDINGS, format_of
from pipeline.storage.listing import written_folder
from pipeline.storage.place import Place, open_file, store_errors
from pipeline.storage.tables import tables_around

_SPLIT_NAME = re.compile(r"(?<![a-z])(train|test|valid|val|dev|eval)(?:ing|idation|uation)?(?![a-z])", re.IGNORECASE)


@dataclass(frozen=True)
class SourceFiles:
    """The files that a location stands for."""

    paths: tuple[str, ...]
    """Paths, or URLs with their protocol; sorted."""
    left_out: tuple[str, ...]
    """Names of the other files of the folder, which are not read."""


def find_sources(location: str) -> SourceFiles:
    """List the files of a location: a file, a folder with its subfolders, or a glob.

    In a folder, a file counts if it has one of the ``ENDINGS``. Names that begin with ``_`` or ``.`` are skipped,
    except partition folders (``_key=value``).

    Raises: DataError: no file is found, the store cannot be reached, or the files may not be one set of texts.
    """
    with _reachable(location):
        place = Place(location)
        if place.fs.isfile(place.root):
            _refuse_tables(place, location, [place.root])
            return SourceFiles((place.url(""),), ())
        is_folder = place.fs.isdir(place.root)
        is_glob = re.search(r"[*?[]", place.root) is not None
        matches = [place.root] if is_folder else sorted(place.fs.glob(place.root)) if is_glob else []
        names = [name for path in matches for name in _files(place, path)]
        if not matches:
            fault = "is neither a file nor a folder" if place.fs.exists(place.root) else "does not exist"
            raise DataError(f"{location} {fault}; expected a file, a folder or a glob")
        top = place.root if is_folder else written_folder(location).root
        _refuse_tables(place, location, names)
    taken = [name for name in names if _is_seen(name, below=top) and (name in matches or format_of(name) is not None)]
    left_out = tuple(sorted(name.removeprefix(f"{top}/") for name in set(names) - set(taken)))
    if not taken:
        others = f"; it has {some(left_out)}" if left_out else ""
        raise DataError(f"{location} has no file to learn from{others}; expected files that end in {ENDINGS}")
    _refuse_mixed_formats(location, taken)
    _refuse_mixed_splits(location, taken, below=top)
    protocol = place.url("").removesuffix(place.root)
    return SourceFiles(tuple(f"{protocol}{name}" for name in sorted(set(taken))), left_out)


def read_content(path: str) -> bytes:
    """Return the bytes of a file.

    Raises: DataError: the file cannot be read.
    """
    with _reachable(path), closing(open_file(path)) as file:
        return file.read()


@contextmanager
def _reachable(location: str) -> Iterator[None]:
    """Turn what file systems raise into a DataError that names the location."""
    try:
        yield
    except store_errors(ValueError, RuntimeError) as error:  # RuntimeError: pathlib, for a loop of links
        raise DataError(f"{location} cannot be read: {first_line(error)}") from None


def _files(place: Place, path: str) -> list[str]:
    """Return the file itself, or the files below the folder. Links to files are followed, links to folders are not."""
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
    """Refuse the files of a table, because some of them hold deleted rows."""
    if tables := tables_around(place.fs, names):
        place.root, kind = min(tables.items())
        raise DataError(
            f"{location} has files of the {kind} table {place}, whose files also hold deleted rows; "
            "export the table to plain Parquet first"
        )


def _refuse_mixed_formats(location: str, names: Sequence[str]) -> None:
    formats = {format_of(name): name for name in reversed(names) if format_of(name) is not None}
    if len(formats) > 1:
        raise DataError(
            f"{location} holds {' and '.join(sorted(map(str, formats)))} ({some(sorted(formats.values()))}), "
            "which may be the same texts twice; name one kind with a glob, such as folder/*.csv"
        )
    packed = {name[: -len(".gz")] for name in names if name.lower().endswith(".gz")}
    if twice := packed.intersection(names):
        found = f"holds {some(sorted(twice))}, and with .gz too"
        raise DataError(f"{location} {found}, which may be the same texts twice; keep one of each")


def _refuse_mixed_splits(location: str, names: Sequence[str], *, below: str) -> None:
    parts = {(part, name) for name in names for part in name.removeprefix(f"{below}/").split("/")}
    splits = {
        match[1].lower(): name for part, name in sorted(parts, reverse=True) if (match := _SPLIT_NAME.search(part))
    }
    if len(splits) > 1:
        raise DataError(
            f"{location} holds files of more than one split ({some(sorted(splits.values()))}); "
            "name those of each split in train and test"
        )
