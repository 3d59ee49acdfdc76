"""Resources of this machine: CPUs, disk space and standard streams."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from pipeline.errors import LorafleetError

LEAST_ROOM_BYTES = 50 * 10**6
"""Free space that starting a server requires, for its database and logs but not for runs."""


def local_cpus() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def existing(path: Path) -> Path:
    """Return the path, or its nearest existing ancestor."""
    path = path.absolute()
    return next(candidate for candidate in (path, *path.parents) if os.path.lexists(candidate))


def free_bytes(path: Path) -> int | None:
    """Return the free space of the disk that holds the path, or would hold it.

    None if its file system does not report it, like /proc and some mounted buckets.
    """
    ancestor = existing(path)
    # The ancestor may be a broken link; a write to it will fail with its own message.
    usage = shutil.disk_usage(ancestor if ancestor.exists() else ancestor.parent)
    return usage.free if usage.total else None


def check_room(folder: Path, *, what: str) -> None:
    """Check that the disk of a folder has room for the files of a server.

    Args:
        folder: Folder for the files; it may not exist yet.
        what: Alternative to freeing space, for the message: which setting names another folder.
    Raises: LorafleetError: the disk is full.
    """
    free = free_bytes(folder)
    if free is not None and free < LEAST_ROOM_BYTES:
        least = f"{LEAST_ROOM_BYTES / 1e6:.0f} MB"
        raise LorafleetError(
            f"{folder}: {free / 1e6:.1f} MB free, but a start needs {least}; free some space, or {what}"
        )


def own_output() -> IO[str]:
    """Return standard output, reserved for this process's answers.

    From now on, anything else that is printed goes to standard error.
    """
    answers = sys.stdout
    with suppress(io.UnsupportedOperation):  # a replacement of stdout without a descriptor
        answers = os.fdopen(os.dup(answers.fileno()), "w", encoding="utf-8")
        os.dup2(2, 1)
    sys.stdout = sys.stderr
    return answers


def read_answers(lines: Iterable[bytes]) -> list[dict[str, Any]]:
    """Parse the lines that are JSON objects, and skip others.

    A ``sitecustomize`` may print before ``own_output`` is called.
    """
    answers = []
    for line in lines:
        with suppress(ValueError):
            answer = json.loads(line)
            if isinstance(answer, dict):
                answers.append(answer)
    return answers
