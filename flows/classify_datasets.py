"""Flows of the bulk job: Parquet in, Parquet with labels or vectors out."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Cancelled, Completed, Failed

from pipeline.bulk.records import BulkRequest, BulkSummary
from pipeline.bulk_input.units import UnitFailure
from pipeline.errors import InputError, LorafleetError
from pipeline.printable import counted
from tasks.bulk import finish_job, label_units, plan_job
from tasks.cancelling import RunCancelledError, interrupted_if_cancelled


@dataclass(frozen=True)
class BulkOutcome:
    """Outcome of a bulk job."""

    summary: BulkSummary | None
    """Summary; None if the job stopped early."""
    aside: str | None
    """Location of the new output if failures kept the job from replacing the old one; else None."""
    failures: tuple[UnitFailure, ...]
    error: LorafleetError | None
    """Reason why the job stopped early, if it did."""


@flow(name="classify-datasets")
def classify_datasets(request: BulkRequest) -> State[Any]:
    """Label Parquet with trained adapters. A failed unit fails the run, after all other units are done.

    Args:
        request: Input, output, adapters and options.
    """
    return _run(request)


@flow(name="embed-datasets")
def embed_datasets(request: BulkRequest) -> State[Any]:
    """Add vectors of trained adapters to Parquet. A failed unit fails the run, after all other units are done.

    Args:
        request: Input, output, adapters and options, which ask for vectors and not for labels.
    """
    return _run(request)


def _run(request: BulkRequest) -> State[Any]:
    try:
        with interrupted_if_cancelled():
            return _finished(request)
    except RunCancelledError as error:
        return Cancelled(message=str(error))


def _finished(request: BulkRequest) -> State[Any]:
    started = time.monotonic()
    plan = plan_job(request)
    if isinstance(plan, InputError):
        return _stopped(plan)
    labelled = label_units(plan)
    if isinstance(labelled, LorafleetError):
        return _stopped(labelled)
    receipts, busy_seconds = labelled
    finished = finish_job(plan, receipts, seconds=time.monotonic() - started, busy_seconds=busy_seconds)
    if isinstance(finished, LorafleetError):
        return _stopped(finished)
    summary, failures = finished
    aside = str(plan.state.folder) if failures and plan.state.folder.root != plan.output.root else None
    outcome = BulkOutcome(summary, aside, failures, None)
    if failures:
        return Failed(message=f"{counted(len(failures), 'failure')}; see _failures.parquet", data=outcome)
    return Completed(message=counted(summary.rows_out, "row"), data=outcome)


def _stopped(error: LorafleetError) -> State[Any]:
    return Failed(message=str(error), data=BulkOutcome(None, None, (), error))
