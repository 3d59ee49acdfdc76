"""Where this machine's servers keep what is gone when they end."""

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
"""Bytes in the path of the folder that holds Ray's: Linux has room for 107 in the path of a socket."""
_SHORT = ("/tmp", "/dev/shm")


def temporary_folder() -> Path:
    """The folder for temporary files: that of ``TMPDIR``, or else the system's.

    Raises: LorafleetError: none can be written, or its disk is full.
    """
    try:
        folder = Path(tempfile.gettempdir())
    except FileNotFoundError:
        raise LorafleetError(
            "no folder for temporary files can be written; free some space, or set TMPDIR to one"
        ) from None
    named = Path(os.environ.get("TMPDIR") or folder)
    if _is_open(named):  # where it is full Python passes it over; other libraries do not
        folder = named
    check_room(folder, what="set TMPDIR to another folder")
    return folder


def ray_base() -> Path:
    """Where Ray's folder is made: ``RAY_TMPDIR``, or the folder for temporary files, or the system's if that has too long a path.

    Raises:
        InputError: ``RAY_TMPDIR`` has too long a path, or cannot be written.
        LorafleetError: as ``temporary_folder``; or none with a short path can be written.
    """
    if given := os.environ.get("RAY_TMPDIR"):
        if not (_is_open(Path(given)) and Path(given).is_absolute()):
            raise InputError(f"RAY_TMPDIR {given}: not a folder that can be written; expected the whole path of one")
        if not _is_short(Path(given)):
            raise InputError(
                f"RAY_TMPDIR {given}: {len(os.fsencode(given))} bytes, but the sockets that Ray makes there leave room for "
                f"{LONGEST_BASE}; set it to a folder with a shorter path"
            )
        check_room(Path(given), what="set RAY_TMPDIR to another folder")
        return Path(given)
    folder = temporary_folder()
    if base := next((base for base in (folder, *map(Path, _SHORT)) if _is_short(base) and _is_open(base)), None):
        if base != folder:
            check_room(base, what="set RAY_TMPDIR to another folder")
        return base
    raise LorafleetError(
        f"{folder}: too long a path for the sockets that Ray makes there, and {', '.join(_SHORT)} cannot be written; "
        f"set RAY_TMPDIR to a folder with a path of at most {LONGEST_BASE} bytes"
    )


def check_temporary() -> Check:
    """The folders of ``temporary_folder`` and ``ray_base``, for `lorafleet doctor`."""
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
    """A temporary folder for one Ray, inside of one that only this user can enter: Ray opens its own to everybody.

    A process that is killed leaves its folder behind; the next one that asks for a folder deletes it.

    Raises: InputError, LorafleetError: as ``ray_base``.
    """
    base = ray_base()
    for left in base.glob(f"{_PREFIX}*"):
        _delete_if_left(left)
    folder, lock = _make(base)
    try:
        yield folder / "r"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _make(base: Path) -> tuple[Path, int]:
    """A new folder, and its lock, which is gone with this process."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))  # of mode 0700
        lock = _lock(folder)
        if lock is not None and folder.exists():  # or another process took it for left behind just now
            return folder, lock


def _delete_if_left(folder: Path) -> None:
    with suppress(OSError):
        there = folder.lstat()
        if stat.S_ISDIR(there.st_mode) and there.st_uid == os.getuid() and (lock := _lock(folder)) is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """A descriptor that holds the folder; None if another process does."""
    with suppress(FileNotFoundError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if isinstance(error, BlockingIOError):
                return None
            raise LorafleetError(
                f"{folder} cannot be locked: {error.strerror}; set TMPDIR to a folder of a local disk"
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
