"""The run store: one run at a time may write to it, and which of its runs is the newest."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from pipeline.errors import InputError, LockedError


def oldest_first(run_ids: Iterable[str]) -> list[str]:
    """Sort run ids by the time at which their runs began, which an id begins with; the last one is the newest run.

    A time that has not come yet is from a clock that was wrong, and a name that is no run id has none: nothing tells when these
    runs were, so they count as older than all others.
    """
    now = f"{datetime.now(UTC):%Y%m%d-%H%M%S}"
    return sorted(run_ids, key=lambda run_id: (run_id[: len(now)] <= now, run_id))


def store_folder(runs: str) -> Path:
    """The folder of a run store, as a command names it; it may not exist yet.

    Raises: InputError: an address, or nothing at all, which would be the current folder.
    """
    if not runs or "://" in runs:
        raise InputError(f"run store {runs!r}: expected a local or mounted folder; choose one with --runs")
    return Path(runs)


@contextmanager
def hold_store(runs: Path, run_id: str) -> Iterator[None]:
    """Hold the run store for one run; a killed run's lock is gone with its process.

    Raises: LockedError: another run holds it.
    """
    with hold(runs / ".lock", runs, holder=f"run {run_id}, process {os.getpid()}", refusal="in use by {}; wait for it"):
        yield


@contextmanager
def hold_run(run: Path, *, alone: bool) -> Iterator[None]:
    """Hold a finished run: any number may publish it at a time, and who deletes it is alone with it.

    Where there is no such folder, or its file system has no locks for folders, nobody is kept out.
    Raises: LockedError: it is being deleted, or published while this one wants to be alone.
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
    """Hold a lock file of a run store; makes its folder.

    Args:
        path: The lock file.
        runs: The run store, as the messages name it.
        holder: Who holds it now, for who comes next.
        refusal: What who comes next is told, with ``{}`` for the holder.
    Raises:
        LockedError: somebody else holds it.
        InputError: the store cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Never through a link: who holds the store is written into this file.
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
            there = lock.read().strip() or "somebody else"
            raise LockedError(f"run store {runs}: {refusal.format(there)}, or choose another with --runs") from None
        except OSError as error:  # some network file systems and mounted buckets have no locks
            raise InputError(
                f"run store {runs}: {path} cannot be locked: {error.strerror}; choose a local disk with --runs"
            ) from None
        os.ftruncate(lock.fileno(), 0)
        with suppress(OSError):  # on a full disk who comes next is told no name
            os.write(lock.fileno(), holder.encode())
        yield
