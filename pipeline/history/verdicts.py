"""Verdicts of a retention policy on the runs and checkpoints of a store. Deletes nothing.

Considers only folders that are named like a run or a checkpoint. Symbolic links are never followed.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pipeline.errors import DataError, LockedError
from pipeline.store.files import LARGEST_RECORD_BYTES, read_file
from pipeline.store.folders import RUN_NAME
from pipeline.store.lock import hold_run, oldest_first
from pipeline.store.manifest import RunManifest, read_manifest
from pipeline.store.run_folder import RunFolder

ABANDONED_DAYS = 7
"""Unfinished work younger than this is never deleted: a user may still resume it."""

_KEY = re.compile(r"[0-9a-f]{32}")
DELETED = ".deleted-"
"""Prefix of a checkpoint whose deletion was started."""
DELETED_MANIFEST = "manifest.deleted.json"
"""Name of the manifest in a run whose deletion was started."""


@dataclass(frozen=True)
class Policy:
    """Limits of what a store may lose. A run is deleted only if both limits allow it."""

    keep: int = 10
    """Number of the newest finished runs of each MTEB task that are kept."""
    older_than_days: float = 30.0
    """Age since a run finished, or since the last write to unfinished work."""


@dataclass(frozen=True)
class Verdict:
    """Decision about one folder, with its reason."""

    path: Path
    what: Literal["run", "unfinished run", "checkpoint"]
    goes: bool
    """Whether the folder is to be deleted."""
    reason: str
    num_bytes: int


@dataclass(frozen=True)
class Checkpoint:
    """Checkpoint of a training that is under way, resumable or abandoned."""

    path: Path
    num_bytes: int
    last_written: datetime

    def age_days(self, now: datetime) -> float:
        """Days since the last write."""
        return _days(self.last_written, now)


def judge(runs: Path, policy: Policy, *, now: datetime) -> list[Verdict]:
    """Decide about each run of a store, and then about each checkpoint. Changes nothing.

    Args:
        runs: Run store.
        policy: What is kept.
        now: Time that ages are counted to.
    Returns:
        One verdict per run, finished or not, sorted by name, then one per checkpoint.
    """
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
    """List the checkpoints of unfinished trainings by name. Half-deleted ones come first."""
    work = runs / ".work"
    if work.is_symlink() or not work.is_dir():
        return []
    return [
        Checkpoint(path, _num_bytes(path), _last_written(path))
        for path in _folders(work, re.compile(rf"({re.escape(DELETED)})?{_KEY.pattern}"))
        if not path.is_symlink()
    ]


def _folders(parent: Path, name: re.Pattern[str]) -> list[Path]:
    """Folders, and symbolic links to folders, whose names match."""
    return sorted(path for path in parent.iterdir() if name.fullmatch(path.name) and path.is_dir())


def _manifest(path: Path) -> RunManifest | Verdict | None:
    """Return the manifest of a finished run, a verdict for a folder to leave alone, or None for an unfinished run."""
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
            else _kept(path, "run", f"its manifest belongs to another run, {manifest.run_id}")
        )
    if not _deletion_begun(path) and not _is_our_config(folder.config):
        return _kept(
            path, "unfinished run", "it has neither a manifest.json nor a config.toml of a run, so it may not be a run"
        )
    return None


def _newest(runs: Path, finished: Mapping[str, RunManifest]) -> dict[str, list[str]]:
    """Map each MTEB task to the finished runs that have a result of it, newest first."""
    newest: defaultdict[str, list[str]] = defaultdict(list)
    for name in reversed(oldest_first(finished)):
        for mteb_task in finished[name].mteb_tasks:
            if RunFolder(runs / name).task(mteb_task.name).result.is_file():
                newest[mteb_task.name].append(name)
    return newest


def _judge_run(
    path: Path, manifest: RunManifest, newest: Mapping[str, Sequence[str]], policy: Policy, now: datetime
) -> Verdict:
    ranks = {task: names.index(path.name) for task, names in newest.items() if path.name in names}
    last_good = [task for task, rank in ranks.items() if rank == 0]
    among_newest = [task for task, rank in ranks.items() if rank < policy.keep]
    days = _days(manifest.created_at, now)
    if reason := published_to(path, manifest):
        return _kept(path, "run", reason)
    if last_good:
        return _kept(path, "run", f"the last good run of {', '.join(last_good)}")
    if among_newest:
        return _kept(path, "run", f"among the newest {policy.keep} runs of {', '.join(among_newest)}")
    if days < 0:
        return _kept(path, "run", "finished at a time in the future, so its age is unknown")
    if days <= policy.older_than_days:
        return _kept(path, "run", f"finished {_ago(days)}, not more than {policy.older_than_days:g} days")
    try:
        with hold_run(path, alone=True):
            pass
    except LockedError:
        return _kept(path, "run", "is being published")
    others = (
        f"not among the newest {policy.keep} runs of {', '.join(ranks)}" if ranks else "none of its MTEB tasks finished"
    )
    return _goes(path, "run", f"finished {_ago(days)}, {others}")


def published_to(path: Path, manifest: RunManifest) -> str:
    """Reason to keep a published run, which a rollback tag names. Empty if the run is not published."""
    from pipeline.history.tables import read_gate  # imported here, because doctor uses this module without pyarrow

    gate = RunFolder(path).gate
    if not gate.exists():
        return ""
    try:
        decisions = read_gate(gate)
    except DataError as error:
        return f"cannot read whether it was published: {error}"
    # When a run is published again, the gate keeps its own adapters as already published. It also keeps adapters taken
    # over from another run, but those are not this run's.
    promoted = [
        row
        for row in decisions
        if row.decision == "promote"
        or (row.published_sha256 == row.candidate_sha256 and row.mteb_task not in manifest.reused)
    ]
    targets = ", ".join(dict.fromkeys(row.to for row in promoted))
    return f"published to {targets}: {', '.join(row.mteb_task for row in promoted)}" if promoted else ""


def _judge_unfinished(path: Path, policy: Policy, now: datetime) -> Verdict:
    if _deletion_begun(path):
        return _goes(path, "run", "its deletion was interrupted")
    days, least = _days(_last_written(path), now), max(policy.older_than_days, ABANDONED_DAYS)
    if days <= least:
        return _kept(path, "unfinished run", f"last written {_ago(days)}, not more than {least:g} days")
    return _goes(path, "unfinished run", f"never finished, and last written {_ago(days)}")


def _judge_checkpoint(checkpoint: Checkpoint, policy: Policy, now: datetime) -> Verdict:
    days, least = checkpoint.age_days(now), max(policy.older_than_days, ABANDONED_DAYS)
    if checkpoint.path.name.startswith(DELETED):
        return Verdict(checkpoint.path, "checkpoint", True, "its deletion was interrupted", checkpoint.num_bytes)
    if days <= least:
        reason = f"last written {_ago(days)}, not more than {least:g} days: the same command resumes it"
        return Verdict(checkpoint.path, "checkpoint", False, reason, checkpoint.num_bytes)
    return Verdict(checkpoint.path, "checkpoint", True, f"abandoned: last written {_ago(days)}", checkpoint.num_bytes)


def _kept(path: Path, what: Literal["run", "unfinished run"], reason: str) -> Verdict:
    return Verdict(path, what, goes=False, reason=reason, num_bytes=_num_bytes(path))


def _goes(path: Path, what: Literal["run", "unfinished run"], reason: str) -> Verdict:
    return Verdict(path, what, goes=True, reason=reason, num_bytes=_num_bytes(path))


def _deletion_begun(path: Path) -> bool:
    """Whether the deletion of a run was started, even if only the empty folder is left."""
    return (path / DELETED_MANIFEST).is_file() or not any(path.iterdir())


def _is_our_config(path: Path) -> bool:
    try:
        values = tomllib.loads(read_file(path, at_most=LARGEST_RECORD_BYTES).decode())
    except (OSError, ValueError, RecursionError):
        return False
    return {"encoder", "mteb_tasks"} <= set(values)


def _below(root: Path) -> Iterator[os.stat_result]:
    """Status of a folder and of everything in it. Symbolic links are not followed."""
    yield root.lstat()
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            with suppress(FileNotFoundError):  # deleted meanwhile, if the store is not locked
                yield Path(folder, name).lstat()


def _num_bytes(root: Path) -> int:
    return sum(entry.st_size for entry in _below(root))


def _last_written(root: Path) -> datetime:
    return datetime.fromtimestamp(max(entry.st_mtime for entry in _below(root)), UTC)


def _days(since: datetime, now: datetime) -> float:
    return (now - since).total_seconds() / 86400


def _ago(days: float) -> str:
    return f"{max(days, 0):.0f} days ago" if days >= 2 else f"{max(days, 0) * 24:.0f} hours ago"
