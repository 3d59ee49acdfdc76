"""The files of a bulk job's output folder: names, receipts in footers, replacement, and cleaning up."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.bulk.records import BulkJob, Receipt
from pipeline.bulk_input.content import content_now
from pipeline.bulk_input.units import BulkInput, Unit
from pipeline.errors import LorafleetError, first_line
from pipeline.storage.place import FILE_MARK, Place, open_file

PLAN, JOB, SUCCESS, FAILURES, ATTEMPTS = "_plan.json", "_job.json", "_SUCCESS", "_failures.parquet", "_attempts"
NEXT = "_next-"
"""Prefix of the folder in which an overwriting job works until it is finished."""
FOOTER_KEY = b"lorafleet"
"""Key of lorafleet's own entry in the footer of an output file."""
GRACE_SECONDS = 60.0
"""Age below which a temporary file may still be in use: an actor outlives its killed driver by seconds."""
_ANY_FINGERPRINT = "[0-9a-f]" * 16
_UNIT_NAME = re.compile(r"(.*/)?.+-\d{5,}\.parquet")


def read_receipt(place: Place, unit: Unit) -> Receipt:
    """Read the receipt in the footer of a finished unit.

    Raises: LorafleetError: the file is damaged, or is not the output of a unit.
    """
    try:
        with open_file(place.url(unit.output)) as source:
            metadata = pq.read_metadata(source).metadata or {}
        receipt = json.loads(metadata[FOOTER_KEY])["receipt"]
        return Receipt.model_validate(receipt | {"unit": unit.number})  # repairing an earlier file shifts numbers
    except (pa.ArrowException, KeyError, ValueError) as error:
        raise LorafleetError(
            f"output {place}: {unit.output} is damaged: {first_line(error)}; remove it and start again"
        ) from None


def footer(job: BulkJob, unit: Unit, receipt: Receipt) -> dict[bytes, bytes]:
    """Return the footer entry that records how an output file was made."""
    vectors = job.options.vectors
    unused = () if vectors is not None else ("null_vectors", "vector_loss")
    facts: dict[str, Any] = {
        "lorafleet_version": job.lorafleet_version,
        "job": job.fingerprint,
        "input_file": unit.path,
        "first_row": unit.first_row_of_file,
        "adapters": [adapter.model_dump() for adapter in job.adapters],
        "receipt": receipt.model_dump(exclude={"seconds", "version", *unused}),  # so that equal units give equal bytes
    }
    if vectors is not None:
        facts["vectors"] = {"dtype": vectors.dtype, "limits": job.limits}
    return {FOOTER_KEY: json.dumps(facts, ensure_ascii=False).encode()}


def is_current(receipt: Receipt, unit: Unit, source: BulkInput, job: BulkJob) -> bool:
    """Return whether the input still holds the bytes that a finished unit was made from."""
    columns = {*source.schema.names, job.options.text_column}
    return bool(receipt.content) and receipt.content == content_now(unit, tuple(columns))


def _is_written_by_job(output: Place, name: str) -> bool:
    """Return whether a job wrote this file, judged by its name and, for Parquet, by its footer."""
    if name == FAILURES or name.startswith((f"{ATTEMPTS}/", NEXT)):
        return True
    if not _UNIT_NAME.fullmatch(name):
        return False
    try:
        with open_file(output.url(name)) as source:
            return FOOTER_KEY in (pq.read_metadata(source).metadata or {})
    except pa.ArrowException:
        return False


def replace_output(output: Place, new: Place, units: Sequence[Unit]) -> None:
    """Replace the output of an old job with that of a finished new one.

    ``_SUCCESS`` moves last, so the next start can complete a replacement that was interrupted.

    Args:
        output: The output folder.
        new: The folder inside it that holds the new output.
        units: All units of the new job.
    """
    folder = new.root.removeprefix(output.root).strip("/")
    names = set(new.names())
    last = (PLAN, JOB, SUCCESS)  # moved in this order; the last one completes the replacement
    ours = {*(unit.output for unit in units), *(() if PLAN in names else last)}
    if PLAN in names:  # the old job must go first, so that it never claims units of the new one
        output.remove(SUCCESS)
        output.remove(PLAN)
    for name in names - set(last):
        output.move(f"{folder}/{name}", name)
    for name in set(output.names()) - ours:
        if not name.startswith(f"{folder}/") and _is_written_by_job(output, name):  # files of others stay
            output.remove(name)
    for name in last:
        if name in names:
            output.move(f"{folder}/{name}", name)
    if output.local:
        shutil.rmtree(new.root)


def sweep(folder: Place, job: BulkJob, *, older_than: float) -> None:
    """Delete unfinished output that no process writes to.

    Args:
        folder: Folder of the units.
        job: The job, whose own temporaries may be younger than those of other jobs.
        older_than: Least age of this job's temporaries, in seconds. Those of others must be ``GRACE_SECONDS`` old.
    """
    for mark, age in ((job.fingerprint, older_than), (FILE_MARK, older_than), (_ANY_FINGERPRINT, GRACE_SECONDS)):
        for name, written in folder.temporaries(mark=mark):
            if time.time() - written >= age:
                folder.remove(name)


def forget_attempts(folder: Place) -> None:
    """Reset the count of attempts of every unit.

    Attempts survive a crash of the process that runs the whole job, so a unit that keeps crashing it is quarantined on
    the fourth start.
    """
    if folder.local:
        shutil.rmtree(folder.path(ATTEMPTS), ignore_errors=True)
        return
    for name in folder.names(under=ATTEMPTS):
        folder.remove(name)
