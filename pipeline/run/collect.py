"""Files that a run writes besides those of its workers: reused MTEB tasks, outputs, history and manifest."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from datetime import UTC, datetime

import pipeline
from pipeline.config import ComputeConfig
from pipeline.history.tables import (
    append_history,
    append_mteb_tasks,
    append_values,
    read_mteb_tasks,
    write_epochs,
    write_mteb_tasks,
)
from pipeline.history.values import values_of
from pipeline.records import ClassificationResults, Failure, LabelShare, MtebTaskRow, TaskResult
from pipeline.reports.history_page import write_history_page
from pipeline.run.outputs import write_outputs
from pipeline.run.plan import Plan
from pipeline.store.files import write_atomically
from pipeline.store.key import library_versions, sources_sha256
from pipeline.store.manifest import RunManifest, write_manifest
from pipeline.store.run_folder import RunFolder, TaskFolder


def reuse(source: TaskFolder, result: TaskResult, *, run_id: str, folder: RunFolder) -> TaskResult:
    """Copy a finished MTEB task of another run into this one. Its rows keep their times and name their origin."""
    target = folder.task(result.mteb_task.name)
    origin = result.reused_from or result.run_id
    rows = tuple(row.changed(run_id=run_id, reused_from=row.reused_from or origin) for row in result.scores)
    values = tuple(row.changed(run_id=run_id) for row in result.values)
    copied = result.changed(run_id=run_id, reused_from=origin, scores=rows, values=values)
    temporary = target.root.with_name(f".{target.root.name}.copying")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source.root, temporary)
    write_atomically(TaskFolder(temporary).result, copied.model_dump_json(indent=1))
    temporary.replace(target.root)
    return copied


def collect(
    plan: Plan, results: Sequence[TaskResult], failures: Sequence[Failure], *, run_id: str, folder: RunFolder
) -> tuple[ClassificationResults, tuple[TaskResult, ...]]:
    """Write all files of a run except its manifest.

    Returns: The summary, and the results with p-values corrected over the MTEB tasks.
    """
    now = datetime.now(UTC)
    write_mteb_tasks(
        [_mteb_task_row(result, plan.config.compute, created_at=now) for result in results], folder.mteb_tasks
    )
    return write_outputs(
        results,
        failures,
        folder,
        encoder=plan.encoder,
        run_id=run_id,
        created_at=now,
        adapted_modules=plan.adapted_modules,
        trust_remote_code=plan.config.encoder.trust_remote_code,
        license=plan.config.publish.license,
    )


def finish_run(
    plan: Plan,
    results: Sequence[TaskResult],
    failures: Sequence[Failure],
    *,
    run_id: str,
    folder: RunFolder,
    seconds: float,
) -> RunManifest:
    """Add the run to the history, write its manifest, and update the page over all runs.

    The manifest is the last file of the run folder: its presence marks the run as finished.
    """
    runs = folder.root.parent
    append_history(runs, run_id, [row for result in results for row in result.scores])
    append_values(runs, run_id, [row for result in results for row in values_of(result)])
    epochs = runs / "epochs" / f"epochs-{run_id}.parquet"
    epochs.parent.mkdir(exist_ok=True)
    write_epochs(run_id, {result.mteb_task.name: result.epochs for result in results}, epochs)
    append_mteb_tasks(runs, run_id, read_mteb_tasks(folder.mteb_tasks))
    manifest = RunManifest(
        run_id=run_id,
        created_at=datetime.now(UTC),
        config=plan.config,
        encoder=plan.encoder,
        runtime=plan.runtime,
        mteb_tasks=tuple(result.mteb_task for result in results),
        adapters={result.mteb_task.name: result.adapter.sha256 for result in results},
        reused={result.mteb_task.name: result.reused_from for result in results if result.reused_from},
        failures=tuple(failures),
        versions=library_versions(),
        lorafleet_version=pipeline.__version__,
        sources_sha256=sources_sha256(),
        seconds=seconds,
    )
    write_manifest(manifest, folder)
    write_history_page(runs)
    return manifest


def _mteb_task_row(result: TaskResult, compute: ComputeConfig, *, created_at: datetime) -> MtebTaskRow:
    data, num_train = result.data, max(1, result.data.num_train)
    names = data.label_names[: len(data.label_counts)]  # empty in results of older versions, which have no counts
    p10, p50, p90 = data.token_quantiles or (None, None, None)
    seconds = result.busy_seconds if result.reused_from is None else 0.0
    gpu_share = 1.0 if compute.gpus_per_worker == "auto" else compute.gpus_per_worker
    return MtebTaskRow(
        run_id=result.run_id,
        mteb_task=result.mteb_task.name,
        created_at=created_at,
        num_train=data.num_train,
        num_validation=data.num_validation,
        num_test=data.num_test,
        num_classes=len(data.label_names),
        label_shares=tuple(
            LabelShare(label=n, share=c / num_train) for n, c in zip(names, data.label_counts, strict=True)
        ),
        tokens_p10=p10,
        tokens_p50=p50,
        tokens_p90=p90,
        num_truncated_train=data.num_truncated_train,
        num_overlap=data.num_overlap,
        fingerprint=data.fingerprint,
        test_sha256=data.test_fingerprint,
        worker_seconds=seconds,
        gpu_seconds=seconds * gpu_share if result.runtime.device == "cuda" else 0.0,
        peak_memory_bytes=max((row.peak_memory_bytes for row in result.epochs), default=0),
        reused_from=result.reused_from,
    )
