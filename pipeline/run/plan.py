"""The plan of a run, and the job of the worker of each MTEB task.

Both are plain data, so the driver does not import torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.config import RunConfig
from pipeline.records import AdapterRef, EncoderRef, MtebTask, Record, Runtime


@dataclass(frozen=True)
class PlannedTask:
    """An MTEB task whose data have been read and checked."""

    mteb_task: MtebTask
    """MTEB task with resolved revision."""
    fingerprint: str
    """Hash of the data that were checked."""
    key: str
    """Hash of everything that the weights and scores depend on."""
    num_train: int
    num_validation: int
    label_names: tuple[str, ...]
    warm_start: AdapterRef | None
    """Adapter to start from. None: train from scratch."""
    notes: tuple[str, ...]
    """Warnings about the data, and the reason if a requested warm start is impossible."""


@dataclass(frozen=True)
class Plan:
    """A checked run that can start."""

    config: RunConfig
    """Config with the encoder's resolved revision."""
    encoder: EncoderRef
    adapted_modules: tuple[str, ...]
    runtime: Runtime
    tasks: tuple[PlannedTask, ...]
    """Planned tasks, largest first, so that the largest does not run alone at the end."""


class JobSpec(Record):
    """Complete description of a worker's job."""

    config: RunConfig
    """Config with the encoder's resolved revision."""
    mteb_task: MtebTask
    fingerprint: str
    """Hash of the data that the key was computed from."""
    encoder_revision: str
    """Encoder revision that the key was computed from."""
    warm_start: AdapterRef | None = None
    """Adapter to start from. ``path`` is a reference for ``find_adapters``."""
    key: str
    runtime: Runtime
    run_id: str
    runs: str
    """Folder of the run store."""


def job_spec(plan: Plan, planned: PlannedTask, *, run_id: str, runs: Path) -> JobSpec:
    """Make the job of one planned MTEB task."""
    return JobSpec(
        config=plan.config,
        mteb_task=planned.mteb_task,
        fingerprint=planned.fingerprint,
        encoder_revision=plan.encoder.revision,
        warm_start=planned.warm_start,
        key=planned.key,
        runtime=plan.runtime,
        run_id=run_id,
        runs=str(runs.resolve()),
    )
