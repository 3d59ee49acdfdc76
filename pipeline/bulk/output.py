"""The output folder of a bulk job: file names, unit files with receipts, their summary, and cleaning up."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from math import fsum
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.bulk.records import BulkJob, BulkSummary, Receipt, VectorLoss, VectorSummary
from pipeline.bulk_input.content import content_now
from pipeline.bulk_input.units import BulkInput, Unit
from pipeline.errors import LorafleetError, first_line
from pipeline.parquet.schema import WrittenAs
from pipeline.storage.place import FILE_MARK, Place, open_file

PLAN, JOB, SUCCESS, FAILURES, ATTEMPTS = "_plan.json", "_job.json", "_SUCCESS", "_failures.parquet", "_attempts"
NEXT = "_next-"
"""Prefix of the folder in which an overwriting job works until it is finished."""
FOOTER_KEY = b"lorafleet"
"""Key of lorafleet's own entry in the footer of an output file."""
GRACE_SECONDS = 60.0
"""Age below which a temporary file may still be in use: an actor outlives its killed driver by seconds."""
_GROUP_ROWS, _GROUP_BYTES = 65_536, 32 * 1024**2
_ANY_FINGERPRINT = "[0-9a-f]" * 16
_UNIT_NAME = re.compile(r"(.*/)?.+-\d{5,}\.parquet")


class UnitFile:
    """A Parquet file under construction. Small tables are collected into row groups of a good size."""

    def __init__(self, path: Path, how: WrittenAs, codecs: dict[str, str], *, vectors: Collection[str] = ()) -> None:
        """Open the file.

        Args:
            path: Path of the file.
            how: Settings of the writer.
            codecs: Codec of each column, and under ``*`` that of new ones.
            vectors: Columns of vectors. They get no dictionary, because their values hardly repeat.
        """
        leaves, options = _leaves(how.schema), dict(how.options)
        compression = {name: codecs.get(name, codecs.get(name.split(".")[0], codecs["*"])) for name in leaves}
        if vectors:
            inside = tuple(f"{name}." for name in vectors)
            options["use_dictionary"] = [leaf for leaf in leaves if not leaf.startswith(inside)]
        self._writer = pq.ParquetWriter(path, how.schema, compression=compression, **options)
        self._how = how
        self._pending: list[pa.Table] = []
        self._rows = self._bytes = 0

    def add(self, table: pa.Table) -> None:
        """Append rows. A row group is written once enough rows are collected."""
        self._pending.append(self._how.table(table))
        self._rows += len(table)
        self._bytes += table.nbytes
        if self._rows >= _GROUP_ROWS or self._bytes >= _GROUP_BYTES:
            self._flush()

    def describe(self, metadata: dict[bytes, bytes]) -> None:
        """Set the key-value metadata of the file's footer."""
        self._flush()
        self._writer.add_key_value_metadata(self._how.metadata | metadata)

    def close(self) -> None:
        """Write the footer."""
        self._writer.close()

    def _flush(self) -> None:
        if self._pending:
            self._writer.write_table(pa.concat_tables(self._pending))
        self._pending, self._rows, self._bytes = [], 0, 0


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


def summarise(job: BulkJob, source: BulkInput, receipts: Sequence[Receipt], **facts: Any) -> BulkSummary:
    """Add up the receipts of all finished units. ``facts`` are the remaining fields of the summary."""
    names = [adapter.name for adapter in job.adapters]
    return BulkSummary(
        job=job.fingerprint,
        lorafleet_version=job.lorafleet_version,
        rows_in=source.num_rows,
        rows_out=sum(r.rows for r in receipts),
        null_labels=_added(r.null_labels for r in receipts),
        reasons=_added(r.reasons for r in receipts),
        truncated=sum(r.truncated for r in receipts),
        duplicates=sum(r.duplicates for r in receipts),
        labels={name: _added(r.labels.get(name, {}) for r in receipts) for name in names if job.options.labels},
        vectors={name: _vectors(name, job, receipts) for name in names if job.options.vectors is not None},
        units=len(source.units),
        changed_types=source.changes,
        skipped_files=source.skipped,
        **facts,
    )


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


def _leaves(schema: pa.Schema) -> list[str]:
    """Return the paths of a schema's leaves, as Parquet names them."""
    sink = pa.BufferOutputStream()
    pq.ParquetWriter(sink, schema).close()
    parquet = pq.ParquetFile(pa.BufferReader(sink.getvalue())).schema
    return [parquet.column(i).path for i in range(len(parquet))]


def _vectors(name: str, job: BulkJob, receipts: Sequence[Receipt]) -> VectorSummary:
    options = job.options.vectors
    assert options is not None and options.width is not None, "set when the job was planned"
    losses = [receipt.vector_loss[name] for receipt in receipts if name in receipt.vector_loss]
    return VectorSummary(
        dtype=options.dtype,
        width=options.width,
        nulls=sum(receipt.null_vectors.get(name, 0) for receipt in receipts),
        limit=job.limits.get(name),
        loss=_mean(losses) if losses else None,
    )


def _mean(losses: Sequence[VectorLoss]) -> VectorLoss:
    """The loss over all units, whatever their order. Each unit counts by its number of compared texts."""
    texts = sum(loss.texts for loss in losses)
    ranked = [(loss.texts, loss.neighbours) for loss in losses if loss.neighbours is not None]
    return VectorLoss(
        texts=texts,
        cosine=fsum(loss.texts * loss.cosine for loss in losses) / texts if texts else 1.0,
        neighbours=fsum(n * shared for n, shared in ranked) / sum(n for n, _ in ranked) if ranked else None,
        clipped=sum(loss.clipped for loss in losses),
    )


def _added(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Add counts by key, largest first."""
    total: dict[str, int] = {}
    for counter in counts:
        for key, count in counter.items():
            total[key] = total.get(key, 0) + count
    return dict(sorted(total.items(), key=lambda item: (-item[1], item[0])))
