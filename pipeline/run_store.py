"""The run store: one run at a time may write to it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.errors import InputError, LockedError


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
            _lock(folder, alone=alone, refusal=f"run {run}: is being published" if alone else f"run {run}: is being deleted")
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
        lock = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise InputError(f"run store {runs}: cannot be written: {error.strerror}; choose another with --runs") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            there = lock.read().strip() or "somebody else"
            raise LockedError(f"run store {runs}: {refusal.format(there)}, or choose another with --runs") from None
        lock.seek(0)
        lock.truncate()
        lock.write(holder)
        lock.flush()
        yield
