"""What this machine gives to a process."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from pipeline.errors import LorafleetError

LEAST_ROOM_BYTES = 50 * 10**6
"""On a disk where a server is started: its database and logs. What a run writes comes on top."""


def local_cpus() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if os.path.lexists(place))


def free_bytes(path: Path) -> int | None:
    """Of the disk where the path lies, or will; None where its file system does not say, as that of /proc or of some mounted buckets."""
    usage = shutil.disk_usage(existing(path))
    return usage.free if usage.total else None


def check_room(folder: Path, *, what: str) -> None:
    """See that a server can be started with its files there.

    Args:
        folder: Need not be there yet.
        what: To do instead of freeing space: the setting that names another.
    Raises: LorafleetError: its disk is full.
    """
    free = free_bytes(folder)
    if free is not None and free < LEAST_ROOM_BYTES:
        least = f"{LEAST_ROOM_BYTES / 1e6:.0f} MB"
        raise LorafleetError(f"{folder}: {free / 1e6:.1f} MB free, but a start needs {least}; free some space, or {what}")
