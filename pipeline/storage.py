"""A folder on any file system that fsspec knows: local, S3, the Hub. Files appear whole or not at all."""

from __future__ import annotations

import os
import secrets
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from pipeline.errors import InputError, first_line
from pipeline.printable import conceal, reveal

# Of fsspec's protocols those that are no store: what they show is inside another file, a copy of it, or not addressed by a URL alone.
_NOT_STORES = (
    *("zip", "tar", "libarchive", "reference", "data", "dir", "git", "root", "generic", "pyscript"),
    *("cached", "blockcache", "filecache", "simplecache", "async_wrapper", "asyncwrapper", "asynclocal"),
)
_S3, _GCS = ("s3", "s3a"), ("gs", "gcs")
_SUFFIXES = (".parquet", ".pq")
_CLIENT_ERRORS = (("botocore.exceptions", "BotoCoreError"), ("httpx", "HTTPError"), ("httpx2", "HTTPError"), ("aiohttp", "ClientError"))

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
    """The etag of an object, the time of change of a local file: another one means other content."""
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
        raise InputError(f"{url}: not the address of a store; expected a path, or an address such as s3://…, gs://…, hf://… or https://…")
    if protocol in (*_S3, *_GCS) and "@" in url.partition("://")[2].partition("/")[0]:
        variables = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" if protocol in _S3 else "GOOGLE_APPLICATION_CREDENTIALS"
        raise InputError(f"{url}: such an address holds no credentials; set {variables} instead")


def find_files(pattern: str) -> list[StoredFile]:
    """The Parquet files of a file's, a folder's or a glob's name, sorted by path; names that begin with ``_`` or ``.`` are left out.

    Raises: InputError: there is none, or the place cannot be reached.
    """
    fs, path = _file_system(pattern)
    try:
        if fs.isfile(path):
            details = {path: fs.info(path)}
        elif _is_glob(fs, path):
            details = dict(_files(fs, fs.glob(path, detail=True)))
        else:
            details = {name: info for name, info in _files(fs, fs.find(path, detail=True)) if name.endswith(_SUFFIXES)}
    except store_errors(ValueError, NotImplementedError) as error:
        raise InputError(f"input {pattern}: cannot be read: {first_line(error)}") from None
    start = written_folder(pattern).root + "/"
    files = [_stored(fs, name, info, below=_without_query(name).removeprefix(start)) for name, info in sorted(details.items())]
    if len({file.path for file in files}) < len(files):
        raise InputError(f"input {pattern}: it has files that differ only in the secret part of their addresses; name them one by one")
    seen = [file for file in files if not any(part.startswith(("_", ".")) for part in file.below.split("/"))]
    if not seen:
        there = (
            "no Parquet file in it (names that begin with _ or . are left out)" if files or fs.exists(path) else "no such file or folder"
        )
        raise InputError(f"input {pattern}: {there}; expected a Parquet file, a folder of them, or a glob")
    return seen


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
    return (OSError, *others, *(getattr(sys.modules[module], name) for module, name in _CLIENT_ERRORS if module in sys.modules))


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
        if info["type"] == "file":
            yield name, info
        elif info["type"] == "directory" and not (listed.get("islink") and _leads_up(name)):
            inside = {path: of for path, of in fs.find(name, detail=True).items() if path.endswith(_SUFFIXES) or of.get("islink")}
            yield from _files(fs, inside)


def _leads_up(link: str) -> bool:
    return Path(link).parent.resolve().is_relative_to(Path(link).resolve())


def _without_query(path: str) -> str:
    """Over HTTP a query is no part of a file's name, and may hold a signature."""
    return path.partition("?")[0] if path.startswith(("http://", "https://")) else path


def _first_wildcard(path: str) -> int | None:
    return min((path.index(sign) for sign in "*?[" if sign in path), default=None)


def _stored(fs: Any, name: str, info: dict[str, Any], *, below: str) -> StoredFile:
    version = info.get("ETag") or info.get("etag") or info.get("blob_id") or info.get("mtime") or info.get("LastModified") or ""
    path = name if _is_local(fs) else conceal(str(fs.unstrip_protocol(name)))
    return StoredFile(path, int(info["size"]), str(version), below)
