"""Manifest of a finished run. It is written last, so a run folder without one is unfinished and may be deleted."""

from __future__ import annotations

import tomli_w
from pydantic import AwareDatetime

from pipeline.config import RunConfig
from pipeline.errors import DataError
from pipeline.records import EncoderRef, Failure, MtebTask, Record, RunId, Runtime, Sha256, TaskName
from pipeline.store.files import read_record, write_atomically
from pipeline.store.run_folder import RunFolder


class RunManifest(Record):
    """Everything needed to repeat a run, or to see why another run differs."""

    run_id: RunId
    created_at: AwareDatetime
    config: RunConfig
    encoder: EncoderRef
    runtime: Runtime
    mteb_tasks: tuple[MtebTask, ...]
    """Finished MTEB tasks, with resolved revisions."""
    adapters: dict[TaskName, Sha256]
    """MTEB task -> sha256 of its adapter."""
    reused: dict[str, str]
    """MTEB task -> id of the earlier run that trained it."""
    failures: tuple[Failure, ...]
    versions: dict[str, str]
    lorafleet_version: str
    sources_sha256: str
    """SHA-256 of the code that can change a weight or a score."""
    seconds: float
    """Seconds from the start of the flow to the manifest."""


def write_config(config: RunConfig, folder: RunFolder) -> None:
    """Write the resolved config. ``lorafleet train --config`` with this file repeats the run."""
    write_atomically(folder.config, tomli_w.dumps(config.model_dump(mode="json", exclude_none=True)))


def write_manifest(manifest: RunManifest, folder: RunFolder) -> None:
    """Write the manifest, which marks the run as finished."""
    write_atomically(folder.manifest, manifest.model_dump_json(indent=1))


def read_manifest(folder: RunFolder) -> RunManifest:
    """Read the manifest of a finished run.

    Raises:
        DataError: the manifest is missing, so the run did not finish, or damaged.
    """
    if not folder.manifest.is_file():
        raise DataError(
            f"{folder.root}: no manifest.json, so not a finished run; expected the folder printed by `lorafleet train`"
        )
    return read_record(folder.manifest, RunManifest)
