"""What goes of a run store, by policy: old runs and abandoned checkpoints. The history over runs stays as it is.

Looks only at folders that are named as a run or a checkpoint is; everything else in the store, and every symbolic link, is left alone.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import tomllib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pipeline.errors import DataError, InputError, LockedError, LorafleetError
from pipeline.store.folders import RUN_NAME, explain, kind_of
from pipeline.store.lock import hold_run, hold_store, oldest_first
from pipeline.store.manifest import RunManifest, read_manifest
from pipeline.store.run_folder import LARGEST_RECORD_BYTES, RunFolder, read_file

ABANDONED_DAYS = 7
"""Work that was begun and not finished is somebody's to go on with before that, whatever the policy."""

_KEY = re.compile(r"[0-9a-f]{32}")
_DELETED = ".deleted-"
_DELETED_MANIFEST = "manifest.deleted.json"


@dataclass(frozen=True)
class Policy:
    """What may go; both must hold."""

    keep: int = 10
    """Newest finished runs of each MTEB task that stay."""
    older_than_days: float = 30.0
    """Since a run was finished, or something was last written to what was not."""


@dataclass(frozen=True)
class Verdict:
    """What becomes of one folder, and why."""

    path: Path
    what: Literal["run", "unfinished run", "checkpoint"]
    goes: bool
    reason: str
    num_bytes: int


@dataclass(frozen=True)
class PruneResult:
    """What came of pruning a store."""

    verdicts: tuple[Verdict, ...]
    failures: tuple[str, ...]
    """Folders that could not be deleted, and why."""
    freed_bytes: int
    """That are gone, or would be."""


@dataclass(frozen=True)
class Checkpoint:
    """A training that was begun: under way, to be gone on with, or abandoned."""

    path: Path
    num_bytes: int
    last_written: datetime

    def age_days(self, now: datetime) -> float:
        """Days since something was written to it."""
        return _days(self.last_written, now)


def prune(runs: Path, policy: Policy, *, dry_run: bool) -> PruneResult:
    """Delete what the policy does not keep. Killed anywhere, no run and no checkpoint is half of one, and the next call goes on.

    Raises:
        InputError: something else than a run store lies there, or a number is none.
        LockedError: a run holds the store.
        LorafleetError: the store cannot be read.
    """
    if not (math.isfinite(policy.older_than_days) and policy.older_than_days >= 0 and policy.keep >= 0):
        raise InputError(
            f"expected numbers from 0 on, found {policy.keep} runs to keep and {policy.older_than_days:g} days"
        )
    if kind_of(runs) != "run store":
        raise InputError(
            f"cannot prune {runs}: {explain(runs)}; name the run store, the folder that `lorafleet train --runs` was given"
        )
    if dry_run:
        with hold_store(runs, "being looked at"):
            pass  # a store in use is refused as it would be without --dry-run
        verdicts = _judge_now(runs, policy)
        return PruneResult(tuple(verdicts), (), sum(verdict.num_bytes for verdict in verdicts if verdict.goes))
    with hold_store(runs, "being pruned"):
        verdicts = _judge_now(runs, policy)
        failures, freed = [], 0
        for verdict in (verdict for verdict in verdicts if verdict.goes):
            try:
                (_delete_checkpoint if verdict.what == "checkpoint" else _delete_run)(verdict.path)
                freed += verdict.num_bytes
            except OSError as error:
                failures.append(f"{verdict.path}: {error.strerror}: {error.filename}")
            except LockedError as error:
                failures.append(str(error))
        return PruneResult(tuple(verdicts), tuple(failures), freed)


def judge(runs: Path, policy: Policy, *, now: datetime) -> list[Verdict]:
    """What would become of each run of a store, finished or not, by name, and then of each checkpoint. Changes nothing."""
    verdicts: list[Verdict] = []
    finished: dict[str, RunManifest] = {}
    for path in _folders(runs, RUN_NAME):
        manifest = _manifest(path)
        if isinstance(manifest, RunManifest):
            finished[path.name] = manifest
        else:
            verdicts.append(manifest or _judge_unfinished(path, policy, now))
    newest = _newest(runs, finished)
    verdicts += [_judge_run(runs / name, manifest, newest, policy, now) for name, manifest in finished.items()]
    verdicts.sort(key=lambda verdict: verdict.path.name)
    return [*verdicts, *(_judge_checkpoint(checkpoint, policy, now) for checkpoint in checkpoints(runs))]


def checkpoints(runs: Path) -> list[Checkpoint]:
    """Of trainings that were begun and not finished, by name; those whose deletion was begun come first."""
    work = runs / ".work"
    if work.is_symlink() or not work.is_dir():
        return []
    return [
        Checkpoint(path, _num_bytes(path), _last_written(path))
        for path in _folders(work, re.compile(rf"({re.escape(_DELETED)})?{_KEY.pattern}"))
        if not path.is_symlink()
    ]


def _judge_now(runs: Path, policy: Policy) -> list[Verdict]:
    try:
        return judge(runs, policy, now=datetime.now(UTC))
    except OSError as error:
        raise LorafleetError(
            f"run store {runs}: cannot be read: {error.strerror}: {error.filename}; nothing was deleted"
        ) from None


def _folders(place: Path, name: re.Pattern[str]) -> list[Path]:
    """Folders, and symbolic links to some, that are named so."""
    return sorted(path for path in place.iterdir() if name.fullmatch(path.name) and path.is_dir())


def _manifest(path: Path) -> RunManifest | Verdict | None:
    """Of a finished run; why a folder is left alone that is neither a finished run nor an unfinished one; none of the latter."""
    folder = RunFolder(path)
    if path.is_symlink():
        return Verdict(path, "run", goes=False, reason="a symbolic link, which is never followed", num_bytes=0)
    if folder.manifest.is_file():
        try:
            manifest = read_manifest(folder)
        except DataError as error:
            return _kept(path, "run", str(error))
        return (
            manifest
            if manifest.run_id == path.name
            else _kept(path, "run", f"its manifest is of another run, {manifest.run_id}")
        )
    if not _deletion_begun(path) and not _is_our_config(folder.config):
        return _kept(
            path, "unfinished run", "no manifest.json and no config.toml of a run in it, so perhaps not lorafleet's"
        )
    return None


def _newest(runs: Path, finished: Mapping[str, RunManifest]) -> dict[str, list[str]]:
    """MTEB task -> the runs that hold it, finished without failure, newest first."""
    newest: defaultdict[str, list[str]] = defaultdict(list)
    for name in reversed(oldest_first(finished)):
        for mteb_task in finished[name].mteb_tasks:
            if RunFolder(runs / name).task(mteb_task.name).result.is_file():
                newest[mteb_task.name].append(name)
    return newest


def _judge_run(
    path: Path, manifest: RunManifest, newest: Mapping[str, Sequence[str]], policy: Policy, now: datetime
) -> Verdict:
    places = {task: names.index(path.name) for task, names in newest.items() if path.name in names}
    last_good = [task for task, place in places.items() if place == 0]
    among_newest = [task for task, place in places.items() if place < policy.keep]
    days = _days(manifest.created_at, now)
    if reason := _published(path, manifest):
        return _kept(path, "run", reason)
    if last_good:
        return _kept(path, "run", f"the last good run of {', '.join(last_good)}")
    if among_newest:
        return _kept(path, "run", f"among the newest {policy.keep} runs of {', '.join(among_newest)}")
    if days < 0:
        return _kept(path, "run", "finished at a time that has not come yet, so its age is not known")
    if days <= policy.older_than_days:
        return _kept(path, "run", f"finished {_ago(days)}, not more than {policy.older_than_days:g} days")
    try:
        with hold_run(path, alone=True):
            pass
    except LockedError:
        return _kept(path, "run", "is being published")
    others = (
        f"not among the newest {policy.keep} runs of {', '.join(places)}"
        if places
        else "none of its MTEB tasks finished"
    )
    return _goes(path, "run", f"finished {_ago(days)}, {others}")


def _published(path: Path, manifest: RunManifest) -> str:
    """Why a run has to stay that is published somewhere: the tag that it can be rolled back to names it. Empty if it is not."""
    from pipeline.store.tables import read_gate  # here, because doctor counts checkpoints even where pyarrow is broken

    gate = RunFolder(path).gate
    if not gate.exists():
        return ""
    try:
        decisions = read_gate(gate)
    except DataError as error:
        return f"whether it was published cannot be read: {error}"
    # Published a second time, a run's own adapter is kept as "the published adapter"; so is one that was only taken over, which is not its.
    promoted = [
        row
        for row in decisions
        if row.decision == "promote"
        or (row.published_sha256 == row.candidate_sha256 and row.mteb_task not in manifest.reused)
    ]
    places = ", ".join(dict.fromkeys(row.to for row in promoted))
    return f"published to {places}: {', '.join(row.mteb_task for row in promoted)}" if promoted else ""


def _judge_unfinished(path: Path, policy: Policy, now: datetime) -> Verdict:
    if _deletion_begun(path):
        return _goes(path, "run", "its deletion was begun before")
    days, least = _days(_last_written(path), now), max(policy.older_than_days, ABANDONED_DAYS)
    if days <= least:
        return _kept(path, "unfinished run", f"last written {_ago(days)}, not more than {least:g} days")
    return _goes(path, "unfinished run", f"never finished, and last written {_ago(days)}")


def _judge_checkpoint(checkpoint: Checkpoint, policy: Policy, now: datetime) -> Verdict:
    days, least = checkpoint.age_days(now), max(policy.older_than_days, ABANDONED_DAYS)
    if checkpoint.path.name.startswith(_DELETED):
        return Verdict(checkpoint.path, "checkpoint", True, "its deletion was begun before", checkpoint.num_bytes)
    if days <= least:
        reason = f"last written {_ago(days)}, not more than {least:g} days: the same command goes on from it"
        return Verdict(checkpoint.path, "checkpoint", False, reason, checkpoint.num_bytes)
    return Verdict(checkpoint.path, "checkpoint", True, f"abandoned: last written {_ago(days)}", checkpoint.num_bytes)


def _kept(path: Path, what: Literal["run", "unfinished run"], reason: str) -> Verdict:
    return Verdict(path, what, goes=False, reason=reason, num_bytes=_num_bytes(path))


def _goes(path: Path, what: Literal["run", "unfinished run"], reason: str) -> Verdict:
    return Verdict(path, what, goes=True, reason=reason, num_bytes=_num_bytes(path))


def _delete_run(root: Path) -> None:
    """The manifest is renamed first and its new name goes last: whatever is left in between is no finished run, and known as deleted.

    Raises: LockedError: it is being published, or has been since it was judged.
    """
    folder, mark = RunFolder(root), root / _DELETED_MANIFEST
    with hold_run(root, alone=True):
        if folder.manifest.is_file():
            if reason := _published(root, read_manifest(folder)):
                raise LockedError(f"run {root}: {reason}, a moment ago")
            folder.manifest.replace(mark)
        elif any(root.iterdir()):
            mark.touch()
        for path in root.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path != mark:
                path.unlink()
        mark.unlink(missing_ok=True)
        root.rmdir()


def _delete_checkpoint(path: Path) -> None:
    """Renamed first: no training must ever go on from half of it."""
    if not path.name.startswith(_DELETED):
        path = path.rename(path.with_name(f"{_DELETED}{path.name}"))
    shutil.rmtree(path)


def _deletion_begun(path: Path) -> bool:
    """Also where only the empty folder is left."""
    return (path / _DELETED_MANIFEST).is_file() or not any(path.iterdir())


def _is_our_config(path: Path) -> bool:
    try:
        values = tomllib.loads(read_file(path, at_most=LARGEST_RECORD_BYTES).decode())
    except (OSError, ValueError, RecursionError):
        return False
    return {"encoder", "mteb_tasks"} <= set(values)


def _below(root: Path) -> Iterator[os.stat_result]:
    """Of a folder and all in it; of a symbolic link itself."""
    yield root.lstat()
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            with suppress(FileNotFoundError):  # gone since, where nobody holds the store
                yield Path(folder, name).lstat()


def _num_bytes(root: Path) -> int:
    return sum(entry.st_size for entry in _below(root))


def _last_written(root: Path) -> datetime:
    return datetime.fromtimestamp(max(entry.st_mtime for entry in _below(root)), UTC)


def _days(since: datetime, now: datetime) -> float:
    return (now - since).total_seconds() / 86400


def _ago(days: float) -> str:
    return f"{max(days, 0):.0f} days ago" if days >= 2 else f"{max(days, 0) * 24:.0f} hours ago"
