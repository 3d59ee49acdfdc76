"""Delete old runs and abandoned checkpoints of a run store. The metrics history is never touched."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pipeline.errors import InputError, LockedError, LorafleetError
from pipeline.history.verdicts import DELETED, DELETED_MANIFEST, Policy, Verdict, judge, published_to
from pipeline.store.folders import explain, kind_of
from pipeline.store.lock import hold_run, hold_store
from pipeline.store.manifest import read_manifest
from pipeline.store.run_folder import RunFolder


@dataclass(frozen=True)
class PruneResult:
    """Result of pruning a store."""

    verdicts: tuple[Verdict, ...]
    failures: tuple[str, ...]
    """One message per folder that could not be deleted."""
    freed_bytes: int
    """Bytes that were freed, or would be in a dry run."""


def prune(runs: Path, policy: Policy, *, dry_run: bool) -> PruneResult:
    """Delete what the policy does not keep.

    After a crash no half-deleted run counts as a run, and no half-deleted checkpoint as a checkpoint. The next call
    finishes the deletion.

    Args:
        runs: Run store.
        policy: What is kept.
        dry_run: Whether to delete nothing.
    Raises:
        InputError: ``runs`` is not a run store, or a number of the policy is negative or not finite.
        LockedError: a run holds the store.
        LorafleetError: the store cannot be read.
    """
    if not (math.isfinite(policy.older_than_days) and policy.older_than_days >= 0 and policy.keep >= 0):
        raise InputError(
            f"expected numbers of at least 0, found {policy.keep} runs to keep and {policy.older_than_days:g} days"
        )
    if kind_of(runs) != "run store":
        raise InputError(
            f"cannot prune {runs}: {explain(runs)}; "
            "name the run store, the folder that was given to `lorafleet train --runs`"
        )
    if dry_run:
        with hold_store(runs, "being looked at"):
            pass  # refuses a store in use, as it would without --dry-run
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


def _judge_now(runs: Path, policy: Policy) -> list[Verdict]:
    try:
        return judge(runs, policy, now=datetime.now(UTC))
    except OSError as error:
        raise LorafleetError(
            f"run store {runs}: cannot be read: {error.strerror}: {error.filename}; nothing was deleted"
        ) from None


def _delete_run(root: Path) -> None:
    """Delete a run. An interrupted deletion leaves a folder that is not a finished run and is marked as deleted.

    The manifest is renamed first, and deleted last.

    Raises:
        LockedError: the run is being published, or has been published since the verdict.
    """
    folder, mark = RunFolder(root), root / DELETED_MANIFEST
    with hold_run(root, alone=True):
        if folder.manifest.is_file():
            if reason := published_to(root, read_manifest(folder)):
                raise LockedError(f"run {root}: {reason}, just now")
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
    """Delete a checkpoint. It is renamed first, so that no training resumes from half of it."""
    if not path.name.startswith(DELETED):
        path = path.rename(path.with_name(f"{DELETED}{path.name}"))
    shutil.rmtree(path)
