"""A bulk job's state, which lies beside its output: what it is, what is done, what failed. Any process can go on from there."""

from __future__ import annotations

import io
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from pipeline.bulk.content import is_version
from pipeline.bulk.differences import check_same_job
from pipeline.bulk.output import ATTEMPTS, FAILURES, JOB, NEXT, PLAN, SUCCESS, is_current, read_receipt, replace_output
from pipeline.bulk.records import BulkJob, BulkSummary, Receipt
from pipeline.bulk.units import BulkInput, Unit, UnitFailure
from pipeline.errors import InputError, LorafleetError
from pipeline.storage.listing import look_again
from pipeline.storage.place import FILE_MARK, TEMPORARY, Place, store_errors

_ANY_FINGERPRINT = "[0-9a-f]" * 16
GRACE_SECONDS = 60.0
"""An actor outlives its killed driver by seconds: what was written to more recently than this may still be written to."""


@dataclass(frozen=True)
class Begun:
    """A job whose output folder is ready."""

    place: Place
    """Where units go: the output folder, or one inside it that will replace it."""
    todo: tuple[Unit, ...]
    num_done: int


def begin(output: Place, job: BulkJob, source: BulkInput, *, overwrite: bool) -> Begun:
    """Take up the job where it was left, or begin it.

    Raises: InputError: the folder holds another job's output, or files that are no job's, or cannot be written to.
    """
    place, following, units = output, Place(output.url(_next_folder(job))), source.units
    names = output.names()
    if f"{_next_folder(job)}/{SUCCESS}" in names:  # the last start was cut short when all was done
        replace_output(output, following, units)
        names = output.names()
    elif overwrite and any(name == PLAN or name.startswith(NEXT) for name in names):
        place, names = following, following.names()
    elif PLAN not in names and (foreign := [name for name in names if not name.endswith(TEMPORARY)]):
        raise InputError(
            f"output {output}: holds {', '.join(foreign[:3])}, and no plan of a job; choose an empty folder, or a new one"
        )
    done = {unit.output for unit in units} & set(names)
    before = _read_plan(place) if PLAN in names else None
    if before is not None:
        changed, damaged = _stale_units(place, before, job, source, [unit for unit in units if unit.output in done])
        if place is output:
            check_same_job(output, before, job, changed={unit.path for unit in changed})
        for unit in (*changed, *damaged):  # changed are only those of an overwriting job
            place.remove(unit.output)
            done.discard(unit.output)
    if before != job:
        try:
            place.write(PLAN, job.model_dump_json(indent=1).encode())
        except store_errors() as error:
            raise InputError(f"output {output}: cannot be written to: {error}") from None
    sweep(place, job, older_than=GRACE_SECONDS)
    return Begun(place, tuple(unit for unit in units if unit.output not in done), len(done))


def sweep(place: Place, job: BulkJob, *, older_than: float) -> None:
    """Delete unfinished output that nobody writes to any more."""
    for mark, age in ((job.fingerprint, older_than), (FILE_MARK, older_than), (_ANY_FINGERPRINT, GRACE_SECONDS)):
        for name, written in place.temporaries(mark=mark):
            if time.time() - written >= age:
                place.remove(name)


def forget_attempts(place: Place) -> None:
    """Let every unit be tried three times again.

    A unit that kills the process which runs the whole job leaves its attempts to the next start, and is quarantined by the fourth.
    """
    if place.local:
        shutil.rmtree(place.path(ATTEMPTS), ignore_errors=True)
        return
    for name in place.names(under=ATTEMPTS):
        place.remove(name)


def finish(
    output: Place,
    begun: Begun,
    job: BulkJob,
    source: BulkInput,
    receipts: Sequence[Receipt],
    *,
    seconds: float,
    busy_seconds: float,
) -> tuple[BulkSummary, tuple[UnitFailure, ...]]:
    """Write the summary, the failures, and, where there are none, ``_SUCCESS``; with it an overwriting job takes the old one's place."""
    place = begun.place
    by_number = {unit.number: unit for unit in source.units}
    new = {r.unit: r for r in receipts if not r.failure}
    failed = {r.unit for r in receipts if r.failure}
    before = [unit for unit in source.units if unit.number not in new and unit.number not in failed]
    lost = {unit.output for unit in source.units if unit.number in new} - set(place.names())
    if lost:
        raise LorafleetError(
            f"output {place}: {min(lost)} is not there, though a worker has written it; all machines must see this folder"
        )
    kept = {**new, **{unit.number: read_receipt(place, unit) for unit in before}}
    replaced = _replaced_units(source, job, kept)
    for unit in replaced:
        place.remove(unit.output)
        del kept[unit.number]
    failures = (
        *source.failures,
        *(_failure(by_number[r.unit], r.failure) for r in receipts if r.failure),
        *(_failure(unit, "its file was replaced while the job ran; start it again") for unit in replaced),
    )
    short = next(
        (r for r in kept.values() if job.options.sample is None and r.rows != by_number[r.unit].num_rows), None
    )
    if short is not None:
        unit = by_number[short.unit]
        raise LorafleetError(
            f"output {place}: {unit.output} has {short.rows:,} of {unit.num_rows:,} rows; remove it and start again"
        )
    new_rows = sum(receipt.rows for receipt in new.values())
    summary = BulkSummary(
        job=job.fingerprint,
        lorafleet_version=job.lorafleet_version,
        rows_in=source.num_rows,
        rows_out=sum(r.rows for r in kept.values()),
        null_labels=_added(r.null_labels for r in kept.values()),
        reasons=_added(r.reasons for r in kept.values()),
        truncated=sum(r.truncated for r in kept.values()),
        duplicates=sum(r.duplicates for r in kept.values()),
        labels={a.name: _added(r.labels.get(a.name, {}) for r in kept.values()) for a in job.adapters},
        units=len(source.units),
        units_done_before=len(before),
        failures=len(failures),
        changed_types=source.changes,
        skipped_files=source.skipped,
        seconds=seconds,
        rows_per_second=new_rows / busy_seconds if new_rows and busy_seconds else None,
    )
    place.write(JOB, summary.model_dump_json(indent=1).encode())
    sweep(
        place, job, older_than=0
    )  # all is there or has failed, so whatever is still written is written twice, or by nobody
    forget_attempts(place)
    if failures:
        place.write(FAILURES, _failures_table(failures))
        place.remove(SUCCESS)  # of an earlier start, whose output has been taken away since
        return summary, failures
    place.remove(FAILURES)
    place.write(SUCCESS, b"")
    if place.root != output.root:
        replace_output(output, place, source.units)
    return summary, failures


def _next_folder(job: BulkJob) -> str:
    return f"{NEXT}{job.fingerprint}"


def _read_plan(place: Place) -> BulkJob:
    try:
        return BulkJob.model_validate_json(place.read(PLAN))
    except (ValueError, ValidationError):
        raise InputError(
            f"output {place}: its {PLAN} is damaged, or of another version; choose another folder, or --overwrite"
        ) from None


def _stale_units(
    place: Place, before: BulkJob, job: BulkJob, source: BulkInput, done: Sequence[Unit]
) -> tuple[list[Unit], list[Unit]]:
    """The finished units whose file holds other bytes now, and those that cannot tell because they are damaged.

    Read are only files that the store lists with another version.
    """
    versions = {file.path: file.version for file in before.files}
    moved = {file.path for file in job.files if versions.get(file.path) != file.version or not file.version}
    changed, damaged = list[Unit](), list[Unit]()
    for unit in done:
        if unit.path in moved:
            try:
                receipt = read_receipt(place, unit)
            except LorafleetError:
                damaged.append(unit)
                continue
            if not is_current(receipt, unit, source, job):
                changed.append(unit)
    return changed, damaged


def _replaced_units(source: BulkInput, job: BulkJob, receipts: Mapping[int, Receipt]) -> list[Unit]:
    """The finished units whose file holds other bytes than those that were read; a file that is gone cannot tell."""
    units = [unit for unit in source.units if unit.number in receipts]
    seen: dict[str, set[str]] = {unit.path: set() for unit in units}
    for unit in units:
        seen[unit.path].add(receipts[unit.number].version or "planned")
    now = look_again(list(seen))
    moved = {
        file.path
        for file in source.files
        if file.path in seen
        and (found := now[file.path]) is not None
        and not (file.version and is_version(file, found) and seen[file.path] <= {"planned", file.version})
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


def _added(counts: Any) -> dict[str, int]:
    total: dict[str, int] = {}
    for some in counts:
        for key, count in some.items():
            total[key] = total.get(key, 0) + count
    return dict(sorted(total.items(), key=lambda item: (-item[1], item[0])))
