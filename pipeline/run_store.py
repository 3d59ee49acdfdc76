"""The run store: one run at a time may write to it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import InputError, LockedError


@contextmanager
def hold_store(runs: Path, run_id: str) -> Iterator[None]:
    """Hold the run store for one run; a killed run's lock is gone with its process.

    Raises: LockedError: another run holds it.
    """
    try:
        runs.mkdir(parents=True, exist_ok=True)
        lock = (runs / ".lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise InputError(f"run store {runs}: cannot be written: {error.strerror}; choose another with --runs") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip() or "another run"
            raise LockedError(f"run store {runs}: in use by {holder}; wait for it, or choose another with --runs") from None
        lock.seek(0)
        lock.truncate()
        lock.write(f"run {run_id}, process {os.getpid()}")
        lock.flush()
        yield
