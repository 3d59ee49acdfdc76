"""A folder on any file system that fsspec knows: local, S3, the Hub. Files appear whole or not at all."""

from __future__ import annotations

import os
import re
import secrets
import sys
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal, NoReturn, cast

from pipeline.errors import InputError, first_line
from pipeline.printable import conceal, counted, reveal

_SUFFIXES = re.compile(r"\.(parquet|parq|pq)(\.(snappy|gz|gzip|zst|zstd|lz4|br|brotli|lzo))?$", re.IGNORECASE)
_TEMPORARY = re.compile(
    r".*(~|\.(tmp|temp|crc|part|partial|inprogress|crdownload|bak|backup|old|orig|swp|_copying_))", re.IGNORECASE
)
_SPECIAL = "of no content of its own (a pipe, a socket or a device)"
_MAGIC = b"PAR1"
_READERS = 16
_TEXT_FORMATS = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".txt")
_CONVERT = ". Other formats have to be converted first, with pandas.read_csv(…).to_parquet(…) for example"
# Of fsspec's protocols those that are no store: what they show is inside another file, a copy of it, or not addressed by a URL alone.
_NOT_STORES = (
    *("zip", "tar", "libarchive", "reference", "data", "dir", "git", "root", "generic", "pyscript"),
    *("cached", "blockcache", "filecache", "simplecache", "async_wrapper", "asyncwrapper", "asynclocal"),
)
_S3, _GCS = ("s3", "s3a"), ("gs", "gcs")
_CLIENT_ERRORS = (
    ("botocore.exceptions", "BotoCoreError"),
    ("httpx", "HTTPError"),
    ("httpx2", "HTTPError"),
    ("aiohttp", "ClientError"),
)

TEMPORARY = ".tmp"
"""What the names of unfinished local files end with."""
FILE_MARK = "file"
"""Of the temporaries of small files."""


@dataclass(frozen=True)
class StoredFile:
    """A file as a listing shows it."""

    path: str
    """With the protocol, where there is one."""
    size: int
    """Bytes."""
    version: str
    """``etag:…``, another one for other content, or ``mtime:…``, which a mere touch changes; empty where the store tells neither."""
    below: str
    """Its path below what was written out of the folder's or the glob's name; the file's own name, if that was given."""


class Place:
    """A folder, or what stands for one in an object store."""

    def __init__(self, url: str) -> None:
        """Raises: InputError: an unknown protocol, or one whose package is not installed."""
        self.fs, self.root = _file_system(url)
        self.local = _is_local(self.fs)

    def __str__(self) -> str:
        return self.url("")

    def url(self, name: str) -> str:
        """Address of a file below this place."""
        path = f"{self.root}/{name}".rstrip("/") if name else self.root
        return path if self.local else conceal(str(self.fs.unstrip_protocol(path)))

    def path(self, name: str) -> str:
        """The same, as the file system wants it."""
        return f"{self.root}/{name}"

    def names(self, *, under: str = "") -> list[str]:
        """All files below, sorted, relative to this place."""
        self.fs.invalidate_cache()
        folder = self.path(under).rstrip("/")
        found = self.fs.find(folder) if self.fs.exists(folder) else []
        return sorted(path.removeprefix(self.root).lstrip("/") for path in found)

    def exists(self, name: str) -> bool:
        """Whether the file is there, whole."""
        self.fs.invalidate_cache()
        return bool(self.fs.exists(self.path(name)))

    def read(self, name: str) -> bytes:
        """Raises: FileNotFoundError."""
        return cast(bytes, self.fs.cat_file(self.path(name)))

    def write(self, name: str, content: bytes) -> None:
        """Replace a small file in one step."""
        with self.replaced(name, mark=FILE_MARK) as path:
            path.write_bytes(content)

    @contextmanager
    def replaced(self, name: str, *, mark: str) -> Iterator[Path]:
        """A local path to write to; what stands there at the end appears under ``name`` in one step, unless an error was raised.

        Local files are written beside their destination and renamed; for an object store they are written to a temporary folder
        and uploaded as one object.

        Args:
            name: The destination.
            mark: Part of the temporary's name, by which ``temporaries`` finds it.
        """
        if not self.local:
            with tempfile.TemporaryDirectory(prefix="lorafleet-") as folder:
                path = Path(folder) / "content"
                yield path
                self.fs.put_file(str(path), self.path(name))
            return
        final = Path(self.path(name))
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = final.with_name(f".{final.name}.{mark}.{secrets.token_hex(6)}{TEMPORARY}")
        try:
            yield temporary
            try:
                with temporary.open("rb") as file:
                    os.fsync(file.fileno())
                temporary.replace(final)
            except FileNotFoundError:
                if not final.exists():  # else another attempt was faster, and whoever ended the job swept this one away
                    raise
        finally:
            temporary.unlink(missing_ok=True)

    def temporaries(self, *, mark: str) -> list[tuple[str, float]]:
        """Names of unfinished files with the mark, and when each was last written (seconds since 1970)."""
        if not self.local:
            return []  # an upload that was cut short leaves nothing that can be seen
        found = []
        for path in Path(self.root).rglob(f".*.{mark}.*{TEMPORARY}"):
            try:
                found.append((str(path.relative_to(self.root)), path.stat().st_mtime))
            except FileNotFoundError:
                continue
        return found

    def remove(self, name: str) -> None:
        """Delete a file; one that is gone already is as good."""
        try:
            self.fs.rm_file(self.path(name))
        except FileNotFoundError:
            return

    def move(self, name: str, to: str) -> None:
        """Put a file in another's place."""
        if self.local:
            Path(self.path(to)).parent.mkdir(parents=True, exist_ok=True)
            Path(self.path(name)).replace(self.path(to))
        else:
            self.fs.mv(self.path(name), self.path(to))

    def holds(self, other: Place) -> bool:
        """Whether the other is this one, or lies inside."""
        return bool(self.fs == other.fs) and f"{other.root}/".startswith(f"{self.root}/")


TableFormat = Literal["Delta", "Iceberg", "Hudi", "Spark Structured Streaming"]
"""Formats that keep a log of which files of a folder belong to the table."""
_LOGS: dict[str, TableFormat] = {
    "_delta_log": "Delta",
    ".hoodie": "Hudi",
    "_spark_metadata": "Spark Structured Streaming",
}


@dataclass(frozen=True)
class FoundFiles:
    """The Parquet files of an input, and what else lies there."""

    files: tuple[StoredFile, ...]
    """Sorted by path; at least one."""
    skipped: dict[str, int]
    """Reason -> number of files that are not read."""
    tables: dict[str, TableFormat]
    """Folder, as the file system names it -> the format of the table that it is, of each table that a file lies in."""
    columns: tuple[str, ...] | None = None
    """Those of the table that the files are, where they are one."""


def check_address(url: str) -> None:
    """See that what a job reads or writes is a path, or in a store that lasts.

    Raises: InputError: nothing at all, memory, something inside another file, or credentials that the store would not read there.
    """
    protocol = _protocol(url)
    if not url.strip():
        raise InputError("an empty path, which would be the current folder; write . for that")
    if protocol == "memory":
        raise InputError(f"{url}: what is in memory is gone when the command ends; name a folder or a store")
    if protocol in _NOT_STORES or "::" in url:
        raise InputError(
            f"{url}: not the address of a store; expected a path, or an address such as s3://…, gs://…, hf://… or https://…"
        )
    if protocol in (*_S3, *_GCS) and "@" in url.partition("://")[2].partition("/")[0]:
        variables = (
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" if protocol in _S3 else "GOOGLE_APPLICATION_CREDENTIALS"
        )
        raise InputError(f"{url}: such an address holds no credentials; set {variables} instead")


def find_files(pattern: str) -> FoundFiles:
    """Find the Parquet files that the name of a file, a folder or a glob stands for.

    In a folder, a file counts by its suffix (``.parquet``, ``.parq`` or ``.pq`` in any case, perhaps with that of a codec behind it).
    One without a suffix counts by the magic bytes at both its ends. Names that begin with ``_`` or ``.`` do not count, but for partition
    folders (``_date=2024-01-01``), and neither do temporary files and backups. A file that is named itself is read, whatever its name.

    Raises: InputError: there is none, or the place cannot be reached.
    """
    fs, path = _file_system(pattern)
    skipped: Counter[str] = Counter()
    try:
        if fs.isfile(path):
            file = _stored(fs, path, fs.info(path), below=_without_query(path).rpartition("/")[2])
            return FoundFiles((file,), {}, tables_around(fs, [path]))
        is_glob = _is_glob(fs, path)
        matched = fs.glob(path, detail=True) if is_glob else _find(fs, path)
        every = dict(_files(fs, matched))
        listed = sorted((name, info) for name, info in every.items() if info["type"] == "file")
        skipped[_SPECIAL] += len(every) - len(listed)
        chosen = (
            set(matched) if is_glob and not path.endswith(("*", "?", "]")) else set()
        )  # ``*.dat`` says which suffix is meant
        start = written_folder(pattern).root + "/"
        with ThreadPoolExecutor(_READERS) as pool:
            files = list(
                pool.map(lambda found: _stored(fs, *found, below=_without_query(found[0]).removeprefix(start)), listed)
            )
            reasons = list(pool.map(_reason_to_skip, files, [name in chosen for name, _ in listed]))
        tables = tables_around(fs, [name for (name, _), reason in zip(listed, reasons, strict=True) if not reason])
    except store_errors(ValueError, NotImplementedError) as error:
        raise InputError(f"input {pattern}: cannot be read: {first_line(error)}") from None
    skipped.update(reason for reason in reasons if reason)
    skipped = +skipped
    found = tuple(file for file, reason in zip(files, reasons, strict=True) if not reason)
    if len({file.path for file in found}) < len(found):
        raise InputError(
            f"input {pattern}: it has files that differ only in the secret part of their addresses; name them one by one"
        )
    if not found:
        empty = "no Parquet file in it" if fs.exists(path) else "no such file or folder"
        there = f"no Parquet file in it ({in_words(skipped)})" if skipped else empty
        if set(every) == {path}:  # not a folder, and no file either
            there = "it is a pipe, a socket or a device"
        hint = _CONVERT if any(reason.endswith(_TEXT_FORMATS) for reason in skipped) else ""
        raise InputError(f"input {pattern}: {there}; expected a Parquet file, a folder of them, or a glob{hint}")
    return FoundFiles(found, dict(skipped), tables)


def tables_around(fs: Any, files: Collection[str]) -> dict[str, TableFormat]:
    """Folder -> format, of each table in whose folder some of the files lie, however far below.

    Args:
        fs: Their file system.
        files: Names that exist, as the file system has them; one that is a link lies where it leads to.
    """
    every = {folder for name in _where_they_lie(fs, files) for folder in _folders_above(name)}
    with ThreadPoolExecutor(_READERS) as pool:
        formats = zip(every, pool.map(lambda folder: _table_format(fs, folder), every), strict=True)
        return {folder: kind for folder, kind in formats if kind is not None}


def _where_they_lie(fs: Any, files: Collection[str]) -> set[str]:
    """One file of each folder that the files lie in."""
    if not _is_local(fs):
        return set({name.rpartition("/")[0]: name for name in map(_without_query, files)}.values())
    parents = {(path.resolve() if path.is_symlink() else path).parent for path in map(Path, files)}
    return {str(parent.resolve() / "file") for parent in parents}


def _folders_above(name: str) -> Iterator[str]:
    """The folder of a file and all above it, the root, the bucket or the host too."""
    protocol, sign, path = name.rpartition("://")
    parts = path.split("/")
    for end in range(len(parts) - 1, 0, -1):
        yield f"{protocol}{sign}{'/'.join(parts[:end])}"


def _table_format(fs: Any, folder: str) -> TableFormat | None:
    """What table a folder is. One that may not be looked into is none: its files could not be told from others."""
    try:
        if folder.startswith(("http://", "https://")):  # there are servers that answer for every name
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
        return None  # the Hub's has ValueError for what lies above a repository
    except store_errors():
        if folder.startswith(("http://", "https://")):  # most servers have files, and no listing of folders
            return None
        raise
    return found[0] if found else None


def in_words(skipped: Mapping[str, int]) -> str:
    """``left out: 2 files with the suffix .csv, 1 file of Parquet's own summaries (_metadata)``."""
    return "left out: " + ", ".join(f"{counted(count, 'file')} {reason}" for reason, count in sorted(skipped.items()))


def look_again(paths: Sequence[str]) -> dict[str, StoredFile | None]:
    """Path -> the file as it is now; None for one that is gone."""

    def look(path: str) -> StoredFile | None:
        fs, name = _file_system(path)
        fs.invalidate_cache(name)
        try:
            return _stored(fs, name, fs.info(name), below="")
        except FileNotFoundError:
            return None

    with ThreadPoolExecutor(_READERS) as pool:
        return dict(zip(paths, pool.map(look, paths), strict=True))


def written_folder(pattern: str) -> Place:
    """The folder as far as it is written out: a glob's up to the first wildcard; the one that a file lies in."""
    place = Place(pattern)
    if place.fs.isfile(place.root):
        place.root = _without_query(place.root).rpartition("/")[0]
    elif _is_glob(place.fs, place.root):
        place.root = place.root[: _first_wildcard(place.root)].rpartition("/")[0]
    return place


def store_errors(*others: type[Exception]) -> tuple[type[Exception], ...]:
    """What the world outside makes file systems raise; the clients of S3 and the Hub have errors of their own for a lost network."""
    return (
        OSError,
        *others,
        *(getattr(sys.modules[module], name) for module, name in _CLIENT_ERRORS if module in sys.modules),
    )


def open_file(path: str) -> BinaryIO:
    """A file for reading; the caller closes it."""
    fs, name = _file_system(path)
    return cast(BinaryIO, fs.open(name, "rb"))


def _file_system(url: str) -> tuple[Any, str]:
    import fsspec

    try:
        fs, path = fsspec.core.url_to_fs(reveal(url))
    except ImportError as error:
        package = "'lorafleet[s3]'" if _protocol(url) in _S3 else "what it names"
        raise InputError(f"{url}: {first_line(error)}; pip install {package}") from None
    except Exception as error:  # noqa: BLE001 - each protocol's package has errors of its own
        raise InputError(f"{url}: cannot be opened: {first_line(error)}") from None
    if _is_local(fs):
        path = str(Path(path).resolve())
    return fs, path.rstrip("/")


def _protocol(url: str) -> str:
    return url.partition("://")[0].lower() if "://" in url else "data" if url.startswith("data:") else "file"


def _is_local(fs: Any) -> bool:
    return "file" in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)


def _is_glob(fs: Any, path: str) -> bool:
    """Brackets may also be part of a folder's name."""
    return _first_wildcard(path) is not None and not fs.isdir(path)


def _files(fs: Any, found: dict[str, dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The files of a listing, those of its folders, and those that links lead to."""
    for name, listed in found.items():
        info = fs.info(name) if listed.get("islink") else listed
        if info["type"] != "directory":
            yield name, info
        elif not (listed.get("islink") and _leads_up(name)):
            yield from _files(fs, _find(fs, name))


def _find(fs: Any, folder: str) -> dict[str, dict[str, Any]]:
    """All files below. A local folder that cannot be listed is an error, where fsspec would pass over it."""
    if not (_is_local(fs) and fs.isdir(folder)):
        return cast(dict[str, dict[str, Any]], fs.find(folder, detail=True))

    def refuse(error: OSError) -> NoReturn:
        raise error

    found = {}
    for root, folders, files in os.walk(folder, onerror=refuse):
        for path in (Path(root, name) for name in (*files, *folders)):
            if path.is_symlink() or not path.is_dir():
                found[str(path)] = fs.info(str(path))
    return found


def _reason_to_skip(file: StoredFile, is_chosen: bool) -> str:
    """Why a file of a folder is not read; empty if it is. The suffix of a file that a glob has chosen by it does not matter."""
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


def _without_query(path: str) -> str:
    """Over HTTP a query is no part of a file's name, and may hold a signature."""
    return path.partition("?")[0] if path.startswith(("http://", "https://")) else path


def _first_wildcard(path: str) -> int | None:
    return min((path.index(sign) for sign in "*?[" if sign in path), default=None)


def _stored(fs: Any, name: str, info: dict[str, Any], *, below: str) -> StoredFile:
    etag = str(info.get("ETag") or info.get("etag") or info.get("blob_id") or "")
    written = info.get("mtime") or info.get("LastModified") or ""
    is_strong = etag and not etag.startswith("W/")  # a weak one may be the same for other bytes
    path = name if _is_local(fs) else conceal(str(fs.unstrip_protocol(name)))
    size = info.get("size")
    if size is None:  # listings over HTTP have none
        size = fs.info(name).get("size")
    if size is None:
        raise InputError(
            f"{path}: its server does not tell its size (no Content-Length), so it cannot be read in parts; copy it first"
        )
    return StoredFile(path, int(size), f"etag:{etag}" if is_strong else f"mtime:{written}" if written else "", below)
