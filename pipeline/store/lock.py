"""Locks of a run store and of its runs, and the order of run ids."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from pipeline.errors import InputError, LockedError


def oldest_first(run_ids: Iterable[str]) -> list[str]:
    """Sort run ids by the start times that they begin with. The last one is the newest run.

    Ids with a future time, from a wrong clock, and names that are not run ids sort before all others.
    """
    now = f"{datetime.now(UTC):%Y%m%d-%H%M%S}"
    return sorted(run_ids, key=lambda run_id: (run_id[: len(now)] <= now, run_id))


def store_folder(runs: str) -> Path:
    """Convert the name of a run store into a path, which may not exist yet.

    Raises:
        InputError: the name is a URL, or empty, which would mean the current folder.
    """
    if not runs or "://" in runs:
        raise InputError(f"run store {runs!r}: expected a local or mounted folder; choose one with --runs")
    return Path(runs)


@contextmanager
def hold_store(runs: Path, run_id: str) -> Iterator[None]:
    """Lock the run store for one run. The lock ends with the process, even if it is killed.

    Raises:
        LockedError: another run holds the lock.
        InputError: as ``hold``.
    """
    with hold(runs / ".lock", runs, holder=f"run {run_id}, process {os.getpid()}", refusal="in use by {}; wait for it"):
        yield


@contextmanager
def hold_run(run: Path, *, alone: bool) -> Iterator[None]:
    """Lock a finished run: shared to publish it, or exclusively to delete it.

    Without effect if the folder does not exist, or its file system cannot lock folders.

    Args:
        run: Run folder.
        alone: Whether the lock is exclusive.
    Raises:
        LockedError: the run is being deleted, or ``alone`` is set and the run is being published.
    """
    try:
        folder = os.open(run, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        yield
        return
    try:
        with suppress(OSError):
            _lock(
                folder,
                alone=alone,
                refusal=f"run {run}: is being published" if alone else f"run {run}: is being deleted",
            )
        yield
    finally:
        os.close(folder)


def _lock(folder: int, *, alone: bool, refusal: str) -> None:
    try:
        fcntl.flock(folder, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        raise LockedError(refusal) from None


@contextmanager
def hold(path: Path, runs: Path, *, holder: str, refusal: str) -> Iterator[None]:
    """Lock a file in a run store. Its folder is created if necessary.

    Args:
        path: Lock file.
        runs: Run store, as messages name it.
        holder: Description of this process, which other processes show in their messages.
        refusal: Message if the lock is held, with ``{}`` for the description of its holder.
    Raises:
        LockedError: another process holds the lock.
        InputError: the store cannot be written or locked.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Never through a link, because the holder is written into this file.
        lock = os.fdopen(
            os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666), "a+", encoding="utf-8"
        )
    except OSError as error:
        raise InputError(f"run store {runs}: cannot be written: {error.strerror}; choose another with --runs") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            current = lock.read().strip() or "another process"
            raise LockedError(f"run store {runs}: {refusal.format(current)}, or choose another with --runs") from None
        except OSError as error:  # some network file systems and mounted buckets have no locks
            raise InputError(
                f"run store {runs}: {path} cannot be locked: {error.strerror}; choose a local disk with --runs"
            ) from None
        os.ftruncate(lock.fileno(), 0)
        with suppress(OSError):  # on a full disk the holder stays unnamed
            os.write(lock.fileno(), holder.encode())
        yield
