"""What this machine gives to a process."""

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
    place = existing(path)
    usage = shutil.disk_usage(
        place if place.exists() else place.parent
    )  # a link may lead nowhere; who writes there will be told
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
        raise LorafleetError(
            f"{folder}: {free / 1e6:.1f} MB free, but a start needs {least}; free some space, or {what}"
        )


def own_output() -> IO[str]:
    """Standard output, for this process's answers alone: what a library prints goes to standard error from now on."""
    answers = sys.stdout
    with suppress(io.UnsupportedOperation):  # a stand-in without a descriptor
        answers = os.fdopen(os.dup(answers.fileno()), "w", encoding="utf-8")
        os.dup2(2, 1)
    sys.stdout = sys.stderr
    return answers


def read_answers(lines: Iterable[bytes]) -> list[dict[str, Any]]:
    """The lines that are JSON objects. A ``sitecustomize`` may have printed others before ``own_output`` was called."""
    answers = []
    for line in lines:
        with suppress(ValueError):
            answer = json.loads(line)
            if isinstance(answer, dict):
                answers.append(answer)
    return answers
