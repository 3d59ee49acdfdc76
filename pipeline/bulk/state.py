"""The state of a bulk job, beside its output: the plan, finished units and failures. Any process can resume from it."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from pipeline.bulk.differences import check_same_job
from pipeline.bulk.output import (
    FAILURES,
    GRACE_SECONDS,
    JOB,
    NEXT,
    PLAN,
    SUCCESS,
    forget_attempts,
    is_current,
    read_receipt,
    replace_output,
    summarise,
    sweep,
)
from pipeline.bulk.records import BulkJob, BulkSummary, Receipt
from pipeline.bulk_input.content import is_version
from pipeline.bulk_input.units import BulkInput, Unit, UnitFailure
from pipeline.errors import InputError, LorafleetError
from pipeline.storage.listing import look_again
from pipeline.storage.place import TEMPORARY, Place, store_errors


@dataclass(frozen=True)
class JobState:
    """The remaining work of a job whose output folder is ready."""

    folder: Place
    """Folder for the units: the output folder, or a folder inside it that will replace its content."""
    todo: tuple[Unit, ...]
    """Units without output."""
    num_done: int
    """Number of units with output."""
    job: BulkJob
    """The job, with the limits that an earlier start has measured."""


def begin(output: Place, job: BulkJob, source: BulkInput, *, overwrite: bool) -> JobState:
    """Resume the job, or start it.

    Raises: InputError: the folder holds the output of another job, or files of no job, or cannot be written to.
    """
    folder, following, units = output, Place(output.url(_next_folder(job))), source.units
    names = output.names()
    if f"{_next_folder(job)}/{SUCCESS}" in names:  # the last start was interrupted after all units were done
        replace_output(output, following, units)
        names = output.names()
    elif overwrite and any(name == PLAN or name.startswith(NEXT) for name in names):
        folder, names = following, following.names()
    elif PLAN not in names and (foreign := [name for name in names if not name.endswith(TEMPORARY)]):
        raise InputError(
            f"output {output}: holds {', '.join(foreign[:3])}, but no plan of a job; choose an empty or a new folder"
        )
    done = {unit.output for unit in units} & set(names)
    previous = _read_plan(folder) if PLAN in names else None
    if previous is not None:
        if (previous.options, previous.adapters) == (job.options, job.adapters):
            job = job.model_copy(update={"limits": previous.limits})
        changed, damaged = _stale_units(folder, previous, job, source, [unit for unit in units if unit.output in done])
        if folder is output:
            check_same_job(output, previous, job, changed={unit.path for unit in changed})
        for unit in (*changed, *damaged):  # only an overwriting job still has changed units here
            folder.remove(unit.output)
            done.discard(unit.output)
    if previous != job:
        _write_plan(folder, job)
    sweep(folder, job, older_than=GRACE_SECONDS)
    return JobState(folder, tuple(unit for unit in units if unit.output not in done), len(done), job)


def with_limits(state: JobState, limits: Mapping[str, float]) -> JobState:
    """Return the state of the same job with limits of its int8 vectors, which are written to its plan.

    Raises: InputError: the folder cannot be written to.
    """
    job = state.job.model_copy(update={"limits": dict(limits)})
    _write_plan(state.folder, job)
    return replace(state, job=job)


def finish(
    output: Place,
    state: JobState,
    job: BulkJob,
    source: BulkInput,
    receipts: Sequence[Receipt],
    *,
    seconds: float,
    busy_seconds: float,
) -> tuple[BulkSummary, tuple[UnitFailure, ...]]:
    """Write the summary, and the failures or ``_SUCCESS``. A successful overwriting job then replaces the old output.

    Args:
        output: The output folder.
        state: As ``begin`` returned it.
        job: The job.
        source: Its input.
        receipts: Of the units that this start has done, or tried to.
        seconds: Duration of this start, preparations included.
        busy_seconds: Duration of labelling or embedding alone.
    Raises: LorafleetError: a unit's output is missing, damaged or too short.
    """
    folder = state.folder
    new = {r.unit: r for r in receipts if not r.failure}
    failed = [r for r in receipts if r.failure]
    _check_all_written(folder, [unit for unit in source.units if unit.number in new])
    earlier = [unit for unit in source.units if unit.number not in {r.unit for r in receipts}]
    kept = {**new, **{unit.number: read_receipt(folder, unit) for unit in earlier}}
    replaced = _replaced_units(source, job, kept)
    for unit in replaced:
        folder.remove(unit.output)
        del kept[unit.number]
    by_number = {unit.number: unit for unit in source.units}
    failures = (
        *source.failures,
        *(_failure(by_number[r.unit], r.failure) for r in failed),
        *(_failure(unit, "its file was replaced while the job ran; start it again") for unit in replaced),
    )
    if job.options.sample is None:
        _check_no_row_lost(folder, by_number, kept)
    new_rows = sum(receipt.rows for receipt in new.values())
    summary = summarise(
        job,
        source,
        tuple(kept.values()),
        units_done_before=len(earlier),
        failures=len(failures),
        seconds=seconds,
        rows_per_second=new_rows / busy_seconds if new_rows and busy_seconds else None,
    )
    _write_results(output, folder, job, source, summary, failures)
    return summary, failures


def _check_all_written(folder: Place, units: Sequence[Unit]) -> None:
    """Raises: LorafleetError: this machine does not see the output of a unit that a worker has written."""
    if lost := {unit.output for unit in units} - set(folder.names()):
        raise LorafleetError(
            f"output {folder}: {min(lost)} is missing, but a worker has written it; all machines must see this folder"
        )


def _check_no_row_lost(folder: Place, units: Mapping[int, Unit], receipts: Mapping[int, Receipt]) -> None:
    """Raises: LorafleetError: a unit's output has another number of rows than the unit."""
    for receipt in receipts.values():
        unit = units[receipt.unit]
        if receipt.rows != unit.num_rows:
            raise LorafleetError(
                f"output {folder}: {unit.output} has {receipt.rows:,} of {unit.num_rows:,} rows; "
                "remove it and start again"
            )


def _write_results(
    output: Place,
    folder: Place,
    job: BulkJob,
    source: BulkInput,
    summary: BulkSummary,
    failures: Sequence[UnitFailure],
) -> None:
    """Write what ``finish`` promises, and clean up."""
    folder.write(JOB, summary.model_dump_json(indent=1).encode())
    sweep(folder, job, older_than=0)  # every unit is done or has failed, so no temporary is needed
    forget_attempts(folder)
    if failures:
        folder.write(FAILURES, _failures_table(failures))
        folder.remove(SUCCESS)  # an earlier start may have written it, before its output was removed
        return
    folder.remove(FAILURES)
    folder.write(SUCCESS, b"")
    if folder.root != output.root:
        replace_output(output, folder, source.units)


def _next_folder(job: BulkJob) -> str:
    return f"{NEXT}{job.fingerprint}"


def _write_plan(folder: Place, job: BulkJob) -> None:
    try:
        folder.write(PLAN, job.model_dump_json(indent=1).encode())
    except store_errors() as error:
        raise InputError(f"output {folder}: cannot be written to: {error}") from None


def _read_plan(folder: Place) -> BulkJob:
    try:
        return BulkJob.model_validate_json(folder.read(PLAN))
    except (ValueError, ValidationError):
        raise InputError(
            f"output {folder}: its {PLAN} is damaged, or of another version; choose another folder, or --overwrite"
        ) from None


def _stale_units(
    folder: Place, previous: BulkJob, job: BulkJob, source: BulkInput, done: Sequence[Unit]
) -> tuple[list[Unit], list[Unit]]:
    """Return the finished units whose input file has changed, and those whose output is damaged.

    Only files that the store lists with another version are read.
    """
    versions = {file.path: file.version for file in previous.files}
    moved = {file.path for file in job.files if versions.get(file.path) != file.version or not file.version}
    changed, damaged = list[Unit](), list[Unit]()
    for unit in done:
        if unit.path in moved:
            try:
                receipt = read_receipt(folder, unit)
            except LorafleetError:
                damaged.append(unit)
                continue
            if not is_current(receipt, unit, source, job):
                changed.append(unit)
    return changed, damaged


def _replaced_units(source: BulkInput, job: BulkJob, receipts: Mapping[int, Receipt]) -> list[Unit]:
    """Return the finished units whose input file has changed since it was read. A missing file counts as unchanged."""
    units = [unit for unit in source.units if unit.number in receipts]
    seen: dict[str, set[str]] = {unit.path: set() for unit in units}
    for unit in units:
        seen[unit.path].add(receipts[unit.number].version or "planned")
    now = look_again(list(seen))
    moved = {
        file.path
        for file in source.files
        if file.path in seen
        and (stored := now[file.path]) is not None
        and not (file.version and is_version(file, stored) and seen[file.path] <= {"planned", file.version})
    }
    return [unit for unit in units if unit.path in moved and not is_current(receipts[unit.number], unit, source, job)]


def _failure(unit: Unit, reason: str | None) -> UnitFailure:
    return UnitFailure(
        path=unit.path, unit=unit.number, first_row=unit.first_row_of_file, num_rows=unit.num_rows, reason=reason or ""
    )


def _failures_table(failures: Sequence[UnitFailure]) -> bytes:
    numbers = [(name, pa.int64()) for name in ("unit", "first_row", "num_rows")]
    schema = pa.schema([("path", pa.string()), *numbers, ("reason", pa.string())])
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([failure.model_dump() for failure in failures], schema=schema), sink)
    return sink.getvalue()
