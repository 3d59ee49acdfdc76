"""What a finished run was made from. Written last: a folder with a manifest is a finished run, one without may be deleted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import AwareDatetime

import pipeline
from pipeline.config import RunConfig
from pipeline.errors import AdapterError, DataError
from pipeline.records import EncoderRef, Failure, MtebTask, Record, RunId, Runtime, Sha256, TaskName, TaskResult
from pipeline.store.lock import oldest_first
from pipeline.store.run_folder import RunFolder, TaskFolder, adapter_sha256, read_record, write_atomically

VERSIONED = ("torch", "transformers", "tokenizers", "peft", "mteb", "scikit-learn", "scipy", "numpy")
"""The libraries whose versions may change a weight or a score."""

# The sources whose change can change a weight or a score; a report's layout cannot.
_SOURCES = (
    *("catalogue", "splits", "packages", "dataset", "encoder", "tokeniser", "attention", "frozen_linear"),
    *("lora", "adapter", "step_graphs", "training", "evaluation", "scores", "job"),
)


class RunManifest(Record):
    """A run, whole: enough to make it again, or to see why another one differs."""

    run_id: RunId
    created_at: AwareDatetime
    config: RunConfig
    encoder: EncoderRef
    runtime: Runtime
    mteb_tasks: tuple[MtebTask, ...]
    """Those that finished, with resolved revisions."""
    adapters: dict[TaskName, Sha256]
    """MTEB task -> sha256 of its adapter."""
    reused: dict[str, str]
    """MTEB task -> the run that trained it, where that was another one."""
    failures: tuple[Failure, ...]
    versions: dict[str, str]
    lorafleet_version: str
    sources_sha256: str
    """Of the code that can change a weight or a score."""
    seconds: float
    """From the start of the flow to the manifest."""


def library_versions() -> dict[str, str]:
    """Installed version of each library that may change a weight or a score."""
    return {name: metadata.version(name) for name in VERSIONED}


def task_key(
    config: RunConfig,
    *,
    mteb_task: MtebTask,
    fingerprint: str,
    encoder: EncoderRef,
    runtime: Runtime,
    versions: dict[str, str],
) -> str:
    """Hash of all that an MTEB task's weights and scores depend on; equal keys need no second training.

    The number of threads is left out: it depends on how many MTEB tasks share the machine, and what it may change in the last bits
    is no reason to train again. A training that was begun goes on with its own number. So is what a warm start goes on from: each
    publication changes it, and data that have not changed are no reason to train again.
    """
    parts: dict[str, Any] = {
        "data": fingerprint,
        "task": mteb_task.model_dump(include={"name", "subset", "max_epochs", "samples_per_label"}),
        "encoder": encoder.revision,
        "encoder_config": config.encoder.model_dump(exclude={"name", "revision"}),
        "adapter": config.adapter.model_dump(mode="json"),
        "train": config.train.model_dump(exclude={"max_epochs", "warm_start"}) | {"warm_start": config.train.warm_start is not None},
        "evaluate": config.evaluate.model_dump(mode="json"),
        "runtime": runtime.model_dump(exclude={"threads"}),
        "sources": sources_sha256(),
        "versions": versions,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


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
        same = names == set(keys) and not manifest.failures and all(_whole_result(folder.task(name), {key}) for name, key in keys.items())
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
            and all(file.is_file() for file in folder.published())
            and adapter_sha256(folder.root) == result.adapter.sha256
        )
    except (DataError, AdapterError):
        return None
    return result if is_whole else None


def write_config(config: RunConfig, folder: RunFolder) -> None:
    """Write the whole resolved config, so that ``lorafleet train --config`` of it makes the run again."""
    write_atomically(folder.config, tomli_w.dumps(config.model_dump(mode="json", exclude_none=True)))


def write_manifest(manifest: RunManifest, folder: RunFolder) -> None:
    """Finish a run."""
    write_atomically(folder.manifest, manifest.model_dump_json(indent=1))


def read_manifest(folder: RunFolder) -> RunManifest:
    """The manifest of a finished run.

    Raises: DataError: no manifest (the run did not finish), or a damaged one.
    """
    if not folder.manifest.is_file():
        raise DataError(f"{folder.root}: no manifest.json, so not a finished run; expected the folder that `lorafleet train` printed")
    return read_record(folder.manifest, RunManifest)


def sources_sha256() -> str:
    """Of the pipeline's files that can change a weight or a score."""
    digest = hashlib.sha256()
    for name in _SOURCES:
        digest.update((Path(pipeline.__file__).parent / f"{name}.py").read_bytes())
    return digest.hexdigest()
