"""What a run is going to do, and what the worker of each MTEB task is told.

What driver and workers hand each other: the driver needs none of the libraries that compute.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.config import RunConfig
from pipeline.records import AdapterRef, EncoderRef, MtebTask, Record, Runtime


@dataclass(frozen=True)
class PlannedTask:
    """An MTEB task whose data has been read and found good."""

    mteb_task: MtebTask
    """With its revision resolved."""
    fingerprint: str
    """Of the data that was checked."""
    key: str
    num_train: int
    label_names: tuple[str, ...]
    warm_start: AdapterRef | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """A run that can start."""

    config: RunConfig
    """With the encoder's revision resolved."""
    encoder: EncoderRef
    adapted_modules: tuple[str, ...]
    runtime: Runtime
    tasks: tuple[PlannedTask, ...]
    """The largest first, so that no worker is left alone with it at the end."""


class JobSpec(Record):
    """All that a worker is told."""

    config: RunConfig
    """With the encoder's revision resolved."""
    mteb_task: MtebTask
    fingerprint: str
    """Of the data that the key was made from."""
    encoder_revision: str
    """That the key was made from."""
    warm_start: AdapterRef | None = None
    """To go on from; ``path`` is a reference as ``find_adapters`` takes it."""
    key: str
    runtime: Runtime
    run_id: str
    runs: str
    """The run store."""


def job_spec(plan: Plan, planned: PlannedTask, *, run_id: str, runs: Path) -> JobSpec:
    """What the worker of one planned MTEB task is told."""
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
