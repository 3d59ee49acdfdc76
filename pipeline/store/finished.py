"""Finished runs and finished MTEB tasks of a run store."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from pipeline.errors import AdapterError, DataError
from pipeline.records import TaskResult
from pipeline.store.lock import oldest_first
from pipeline.store.manifest import RunManifest, read_manifest
from pipeline.store.run_folder import RunFolder, TaskFolder, adapter_sha256, read_record


def find_finished(runs: Path, keys: set[str]) -> dict[str, tuple[TaskFolder, TaskResult]]:
    """Finished MTEB tasks under ``runs`` by key, that of the newest run each; damaged ones are passed over.

    A run that was killed counts for the MTEB tasks that it did finish.
    """
    found: dict[str, tuple[TaskFolder, TaskResult]] = {}
    for run in oldest_first({path.parent.parent.name for path in runs.glob("*/*/result.json")}):
        for path in sorted((runs / run).glob("*/result.json")):
            folder = TaskFolder(path.parent)
            if folder.root.name.startswith("."):
                continue  # a copy that was cut short
            result = _whole_result(folder, keys)
            if result is not None:
                found[result.key] = (folder, result)
    return found


def finished_runs(runs: Path) -> Iterator[tuple[RunFolder, RunManifest]]:
    """The finished runs of a store, newest first; those whose manifest cannot be read are passed over."""
    for run in reversed(oldest_first(path.parent.name for path in runs.glob("*/manifest.json"))):
        with suppress(DataError):
            yield RunFolder(runs / run), read_manifest(RunFolder(runs / run))


def find_unchanged(runs: Path, keys: Mapping[str, str]) -> RunFolder | None:
    """The newest run that holds any of these MTEB tasks, if it holds exactly them, all finished, for these very inputs.

    Args:
        runs: The run store.
        keys: MTEB task -> ``task_key``.
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
    """MTEB task -> what the newest finished run that has it knows of it."""
    found: dict[str, TaskResult] = {}
    for folder, manifest in finished_runs(runs):
        for name in {t.name for t in manifest.mteb_tasks} & set(names) - set(found):
            with suppress(DataError):
                found[name] = read_record(folder.task(name).result, TaskResult)
        if len(found) == len(names):
            break
    return found


def _whole_result(folder: TaskFolder, keys: Collection[str]) -> TaskResult | None:
    """What lies there, if it was finished for one of the keys and is still the adapter that was measured, with all its files."""
    try:
        result = read_record(folder.result, TaskResult)
        is_whole = (
            result.key in keys
            and all(file.is_file() for file in folder.published(has_head=result.has_head))
            and adapter_sha256(folder.root) == result.adapter.sha256
        )
    except (DataError, AdapterError):
        return None
    return result if is_whole else None
