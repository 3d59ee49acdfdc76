"""Temporary folders of lorafleet and of a local Ray."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.errors import InputError, LorafleetError
from pipeline.machine import check_room, free_bytes
from tasks.checks.machine import Check, readable_bytes

_PREFIX = "lorafleet-ray-"
_OF_RAY = "session_2026-01-02_03-04-05_678901_4194304/sockets/plasma_store"
LONGEST_BASE = 107 - len(f"/{_PREFIX}12345678/r/{_OF_RAY}")
"""Longest path in bytes of the parent of Ray's folder. On Linux, the path of a socket may have 107 bytes."""
_SHORT = ("/tmp", "/dev/shm")


def temporary_folder() -> Path:
    """Folder for temporary files: ``TMPDIR``, or else the system's.

    Raises:
        LorafleetError: no such folder can be written, or its disk is full.
    """
    try:
        folder = Path(tempfile.gettempdir())
    except FileNotFoundError:
        raise LorafleetError(
            "no folder for temporary files can be written; free some space, or set TMPDIR to one"
        ) from None
    named = Path(os.environ.get("TMPDIR") or folder)
    if _is_open(named):  # Python skips it if its disk is full, but other libraries do not
        folder = named
    check_room(folder, what="set TMPDIR to another folder")
    return folder


def ray_base() -> Path:
    """Parent of Ray's folder: ``RAY_TMPDIR``, or the folder for temporary files, or a system folder with a short path.

    Raises:
        InputError: ``RAY_TMPDIR`` is too long a path, or cannot be written.
        LorafleetError: as ``temporary_folder``, or no folder with a short path can be written.
    """
    if given := os.environ.get("RAY_TMPDIR"):
        if not (_is_open(Path(given)) and Path(given).is_absolute()):
            raise InputError(f"RAY_TMPDIR {given}: not a folder that can be written; expected an absolute path")
        if not _is_short(Path(given)):
            raise InputError(
                f"RAY_TMPDIR {given}: {len(os.fsencode(given))} bytes, but the sockets that Ray creates there allow at "
                f"most {LONGEST_BASE}; set it to a folder with a shorter path"
            )
        check_room(Path(given), what="set RAY_TMPDIR to another folder")
        return Path(given)
    folder = temporary_folder()
    if base := next((base for base in (folder, *map(Path, _SHORT)) if _is_short(base) and _is_open(base)), None):
        if base != folder:
            check_room(base, what="set RAY_TMPDIR to another folder")
        return base
    raise LorafleetError(
        f"{folder}: too long a path for the sockets that Ray creates there, and {', '.join(_SHORT)} cannot be written; "
        f"set RAY_TMPDIR to a folder with a path of at most {LONGEST_BASE} bytes"
    )


def check_temporary() -> Check:
    """Check ``temporary_folder`` and ``ray_base`` for `lorafleet doctor`."""
    try:
        folder, base = temporary_folder(), ray_base()
    except LorafleetError as error:
        return Check("fault", "temporary files", str(error))
    free = free_bytes(folder)
    found = f"in {folder}" + (f", {readable_bytes(free)} free" if free is not None else "")
    if base == folder or "RAY_TMPDIR" in os.environ:
        return Check("ok", "temporary files", f"{found}; those of Ray in {base}")
    return Check("ok", "temporary files", f"{found}; those of Ray in {base}, as the other path is too long for sockets")


@contextmanager
def ray_folder() -> Iterator[Path]:
    """Create a temporary folder for one Ray, and delete it at the end.

    It is inside of a folder that only this user can enter, because Ray makes its own folder accessible to all users. A
    killed process leaves its folder behind, and the next call deletes it.

    Raises:
        InputError, LorafleetError: as ``ray_base``.
    """
    base = ray_base()
    for candidate in base.glob(f"{_PREFIX}*"):
        _delete_if_abandoned(candidate)
    folder, lock = _create(base)
    try:
        yield folder / "r"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _create(base: Path) -> tuple[Path, int]:
    """Create a folder, and a lock that ends with this process."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))  # of mode 0700
        lock = _lock(folder)
        if lock is not None and folder.exists():  # else another process has just deleted it as abandoned
            return folder, lock


def _delete_if_abandoned(folder: Path) -> None:
    with suppress(OSError):
        status = folder.lstat()
        if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and (lock := _lock(folder)) is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """Lock a folder. Returns its descriptor, or None if another process holds the lock or the folder is gone."""
    with suppress(FileNotFoundError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if isinstance(error, BlockingIOError):
                return None
            raise LorafleetError(
                f"{folder} cannot be locked: {error.strerror}; set TMPDIR to a folder on a local disk"
            ) from None
        else:
            return descriptor
    return None


def _is_short(base: Path) -> bool:
    return len(os.fsencode(base)) <= LONGEST_BASE


def _is_open(base: Path) -> bool:
    with suppress(OSError), tempfile.TemporaryFile(dir=base):
        return True
    return False
