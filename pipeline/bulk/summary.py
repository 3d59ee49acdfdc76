"""The summary of a bulk job: the receipts of its units, added up."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import fsum
from typing import Any

from pipeline.bulk.records import BulkJob, BulkSummary, Receipt, VectorLoss, VectorSummary
from pipeline.bulk_input.units import BulkInput


def summarise(job: BulkJob, source: BulkInput, receipts: Sequence[Receipt], **facts: Any) -> BulkSummary:
    """Add up the receipts of all finished units. ``facts`` are the fields that no receipt knows."""
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
