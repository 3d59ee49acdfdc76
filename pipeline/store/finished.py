"""Finished runs and finished MTEB tasks of a run store."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from pipeline.errors import AdapterError, DataError
from pipeline.records import TaskResult
from pipeline.store.files import read_record
from pipeline.store.lock import oldest_first
from pipeline.store.manifest import RunManifest, read_manifest
from pipeline.store.run_folder import RunFolder, TaskFolder, adapter_sha256


def find_finished(runs: Path, keys: set[str]) -> dict[str, tuple[TaskFolder, TaskResult]]:
    """Find finished MTEB tasks by key. The newest run wins, and damaged tasks are skipped.

    MTEB tasks that an interrupted run has finished count as well.

    Args:
        runs: Run store.
        keys: Values of ``task_key`` to look for.
    Returns:
        Key -> folder and result, for each key that was found.
    """
    by_key: dict[str, tuple[TaskFolder, TaskResult]] = {}
    for run in oldest_first({path.parent.parent.name for path in runs.glob("*/*/result.json")}):
        for path in sorted((runs / run).glob("*/result.json")):
            folder = TaskFolder(path.parent)
            if folder.root.name.startswith("."):
                continue  # an incomplete copy
            result = _whole_result(folder, keys)
            if result is not None:
                by_key[result.key] = (folder, result)
    return by_key


def finished_runs(runs: Path) -> Iterator[tuple[RunFolder, RunManifest]]:
    """Iterate over the finished runs of a store, newest first. Runs with an unreadable manifest are skipped."""
    for run in reversed(oldest_first(path.parent.name for path in runs.glob("*/manifest.json"))):
        with suppress(DataError):
            yield RunFolder(runs / run), read_manifest(RunFolder(runs / run))


def find_unchanged(runs: Path, keys: Mapping[str, str]) -> RunFolder | None:
    """Find the newest run with any of these MTEB tasks, if nothing has changed since.

    Nothing has changed if that run has exactly these MTEB tasks, all finished, with the same keys.

    Args:
        runs: Run store.
        keys: MTEB task -> ``task_key``.
    Returns:
        The run's folder; None if something has changed, or no run has any of the tasks.
    """
    for folder, manifest in finished_runs(runs):
        names = {t.name for t in manifest.mteb_tasks} | {failure.mteb_task for failure in manifest.failures}
        if names.isdisjoint(keys):
            continue
        same = (
            names == set(keys)
            and not manifest.failures
            and all(_whole_result(folder.task(name), {key}) for name, key in keys.items())
        )
        return folder if same else None
    return None


def latest_results(runs: Path, names: Collection[str]) -> dict[str, TaskResult]:
    """Map MTEB tasks to their results in the newest finished run that has them."""
    results: dict[str, TaskResult] = {}
    for folder, manifest in finished_runs(runs):
        for name in {t.name for t in manifest.mteb_tasks} & set(names) - set(results):
            with suppress(DataError):
                results[name] = read_record(folder.task(name).result, TaskResult)
        if len(results) == len(names):
            break
    return results


def _whole_result(folder: TaskFolder, keys: Collection[str]) -> TaskResult | None:
    """Read the result if it has one of the keys and its adapter is complete and unchanged; otherwise return None."""
    try:
        result = read_record(folder.result, TaskResult)
        is_whole = (
            result.key in keys
            and all(file.is_file() for file in folder.published(has_head=result.has_head, has_sides=result.has_sides))
            and adapter_sha256(folder.root) == result.adapter.sha256
        )
    except (DataError, AdapterError):
        return None
    return result if is_whole else None
