"""The Parquet files that an input consists of, and the state of single files."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn, cast

from pipeline.errors import InputError, first_line
from pipeline.printable import conceal, counted
from pipeline.storage.place import Place, file_system, is_local, open_file, store_errors, without_query
from pipeline.storage.tables import TableFormat, tables_around

_SUFFIXES = re.compile(r"\.(parquet|parq|pq)(\.(snappy|gz|gzip|zst|zstd|lz4|br|brotli|lzo))?$", re.IGNORECASE)
_TEMPORARY = re.compile(
    r".*(~|\.(tmp|temp|crc|part|partial|inprogress|crdownload|bak|backup|old|orig|swp|_copying_))", re.IGNORECASE
)
_SPECIAL = "without content (a pipe, a socket or a device)"
_MAGIC = b"PAR1"
_READERS = 16
_TEXT_FORMATS = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".txt")
_CONVERT = ". Convert other formats first, for example with pandas.read_csv(…).to_parquet(…)"


@dataclass(frozen=True)
class StoredFile:
    """A file as a listing shows it."""

    path: str
    """Path, or URL with its protocol."""
    size: int
    """Bytes."""
    version: str
    """``etag:…``, which changes with the content, or ``mtime:…``, which a mere touch changes too.

    Empty if the store reports neither."""
    below: str
    """Path relative to ``written_folder`` of the input. For a file that was named itself, its name."""


@dataclass(frozen=True)
class FoundFiles:
    """The Parquet files of an input, and what else is in its folder."""

    files: tuple[StoredFile, ...]
    """Sorted by path; at least one."""
    skipped: dict[str, int]
    """Reason -> number of files that are skipped."""
    tables: dict[str, TableFormat]
    """Folder of each table that contains some of the files -> format of the table."""
    columns: tuple[str, ...] | None = None
    """Columns of the table, if the files are one table."""


def find_files(pattern: str) -> FoundFiles:
    """Find the Parquet files that the name of a file, a folder or a glob stands for.

    In a folder, a file counts if it has the suffix ``.parquet``, ``.parq`` or ``.pq`` in any case, perhaps followed by
    that of a codec. A file without a suffix counts if it has Parquet's magic bytes at both ends. Names that begin with
    ``_`` or ``.`` are skipped, except partition folders (``_date=2024-01-01``), and so are temporary files and backups.
    A file that is named itself is read, whatever its name.

    Raises: InputError: no file matches, or the store cannot be reached.
    """
    fs, path = file_system(pattern)
    try:
        if fs.isfile(path):
            file = _stored(fs, path, fs.info(path), below=without_query(path).rpartition("/")[2])
            return FoundFiles((file,), {}, tables_around(fs, [path]))
        is_glob = _is_glob(fs, path)
        matched = fs.glob(path, detail=True) if is_glob else _find(fs, path)
        every = dict(_files(fs, matched))
        listed = sorted((name, info) for name, info in every.items() if info["type"] == "file")
        # A glob such as ``*.dat`` chooses its files by their suffix, so the suffix does not matter.
        chosen = set(matched) if is_glob and not path.endswith(("*", "?", "]")) else set()
        start = written_folder(pattern).root + "/"
        with ThreadPoolExecutor(_READERS) as pool:
            stored = list(
                pool.map(lambda found: _stored(fs, *found, below=without_query(found[0]).removeprefix(start)), listed)
            )
            reasons = list(pool.map(_reason_to_skip, stored, [name in chosen for name, _ in listed]))
        tables = tables_around(fs, [name for (name, _), reason in zip(listed, reasons, strict=True) if not reason])
    except store_errors(ValueError, NotImplementedError) as error:
        raise InputError(f"input {pattern}: cannot be read: {first_line(error)}") from None
    skipped = Counter({_SPECIAL: len(every) - len(listed)})
    skipped.update(reason for reason in reasons if reason)
    skipped = +skipped  # without zeros
    files = tuple(file for file, reason in zip(stored, reasons, strict=True) if not reason)
    if len({file.path for file in files}) < len(files):
        raise InputError(
            f"input {pattern}: some files differ only in the secret part of their addresses; name them one by one"
        )
    if not files:
        _refuse_empty(pattern, fs, path, skipped, is_special=set(every) == {path})
    return FoundFiles(files, dict(skipped), tables)


def _refuse_empty(pattern: str, fs: Any, path: str, skipped: Mapping[str, int], *, is_special: bool) -> NoReturn:
    """Raise the InputError of an input without a Parquet file."""
    if is_special:  # neither a folder nor a regular file
        found = "it is a pipe, a socket or a device"
    elif skipped:
        found = f"no Parquet file in it ({in_words(skipped)})"
    else:
        found = "no Parquet file in it" if fs.exists(path) else "no such file or folder"
    hint = _CONVERT if any(reason.endswith(_TEXT_FORMATS) for reason in skipped) else ""
    raise InputError(f"input {pattern}: {found}; expected a Parquet file, a folder of them, or a glob{hint}")


def in_words(skipped: Mapping[str, int]) -> str:
    """Describe skipped files: ``skipped: 2 files with the suffix .csv, 1 file of Parquet's own summaries``."""
    return "skipped: " + ", ".join(f"{counted(count, 'file')} {reason}" for reason, count in sorted(skipped.items()))


def look_again(paths: Sequence[str]) -> dict[str, StoredFile | None]:
    """Return the current state of each file, by path; None for a file that no longer exists."""

    def look(path: str) -> StoredFile | None:
        fs, name = file_system(path)
        fs.invalidate_cache(name)
        try:
            return _stored(fs, name, fs.info(name), below="")
        except FileNotFoundError:
            return None

    with ThreadPoolExecutor(_READERS) as pool:
        return dict(zip(paths, pool.map(look, paths), strict=True))


def written_folder(pattern: str) -> Place:
    """Return the folder of a file, the folder of a glob up to its first wildcard, or the folder itself."""
    place = Place(pattern)
    if place.fs.isfile(place.root):
        place.root = without_query(place.root).rpartition("/")[0]
    elif _is_glob(place.fs, place.root):
        place.root = place.root[: _first_wildcard(place.root)].rpartition("/")[0]
    return place


def _is_glob(fs: Any, path: str) -> bool:
    """Return whether a path is a glob. Brackets may also be part of a folder's name."""
    return _first_wildcard(path) is not None and not fs.isdir(path)


def _files(fs: Any, listing: dict[str, dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the files of a listing, of its folders, and of the targets of its links, as (name, info)."""
    for name, listed in listing.items():
        info = fs.info(name) if listed.get("islink") else listed
        if info["type"] != "directory":
            yield name, info
        elif not (listed.get("islink") and _leads_up(name)):
            yield from _files(fs, _find(fs, name))


def _find(fs: Any, folder: str) -> dict[str, dict[str, Any]]:
    """List all files below a folder. Unlike fsspec, fail on a local folder that cannot be listed."""
    if not (is_local(fs) and fs.isdir(folder)):
        return cast(dict[str, dict[str, Any]], fs.find(folder, detail=True))

    def refuse(error: OSError) -> NoReturn:
        raise error

    listing = {}
    for root, folders, files in os.walk(folder, onerror=refuse):
        for path in (Path(root, name) for name in (*files, *folders)):
            if path.is_symlink() or not path.is_dir():
                listing[str(path)] = fs.info(str(path))
    return listing


def _reason_to_skip(file: StoredFile, is_chosen: bool) -> str:
    """Return why a file of a folder is skipped; empty if it is read.

    Args:
        file: The file.
        is_chosen: Whether a glob names the file's suffix, so that any suffix is accepted.
    """
    *folders, name = file.below.split("/")
    if name.startswith(("_metadata", "_common_metadata")):
        return "of Parquet's own summaries (_metadata)"
    if any(part.startswith(".") or (part.startswith("_") and "=" not in part) for part in folders) or name.startswith(
        ("_", ".")
    ):
        return "with a name, or in a folder, that begins with _ or ."
    if _TEMPORARY.fullmatch(name):
        return "with the name of a temporary file or a backup"
    if is_chosen or _SUFFIXES.search(name):
        return ""
    if "." in name:
        return f"with the suffix {PurePosixPath(name).suffix}"
    return "" if _has_magic(file) else "without a suffix and not Parquet"


def _has_magic(file: StoredFile) -> bool:
    if file.size < 2 * len(_MAGIC):
        return False
    with closing(open_file(file.path)) as source:
        if source.read(len(_MAGIC)) != _MAGIC:
            return False
        source.seek(-len(_MAGIC), os.SEEK_END)
        return source.read(len(_MAGIC)) == _MAGIC


def _leads_up(link: str) -> bool:
    return Path(link).parent.resolve().is_relative_to(Path(link).resolve())


def _first_wildcard(path: str) -> int | None:
    return min((path.index(sign) for sign in "*?[" if sign in path), default=None)


def _stored(fs: Any, name: str, info: dict[str, Any], *, below: str) -> StoredFile:
    etag = str(info.get("ETag") or info.get("etag") or info.get("blob_id") or "")
    written = info.get("mtime") or info.get("LastModified") or ""
    is_strong = etag and not etag.startswith("W/")  # other bytes may have the same weak etag
    path = name if is_local(fs) else conceal(str(fs.unstrip_protocol(name)))
    size = info.get("size")
    if size is None:  # listings over HTTP have none
        size = fs.info(name).get("size")
    if size is None:
        raise InputError(
            f"{path}: its server does not report the size (no Content-Length), "
            "so it cannot be read in parts; copy it first"
        )
    return StoredFile(path, int(size), f"etag:{etag}" if is_strong else f"mtime:{written}" if written else "", below)
