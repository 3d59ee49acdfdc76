"""Checks of this machine for ``lorafleet doctor``: run store, disk, memory and the like.

Imports only the standard library at first, so that it works even if another library is missing or broken.
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
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from humanize import naturalsize

from pipeline.errors import first_line
from pipeline.machine import LEAST_ROOM_BYTES, existing, free_bytes

Status = Literal["ok", "warning", "fault"]
"""``fault``: no run will work. ``warning``: some runs will fail, or work worse than they could."""

LEAST_DISK_BYTES = 5 * 10**9
LEAST_SHARED_MEMORY_BYTES = 256 * 1024**2  # the object store of a local Ray, with some reserve
LEAST_MEMORY_BYTES = 2 * 1024**3  # a worker with torch, an encoder and its data
LEAST_OPEN_FILES = 8192  # what Ray recommends


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    status: Status
    name: str
    found: str
    advice: str = ""
    """Advice to the user; empty if there is none."""


def check_store(runs: Path) -> Check:
    """Check that the run store can be written and locked, and whether it is in use."""
    parent = existing(runs)
    if not parent.is_dir():
        return Check("fault", "run store", f"{runs}: {parent} is not a folder", "choose another store with --runs")
    elsewhere = "give this user the right to write there, or choose another store with --runs"
    try:
        with tempfile.TemporaryFile(dir=parent) as file:
            file.write(b"a run store needs to be written")
    except OSError as error:
        return Check("fault", "run store", f"{runs}: {parent} cannot be written: {error.strerror}", elsewhere)
    if parent != runs.absolute():
        return Check("ok", "run store", f"{runs}: does not exist yet, and can be created")
    try:
        holder = _holder(runs / ".lock")
    except OSError as error:
        return Check("fault", "run store", f"{runs}: its lock cannot be taken: {error.strerror}", elsewhere)
    return Check(
        "ok", "run store", f"{runs}: can be written, {f'and is in use by {holder}' if holder else 'not in use'}"
    )


def check_checkpoints(runs: Path) -> Check:
    """Check for checkpoints of unfinished trainings."""
    from pipeline.history.verdicts import ABANDONED_DAYS, checkpoints

    unfinished = checkpoints(runs)
    if not unfinished:
        return Check("ok", "checkpoints", "none are left over")
    now = datetime.now(UTC)
    oldest = max(checkpoint.age_days(now) for checkpoint in unfinished)
    size = naturalsize(sum(checkpoint.num_bytes for checkpoint in unfinished))
    facts = f"{len(unfinished)} of unfinished trainings, {size}, the oldest last written {oldest:.0f} days ago"
    if oldest <= ABANDONED_DAYS:
        return Check("ok", "checkpoints", f"{facts}; the same command resumes them")
    prune = f"lorafleet prune {runs} --older-than {ABANDONED_DAYS} --dry-run"
    return Check("warning", "checkpoints", facts, f"the same command resumes them; `{prune}` lists what can be deleted")


def check_bytecode(library: str = "torch") -> Check:
    """Check that the libraries' bytecode is cached, or will be. Otherwise every process compiles them again."""
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
    found = (
        f"the libraries are not compiled, and {why}: "
        "each process of a run compiles them again, which takes about ten seconds"
    )
    return Check(
        "warning",
        "bytecode",
        found,
        f"{advice}, or `{sys.executable} -m compileall -q -j 0 {Path(spec.origin).parents[1]}`",
    )


def check_disk(runs: Path) -> Check:
    """Check the free space on the disk of the run store."""
    free = free_bytes(runs)
    advice = "free some space (`lorafleet prune` deletes old runs), or choose another disk with --runs"
    if free is None:
        return Check(
            "warning",
            "disk",
            f"the file system of {existing(runs)} does not report its free space",
            "make sure that a run has enough space there",
        )
    if free < LEAST_ROOM_BYTES:
        return Check(
            "fault", "disk", f"{naturalsize(free)} free on the disk of the run store: no run can start", advice
        )
    return _at_least(
        free,
        LEAST_DISK_BYTES,
        Check("warning", "disk", f"{naturalsize(free)} free on the disk of the run store", advice),
    )


def check_home() -> Check:
    """Check that the home folder, where libraries keep their caches, exists and can be written."""
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
            "set HOME to a folder that can: libraries keep their caches there, and some do not start without one",
        )


def check_shared_memory() -> Check:
    """Check the free shared memory, where Ray keeps the objects of its processes."""
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return Check("ok", "shared memory", "this system has no /dev/shm; Ray uses files instead")
    free = shutil.disk_usage(folder).free
    advice = "Ray would use a disk instead, which is slower; give a container more with --shm-size=1g"
    return _at_least(
        free,
        LEAST_SHARED_MEMORY_BYTES,
        Check("warning", "shared memory", f"{naturalsize(free)} free in {folder}", advice),
    )


def check_memory() -> Check:
    """Check the available memory."""
    free = available_memory()
    if free is None:
        return Check("ok", "memory", "not known on this system")
    advice = "end other programs, or train fewer MTEB tasks at a time: --set compute.workers=1"
    return _at_least(free, LEAST_MEMORY_BYTES, Check("warning", "memory", f"{naturalsize(free)} available", advice))


def check_open_files() -> Check:
    """Check the hard limit on open files and sockets per process, up to which Ray raises the soft limit."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    advice = (
        f"Ray recommends {LEAST_OPEN_FILES:,}: raise it with `ulimit -Hn`, "
        f"or for a container with --ulimit nofile={LEAST_OPEN_FILES}"
    )
    if limit == resource.RLIM_INFINITY:
        return Check("ok", "open files", "no limit")
    return _at_least(limit, LEAST_OPEN_FILES, Check("warning", "open files", f"at most {limit:,} per process", advice))


def available_memory() -> int | None:
    """Available memory in bytes: that of the machine, or of the control group if it is smaller. None if unknown."""
    machine = re.search(r"^MemAvailable:\s*(\d+) kB", _text("/proc/meminfo"), re.MULTILINE)
    limit, used = _text("/sys/fs/cgroup/memory.max").strip(), _text("/sys/fs/cgroup/memory.current").strip()
    in_group = [int(limit) - int(used)] if limit.isdecimal() and used.isdecimal() else []
    return min([1024 * int(machine[1]), *in_group]) if machine else None


def guarded(name: str, check: Callable[[], Check]) -> Check:
    """Run a check. An exception becomes a warning in the report."""
    try:
        return check()
    except Exception as error:  # noqa: BLE001 - a report with a gap is better than none
        found = f"not checked: {type(error).__name__}: {first_line(error)}"
        return Check("warning", name, found, "fix what that names first")


def _at_least(value: int, least: int, otherwise: Check) -> Check:
    return otherwise if value < least else Check("ok", otherwise.name, otherwise.found)


def _holder(lock: Path) -> str:
    """Description of the process that has locked a store; empty if it is not locked."""
    if not lock.exists():
        return ""
    with lock.open("a+", encoding="utf-8") as file:
        try:
            # A shared lock, held for an instant, so that two doctors do not disturb each other.
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
