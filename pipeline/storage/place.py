"""A folder on any file system that fsspec knows, and files opened by URL."""

from __future__ import annotations

import os
import secrets
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from pipeline.errors import InputError, first_line
from pipeline.printable import conceal, reveal

# Protocols of fsspec that are no stores: they show the inside of a file, or a copy, or need more than a URL.
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
"""Suffix of unfinished local files."""
FILE_MARK = "file"
"""Mark in the names of temporaries that ``Place.write`` makes."""


class Place:
    """A folder, or a key prefix in an object store."""

    def __init__(self, url: str) -> None:
        """Raises: InputError: an unknown protocol, or one whose package is not installed."""
        self.fs, self.root = file_system(url)
        self.local = is_local(self.fs)

    def __str__(self) -> str:
        return self.url("")

    def url(self, name: str) -> str:
        """Return the address of a file in this folder, without secrets."""
        path = f"{self.root}/{name}".rstrip("/") if name else self.root
        return path if self.local else conceal(str(self.fs.unstrip_protocol(path)))

    def path(self, name: str) -> str:
        """Return the path of a file in this folder, in the form that ``fs`` takes."""
        return f"{self.root}/{name}"

    def names(self, *, under: str = "") -> list[str]:
        """List all files below this folder, sorted, as paths relative to it."""
        self.fs.invalidate_cache()
        folder = self.path(under).rstrip("/")
        paths = self.fs.find(folder) if self.fs.exists(folder) else []
        return sorted(path.removeprefix(self.root).lstrip("/") for path in paths)

    def exists(self, name: str) -> bool:
        """Return whether the file exists. A file that exists is complete."""
        self.fs.invalidate_cache()
        return bool(self.fs.exists(self.path(name)))

    def read(self, name: str) -> bytes:
        """Read a whole file.

        Raises: FileNotFoundError: the file does not exist.
        """
        return cast(bytes, self.fs.cat_file(self.path(name)))

    def write(self, name: str, content: bytes) -> None:
        """Replace a small file in one step."""
        with self.replaced(name, mark=FILE_MARK) as path:
            path.write_bytes(content)

    @contextmanager
    def replaced(self, name: str, *, mark: str) -> Iterator[Path]:
        """Yield a local path to write to. The file appears under ``name`` in one step, unless the block raises.

        A local file is written beside its destination and renamed. For an object store it is written to a temporary
        folder and uploaded as one object.

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
                # If the final file exists, another attempt was faster, and the end of the job swept this one away.
                if not final.exists():
                    raise
        finally:
            temporary.unlink(missing_ok=True)

    def temporaries(self, *, mark: str) -> list[tuple[str, float]]:
        """List unfinished files with the mark: name, and time of the last write in seconds since 1970."""
        if not self.local:
            return []  # an interrupted upload leaves nothing visible
        unfinished = []
        for path in Path(self.root).rglob(f".*.{mark}.*{TEMPORARY}"):
            try:
                unfinished.append((str(path.relative_to(self.root)), path.stat().st_mtime))
            except FileNotFoundError:
                continue
        return unfinished

    def remove(self, name: str) -> None:
        """Delete a file, if it exists."""
        try:
            self.fs.rm_file(self.path(name))
        except FileNotFoundError:
            return

    def move(self, name: str, to: str) -> None:
        """Rename a file; an existing file at the new name is replaced."""
        if self.local:
            Path(self.path(to)).parent.mkdir(parents=True, exist_ok=True)
            Path(self.path(name)).replace(self.path(to))
        else:
            self.fs.mv(self.path(name), self.path(to))

    def holds(self, other: Place) -> bool:
        """Return whether the other folder is this one, or is inside it."""
        return bool(self.fs == other.fs) and f"{other.root}/".startswith(f"{self.root}/")


def check_address(url: str) -> None:
    """Check that a job can read from or write to an address: a path, or a URL in a persistent store.

    Raises: InputError: the address is empty, in memory, inside another file, or holds credentials that the store
        would ignore.
    """
    protocol = protocol_of(url)
    if not url.strip():
        raise InputError("empty path; write . for the current folder")
    if protocol == "memory":
        raise InputError(f"{url}: files in memory are lost when the command ends; name a folder or a store")
    if protocol in _NOT_STORES or "::" in url:
        raise InputError(
            f"{url}: not the address of a store; "
            "expected a path, or an address such as s3://…, gs://…, hf://… or https://…"
        )
    if protocol in (*_S3, *_GCS) and "@" in url.partition("://")[2].partition("/")[0]:
        variables = (
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" if protocol in _S3 else "GOOGLE_APPLICATION_CREDENTIALS"
        )
        raise InputError(f"{url}: the address of a bucket takes no credentials; set {variables} instead")


def store_errors(*others: type[Exception]) -> tuple[type[Exception], ...]:
    """Return the exceptions that file systems raise for causes outside this program.

    They include the network errors of the clients that are loaded, such as those of S3 and the Hub.
    """
    return (
        OSError,
        *others,
        *(getattr(sys.modules[module], name) for module, name in _CLIENT_ERRORS if module in sys.modules),
    )


def open_file(path: str) -> BinaryIO:
    """Open a file for reading. The caller closes it."""
    fs, name = file_system(path)
    return cast(BinaryIO, fs.open(name, "rb"))


def file_system(url: str) -> tuple[Any, str]:
    """Return the fsspec file system of an address, and the path in it.

    Raises: InputError: the protocol is unknown, its package is not installed, or it cannot be opened.
    """
    import fsspec

    try:
        fs, path = fsspec.core.url_to_fs(reveal(url))
    except ImportError as error:
        package = "'lorafleet[s3]'" if protocol_of(url) in _S3 else "what it names"
        raise InputError(f"{url}: {first_line(error)}; pip install {package}") from None
    except Exception as error:  # noqa: BLE001 - each protocol's package has its own exceptions
        raise InputError(f"{url}: cannot be opened: {first_line(error)}") from None
    if is_local(fs):
        path = str(Path(path).resolve())
    return fs, path.rstrip("/")


def protocol_of(url: str) -> str:
    """Return the protocol of an address in lower case; ``file`` for a path."""
    return url.partition("://")[0].lower() if "://" in url else "data" if url.startswith("data:") else "file"


def is_local(fs: Any) -> bool:
    """Return whether a file system is that of this machine."""
    return "file" in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)


def without_query(path: str) -> str:
    """Return the path without the query of an HTTP URL, which is not part of the name and may hold a signature."""
    return path.partition("?")[0] if path.startswith(("http://", "https://")) else path
