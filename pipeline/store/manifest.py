"""What a finished run was made from. Written last: a folder with a manifest is a finished run, one without may be deleted."""

from __future__ import annotations

import tomli_w
from pydantic import AwareDatetime

from pipeline.config import RunConfig
from pipeline.errors import DataError
from pipeline.records import EncoderRef, Failure, MtebTask, Record, RunId, Runtime, Sha256, TaskName
from pipeline.store.run_folder import RunFolder, read_record, write_atomically


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
        raise DataError(
            f"{folder.root}: no manifest.json, so not a finished run; expected the folder that `lorafleet train` printed"
        )
    return read_record(folder.manifest, RunManifest)
