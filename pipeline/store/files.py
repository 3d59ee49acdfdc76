"""Reading and writing of single files. Does not know what the files mean.

A folder may come from a stranger. So a file is read only if it is a regular file, and only up to a limit.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
import stat
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO, TypeVar

from pydantic import BaseModel, ValidationError

from pipeline.errors import DataError, InputError

R = TypeVar("R", bound=BaseModel)

LARGEST_RECORD_BYTES = 8 * 1024**2
"""Limit for JSON files. The logits of 32 texts for 10,000 classes take 7 MB."""
LARGEST_WEIGHTS_BYTES = 4 * 1024**3
"""Limit for weights. Rank 256 on every linear layer of an encoder with 7 billion parameters takes 3 GB."""


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file such that readers see the old or the new content, never a part of it.

    Its folder is created if necessary. Text is written as UTF-8.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_record(path: Path, record_type: type[R], *, fault: type[InputError] = DataError) -> R:
    """Read and validate a JSON file.

    Args:
        path: File to read.
        record_type: Type of the record in it.
        fault: Type of the error to raise.
    Raises:
        InputError: a ``fault``; the file is missing, cannot be read, or does not hold such a record.
    """
    try:
        return parse_record(read_file(path, at_most=LARGEST_RECORD_BYTES), record_type, path, fault=fault)
    except FileNotFoundError:
        raise fault(f"{path} is missing; expected a {record_type.__name__} as JSON") from None
    except OSError as error:
        raise fault(f"{path} cannot be read: {error.strerror}") from None


def parse_record(content: bytes, record_type: type[R], path: Path, *, fault: type[InputError] = DataError) -> R:
    """Validate the content of a JSON file.

    Args:
        content: The bytes of the file.
        record_type: Type of the record in it.
        path: The file, as messages name it.
        fault: Type of the error to raise.
    Raises:
        InputError: a ``fault``; the content is not such a record.
    """
    try:
        return record_type.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])[:200]
        raise fault(
            f"{path} is damaged, or was written by another version: expected a {record_type.__name__}; "
            f"{where + ': ' if where else ''}{first['msg'].removeprefix('Value error, ')[:300]}"
        ) from None


def read_file(path: Path, *, at_most: int) -> bytes:
    """Read the bytes of a regular file.

    Raises:
        OSError: the file is missing, a folder, a pipe or a device, or has more bytes than ``at_most``.
    """
    with open_regular(path) as file:
        content = file.read(at_most + 1)
    if len(content) > at_most:
        raise OSError(errno.EFBIG, f"it has more than {at_most:,} bytes", str(path))
    return content


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading. Pipes and devices are refused, because they may block or never end.

    Raises:
        OSError: the path does not exist, or is not a regular file.
    """
    return _open(path, path, follow=True)


def open_inside(root: Path, path: str) -> BinaryIO:
    """Open a regular file in a folder, following no symbolic link below that folder.

    Args:
        root: The folder.
        path: Relative path of the file, with slashes.
    Raises:
        OSError: the file is missing, is not a regular file, or is reached through a link.
    """
    *folders, name = path.split("/")
    with ExitStack() as stack:
        folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
        stack.callback(os.close, folder)
        for depth, part in enumerate(folders, start=1):
            _check_kind(
                os.stat(part, dir_fd=folder, follow_symlinks=False), stat.S_IFDIR, root.joinpath(*folders[:depth])
            )
            folder = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
            stack.callback(os.close, folder)
        return _open(name, root / path, follow=False, dir_fd=folder)


def _open(name: str | Path, path: Path, *, follow: bool, dir_fd: int | None = None) -> BinaryIO:
    _check_kind(os.stat(name, dir_fd=dir_fd, follow_symlinks=follow), stat.S_IFREG, path)
    # The file may have been replaced since the check, so never wait for a pipe, follow no link, and check it again.
    file = os.open(name, os.O_RDONLY | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW), dir_fd=dir_fd)
    try:
        _check_kind(os.fstat(file), stat.S_IFREG, path)
    except OSError:
        os.close(file)
        raise
    return os.fdopen(file, "rb")


def copy_inside(root: Path, path: str, target: Path) -> None:
    """Copy a file as ``open_inside`` opens it. The folder of the target is created if necessary.

    Raises:
        OSError: as ``open_inside``, or the target exists or cannot be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with open_inside(root, path) as source, target.open("xb") as copy:
        shutil.copyfileobj(source, copy)


_KINDS = {
    stat.S_IFREG: "a file",
    stat.S_IFDIR: "a folder",
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a named pipe",
}


def _check_kind(status: os.stat_result, expected: int, path: Path) -> None:
    kind = stat.S_IFMT(status.st_mode)
    if kind != expected:
        raise OSError(
            errno.EINVAL, f"it is {_KINDS.get(kind, 'a device or socket')}, not {_KINDS[expected]}", str(path)
        )


def add_file(digest: hashlib._Hash, path: Path) -> None:
    """Add the bytes of a regular file to a hash.

    Raises:
        OSError: as ``open_regular``, or the file exceeds ``LARGEST_WEIGHTS_BYTES``.
    """
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > LARGEST_WEIGHTS_BYTES:
            raise OSError(errno.EFBIG, f"it has more than {LARGEST_WEIGHTS_BYTES:,} bytes", str(path))
        while chunk := file.read(1 << 20):
            digest.update(chunk)
