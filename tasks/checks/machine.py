"""What ``lorafleet doctor`` looks at on this machine, without Prefect, Ray or torch: the run store, its disk, memory.

Imports the standard library only, so that it works where another library is missing or broken.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import re
import resource
import shutil
import sys
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pipeline.machine import LEAST_ROOM_BYTES, existing, free_bytes

Status = Literal["ok", "warning", "fault"]
"""``fault``: no run will work. ``warning``: some will not, or not as well as they could."""

LEAST_DISK_BYTES = 5 * 10**9
LEAST_SHARED_MEMORY_BYTES = 256 * 1024**2  # the object store of a local Ray, and some
LEAST_MEMORY_BYTES = 2 * 1024**3  # a worker with torch, an encoder and its data
LEAST_OPEN_FILES = 8192  # what Ray recommends


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    status: Status
    name: str
    found: str
    advice: str = ""
    """What to do; empty where there is nothing to do."""


def check_store(runs: Path) -> Check:
    """Whether a run could write there, and whether one does."""
    place = existing(runs)
    if not place.is_dir():
        return Check("fault", "run store", f"{runs}: {place} is not a folder", "choose another store with --runs")
    elsewhere = "give this user the right to write there, or choose another store with --runs"
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"a run store needs to be written")
    except OSError as error:
        return Check("fault", "run store", f"{runs}: {place} cannot be written: {error.strerror}", elsewhere)
    if place != runs.absolute():
        return Check("ok", "run store", f"{runs}: not there yet, and can be made")
    try:
        holder = _holder(runs / ".lock")
    except OSError as error:
        return Check("fault", "run store", f"{runs}: its lock cannot be taken: {error.strerror}", elsewhere)
    return Check(
        "ok", "run store", f"{runs}: can be written, {f'and is in use by {holder}' if holder else 'not in use'}"
    )


def check_checkpoints(runs: Path) -> Check:
    """What lies there of trainings that were begun and not finished."""
    from pipeline.store.verdicts import ABANDONED_DAYS, checkpoints

    found = checkpoints(runs)
    if not found:
        return Check("ok", "checkpoints", "none are left over")
    now = datetime.now(UTC)
    oldest = max(checkpoint.age_days(now) for checkpoint in found)
    size = readable_bytes(sum(checkpoint.num_bytes for checkpoint in found))
    facts = f"{len(found)} of trainings that were not finished, {size}, the oldest last written {oldest:.0f} days ago"
    if oldest <= ABANDONED_DAYS:
        return Check("ok", "checkpoints", f"{facts}; the same command goes on from them")
    prune = f"lorafleet prune {runs} --older-than {ABANDONED_DAYS} --dry-run"
    return Check(
        "warning", "checkpoints", facts, f"the same command goes on from them; `{prune}` says what can be deleted"
    )


def check_bytecode(library: str = "torch") -> Check:
    """Whether the libraries lie there compiled, or will after their first import; else every process compiles them anew."""
    spec = importlib.util.find_spec(library)
    if spec is None or spec.origin is None:
        return Check("ok", "bytecode", f"{library} is not installed")
    cache = Path(importlib.util.cache_from_source(spec.origin))
    if cache.is_file():
        return Check("ok", "bytecode", "the libraries are compiled")
    if sys.dont_write_bytecode:
        why, advice = "PYTHONDONTWRITEBYTECODE is set", "unset it"
    elif not os.access(existing(cache), os.W_OK):
        why, advice = f"{existing(cache)} cannot be written", "set PYTHONPYCACHEPREFIX to a folder that can"
    else:
        return Check("ok", "bytecode", "the libraries are compiled when they are first imported")
    found = f"the libraries are not compiled, and {why}: each process of a run compiles them anew, for some ten seconds"
    return Check(
        "warning",
        "bytecode",
        found,
        f"{advice}, or `{sys.executable} -m compileall -q -j 0 {Path(spec.origin).parents[1]}`",
    )


def check_disk(runs: Path) -> Check:
    """Where the run store lies, or will."""
    free, advice = (
        free_bytes(runs),
        "free some space (`lorafleet prune` deletes old runs), or choose another disk with --runs",
    )
    if free is None:
        return Check(
            "warning",
            "disk",
            f"the file system of {existing(runs)} does not say how much is free",
            "see that a run has room there",
        )
    if free < LEAST_ROOM_BYTES:
        return Check("fault", "disk", f"{readable_bytes(free)} free where the run store lies: no run can start", advice)
    return _at_least(
        free,
        LEAST_DISK_BYTES,
        Check("warning", "disk", f"{readable_bytes(free)} free where the run store lies", advice),
    )


def check_home() -> Check:
    """Where libraries keep what they download and remember; a user of a container may have none."""
    try:
        home = Path.home()
        with tempfile.TemporaryFile(dir=existing(home / ".cache")):
            return Check("ok", "home", f"{home} can be written")
    except (OSError, RuntimeError) as error:
        found = f"the home folder cannot be written: {getattr(error, 'strerror', None) or error}"
        return Check(
            "warning",
            "home",
            found,
            "set HOME to a folder that can: libraries keep their caches there, and some do not start without",
        )


def check_shared_memory() -> Check:
    """Where Ray keeps what its processes share."""
    place = Path("/dev/shm")
    if not place.is_dir():
        return Check("ok", "shared memory", "this system has no /dev/shm; Ray uses files in its place")
    free = shutil.disk_usage(place).free
    advice = "Ray would use a disk in its place, which is slower; give a container more, with --shm-size=1g"
    return _at_least(
        free,
        LEAST_SHARED_MEMORY_BYTES,
        Check("warning", "shared memory", f"{readable_bytes(free)} free in {place}", advice),
    )


def check_memory() -> Check:
    """What processes may still take."""
    free = available_memory()
    if free is None:
        return Check("ok", "memory", "not known on this system")
    advice = "end other programs, or train fewer MTEB tasks at a time: --set compute.workers=1"
    return _at_least(free, LEAST_MEMORY_BYTES, Check("warning", "memory", f"{readable_bytes(free)} available", advice))


def check_open_files() -> Check:
    """Files and sockets that a process may have open; Ray raises the limit to what it may be raised to."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    advice = f"Ray recommends {LEAST_OPEN_FILES:,}: raise it with `ulimit -Hn`, or --ulimit nofile={LEAST_OPEN_FILES} of a container"
    if limit == resource.RLIM_INFINITY:
        return Check("ok", "open files", "no limit")
    return _at_least(limit, LEAST_OPEN_FILES, Check("warning", "open files", f"at most {limit:,} per process", advice))


def available_memory() -> int | None:
    """Bytes that this process and its children may still take: of the machine, or of their control group if that is less."""
    machine = re.search(r"^MemAvailable:\s*(\d+) kB", _text("/proc/meminfo"), re.MULTILINE)
    limit, used = _text("/sys/fs/cgroup/memory.max").strip(), _text("/sys/fs/cgroup/memory.current").strip()
    of_group = [int(limit) - int(used)] if limit.isdecimal() and used.isdecimal() else []
    return min([1024 * int(machine[1]), *of_group]) if machine else None


def readable_bytes(num_bytes: float) -> str:
    """``1.2 GB``; decimal, as disks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" or num_bytes >= 100 else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.1f} TB"


def _at_least(there: int, least: int, otherwise: Check) -> Check:
    return otherwise if there < least else Check("ok", otherwise.name, otherwise.found)


def _holder(lock: Path) -> str:
    """Who holds a store; empty if nobody does."""
    if not lock.exists():
        return ""
    with lock.open("a+", encoding="utf-8") as file:
        try:
            # Shared and for an instant only, so that doctors do not disturb each other.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            return file.read().strip() or "another run"
    return ""


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""
