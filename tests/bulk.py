"""Bulk jobs run directly by the pipeline, without command line, Prefect and Ray."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from builders import calibration, give_effect, load_encoder

from pipeline.adapter.adapter import Adapter
from pipeline.adapter.files import save_adapter
from pipeline.bulk.plan import plan_bulk
from pipeline.bulk.records import BulkJob, BulkOptions, BulkRequest, BulkSummary, Receipt
from pipeline.bulk.state import JobState, finish
from pipeline.bulk.worker import UnitWorker, WorkerSpec
from pipeline.bulk_input.units import BulkInput, Unit, UnitFailure
from pipeline.config import AdapterConfig
from pipeline.storage.place import Place
from pipeline.store.run_folder import TaskFolder

LABELS = ("sea", "kitchen", "garden")


def save_bulk_adapter(
    folder: Path,
    encoder_folder: Path,
    *,
    labels: Sequence[str] | None = LABELS,
    seed: int = 1,
    calibrated: bool = True,
    **config: Any,
) -> Path:
    """Save an adapter that has an effect, named like its folder. ``labels=None`` leaves out the head."""
    adapter = give_effect(Adapter(load_encoder(encoder_folder), AdapterConfig(**config), labels), seed=seed)
    save_adapter(adapter, TaskFolder(folder), meta={"task": folder.name})
    if calibrated and labels is not None:
        TaskFolder(folder).calibration.write_text(calibration().model_dump_json(), encoding="utf-8")
    return folder


def write_table(path: Path, columns: pa.Table | dict[str, Any], **options: Any) -> Path:
    """Write a Parquet file, and create its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), path, **options)
    return path


@dataclass(frozen=True)
class Bulk:
    """A job that is ready to start."""

    output: Place
    source: BulkInput
    job: BulkJob
    state: JobState
    spec: WorkerSpec

    def label(self, units: Sequence[Unit] | None = None) -> list[Receipt]:
        """Label these units, or all that are left to do."""
        worker = UnitWorker(self.spec)
        return [worker.label(unit) for unit in (self.state.todo if units is None else units)]

    def finish(self, receipts: Sequence[Receipt]) -> tuple[BulkSummary, tuple[UnitFailure, ...]]:
        """Write the summary."""
        return finish(self.output, self.state, self.job, self.source, receipts, seconds=2.0, busy_seconds=1.0)

    def run(self) -> BulkSummary:
        """Label all units and write the summary."""
        return self.finish(self.label())[0]


def start(
    source: Path | str,
    output: Path,
    adapters: Sequence[Path | str],
    encoder: Path,
    *,
    overwrite: bool = False,
    **options: Any,
) -> Bulk:
    """Plan a job as ``lorafleet classify`` does before the first unit."""
    request = BulkRequest(
        source=str(source),
        output=str(output),
        adapters=tuple(map(str, adapters)),
        options=BulkOptions(**options),
        encoder=str(encoder),
        offline=True,
        overwrite=overwrite,
    )
    plan = plan_bulk(request)
    return Bulk(plan.output, plan.source, plan.job, plan.state, plan.worker_spec(threads=1, use_gpu=False))


def files_below(folder: Path) -> list[str]:
    """List all files, including hidden ones."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
