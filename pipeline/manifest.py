"""What a finished run was made from. Written last: a folder with a manifest is a finished run, one without may be deleted."""

from __future__ import annotations

import hashlib
import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pipeline
from pipeline.config import RunConfig
from pipeline.errors import AdapterError, DataError
from pipeline.records import EncoderRef, Failure, MtebTask, Record, Runtime, TaskResult
from pipeline.run_folder import RunFolder, TaskFolder, adapter_sha256, read_record, write_atomically

# The sources whose change can change a weight or a score; a report's layout cannot.
_SOURCES = (
    *("catalogue", "packages", "dataset", "encoder", "attention", "frozen_linear"),
    *("lora", "adapter", "training", "evaluation", "scores", "job"),
)


class RunManifest(Record):
    """A run, whole: enough to make it again, or to see why another one differs."""

    run_id: str
    created_at: datetime
    config: RunConfig
    encoder: EncoderRef
    runtime: Runtime
    mteb_tasks: tuple[MtebTask, ...]
    """Those that finished, with resolved revisions."""
    adapters: dict[str, str]
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
    is no reason to train again. A training that was begun goes on with its own number.
    """
    parts: dict[str, Any] = {
        "data": fingerprint,
        "task": mteb_task.model_dump(include={"name", "subset", "max_epochs", "samples_per_label"}),
        "encoder": encoder.revision,
        "encoder_config": config.encoder.model_dump(exclude={"name", "revision"}),
        "adapter": config.adapter.model_dump(mode="json"),
        "train": config.train.model_dump(exclude={"max_epochs"}),
        "evaluate": config.evaluate.model_dump(mode="json"),
        "runtime": runtime.model_dump(exclude={"threads"}),
        "sources": sources_sha256(),
        "versions": versions,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def find_finished(runs: Path, keys: set[str]) -> dict[str, tuple[TaskFolder, TaskResult]]:
    """Finished MTEB tasks under ``runs`` by key, the newest of each; damaged ones are passed over.

    A run that was killed counts for the MTEB tasks that it did finish.
    """
    found: dict[str, tuple[TaskFolder, TaskResult]] = {}
    for path in sorted(runs.glob("*/*/result.json"), key=lambda p: p.parent.parent.name):
        folder = TaskFolder(path.parent)
        if folder.root.name.startswith(".") or not all(file.is_file() for file in folder.published()):
            continue  # a copy that was cut short, or one that lacks something by now
        try:
            result = read_record(path, TaskResult)
            if result.key in keys and adapter_sha256(folder.root) == result.adapter.sha256:
                found[result.key] = (folder, result)
        except (DataError, AdapterError):
            continue
    return found


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
