"""Prefect tasks of a bulk job. Units run in this process, or in Ray Data's pool of actors."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from humanize import naturaldelta
from prefect import task
from prefect.cache_policies import NO_CACHE

from pipeline.bulk.output import forget_attempts
from pipeline.bulk.records import BulkRequest, BulkSummary, Receipt
from pipeline.bulk.state import finish
from pipeline.bulk_input.units import BulkInput, Unit, UnitFailure
from pipeline.config import ComputeConfig
from pipeline.errors import InputError, LorafleetError, first_line
from pipeline.machine import local_cpus
from pipeline.printable import counted, markdown
from pipeline.storage.listing import in_words
from pipeline.storage.place import store_errors
from tasks.fleet import Fleet
from tasks.live_table import LIVE_TABLE
from tasks.log import run_logger
from tasks.progress import ProgressArtifact, create_markdown_artifact

if TYPE_CHECKING:
    import numpy as np

    from pipeline.bulk.plan import BulkPlan
    from pipeline.bulk.worker import WorkerSpec

_LOG_SECONDS = 15.0
_BLOCK_BYTES = 1024**2
_CHANGES_SHOWN = 12


@task(name="plan", task_run_name="plan", cache_policy=NO_CACHE)
def plan_job(request: BulkRequest) -> BulkPlan | InputError:
    """Check input, adapters, encoder and output before anything starts.

    Returns:
        The plan, or the error: Prefect would log a raised error with a traceback.
    """
    from pipeline.bulk.plan import plan_bulk

    try:
        plan = plan_bulk(request)
    except InputError as error:
        return error
    logger = run_logger()
    logger.info("input: %s (%d already done)", _extent(plan.source), plan.state.num_done)
    if plan.source.skipped:
        logger.info("%s", in_words(plan.source.skipped))
    if changes := plan.source.changes:
        more = f" and {len(changes) - _CHANGES_SHOWN} more, see _job.json" if len(changes) > _CHANGES_SHOWN else ""
        logger.warning("types that the output cannot keep: %s%s", "; ".join(changes[:_CHANGES_SHOWN]), more)
    for failure in plan.source.failures:
        logger.warning("skipped: %s: %s", failure.path, failure.reason)
    return plan


@task(name="label units", task_run_name="label units", cache_policy=NO_CACHE)
def label_units(plan: BulkPlan) -> tuple[list[Receipt], float] | LorafleetError:
    """Label or embed the remaining units.

    Returns:
        Receipts and the seconds of that work, or the error that stopped the job.
    """
    receipts: list[Receipt] = []
    if not plan.state.todo:
        run_logger().info("nothing left to do")
        return receipts, 0.0
    progress = _Progress(plan)
    try:
        for receipt in _in_process(plan, progress) if plan.in_process else _on_ray(plan, progress):
            receipts.append(receipt)
            progress.show(receipts)
            if receipt.fatal:
                return LorafleetError(
                    f"stopped: {receipt.failure}; fix that and run the command again, {_units(plan, receipts)} are kept"
                )
    except LorafleetError as error:
        return error
    return receipts, progress.seconds


@task(name="finish", task_run_name="finish", cache_policy=NO_CACHE)
def finish_job(
    plan: BulkPlan, receipts: Sequence[Receipt], *, seconds: float, busy_seconds: float
) -> tuple[BulkSummary, tuple[UnitFailure, ...]] | LorafleetError:
    """Write the summary next to the output, and show it in the UI.

    Args:
        plan: Plan of the job.
        receipts: Receipts of the units done by this start.
        seconds: Wall time of the job.
        busy_seconds: Wall time of labelling or embedding.
    Returns:
        Summary and failed units, or the error if the output cannot be finished.
    """
    try:
        summary, failures = finish(
            plan.output, plan.state, plan.job, plan.source, receipts, seconds=seconds, busy_seconds=busy_seconds
        )
    except LorafleetError as error:
        return error
    except store_errors() as error:
        return LorafleetError(
            f"output {plan.output}: cannot be finished: {error}; "
            f"run the command again, {_units(plan, receipts)} are kept"
        )
    rate = "" if summary.rows_per_second is None else f", {summary.rows_per_second:.0f} rows/s"
    done = plan.job.options.participle
    lines = [
        f"{summary.rows_out:,} of {summary.rows_in:,} rows {done}{rate}, {counted(summary.failures, 'failure')}",
        "",
    ]
    for name, counts in summary.labels.items():
        most = ", ".join(f"{markdown(label)} {count:,}" for label, count in list(counts.items())[:10])
        lines.append(f"- {markdown(name)}: {most}; {summary.null_labels.get(name, 0):,} without a label")
    for name, vectors in summary.vectors.items():
        shape = f"{vectors.width} dimensions, {vectors.dtype}"
        lines.append(f"- {markdown(name)}: vectors of {shape}; {vectors.nulls:,} rows without a vector")
    create_markdown_artifact("\n".join(lines), key="bulk-summary", description=f"Bulk job {summary.job}")
    return summary, failures


def _in_process(plan: BulkPlan, progress: _Progress) -> Iterator[Receipt]:
    from pipeline.bulk.worker import UnitWorker

    compute = plan.request.compute
    threads = local_cpus() if compute.cpus == "auto" else max(1, int(compute.cpus))
    rows, doing = counted(plan.rows_todo, "row"), plan.job.options.gerund
    run_logger().info("%s %s in this process, %s", doing, rows, counted(threads, "thread"))
    worker = UnitWorker(plan.worker_spec(threads=threads, use_gpu=compute.gpus != 0))
    progress.begin()
    for unit in plan.state.todo:
        yield worker.label(unit)


def _on_ray(plan: BulkPlan, progress: _Progress) -> Iterator[Receipt]:
    compute = plan.request.compute
    try:
        forget_attempts(plan.state.folder)  # each start of Ray makes its own three attempts
    except store_errors() as error:
        raise LorafleetError(f"output {plan.output}: {first_line(error)}") from error
    shares = ComputeConfig(cpus_per_worker=compute.cpus, gpus_per_worker=compute.gpus, ray_address=compute.ray_address)
    fleet = Fleet(shares, num_tasks=len(plan.state.todo))
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # else Ray's core complains of Ray Data's own actors
    with fleet:
        fleet.ready()
        import ray.data
        from ray.exceptions import RayError, RayTaskError

        logging.getLogger("ray.data").setLevel(logging.ERROR)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        context.target_max_block_size = _BLOCK_BYTES  # blocks hold receipts only; Ray would reserve far more space
        most = min(len(plan.state.todo), fleet.num_workers if compute.concurrency == "auto" else compute.concurrency)
        threads, gpus = max(1, int(fleet.cpus_per_worker)), fleet.gpus_per_worker
        place = f"on Ray, up to {most} actors of {threads} threads and {gpus:g} GPUs"
        run_logger().info("%s %d rows %s", plan.job.options.gerund, plan.rows_todo, place)
        units = ray.data.from_items(
            [{"unit": unit.model_dump_json()} for unit in plan.state.todo], override_num_blocks=len(plan.state.todo)
        )
        receipts = units.map_batches(
            UnitActor,
            fn_constructor_args=(plan.worker_spec(threads=threads, use_gpu=gpus > 0),),
            batch_size=1,
            num_cpus=fleet.cpus_per_worker,
            num_gpus=gpus,
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=most),
        )
        progress.begin()
        try:
            for row in receipts.iter_rows():
                yield Receipt.model_validate_json(row["receipt"])
        except RayTaskError:
            raise  # a bug of ours
        except RayError as error:
            reason = str(error).strip().splitlines()[-1]
            raise LorafleetError(f"Ray stopped: {reason}; run the command again, finished work is kept") from error


class UnitActor:
    """Actor of Ray Data's pool. It has one classifier, and labels or embeds one unit at a time."""

    def __init__(self, spec: WorkerSpec) -> None:
        from pipeline.bulk.worker import UnitWorker

        self._worker = UnitWorker(spec)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
        """Label a batch of units, given and returned as JSON."""
        return {
            "receipt": [self._worker.label(Unit.model_validate_json(text)).model_dump_json() for text in batch["unit"]]
        }


class _Progress:
    """Rows done, rows/s and remaining time, reported to the log, the live table and a progress artifact."""

    def __init__(self, plan: BulkPlan) -> None:
        self._plan = plan
        self._rows = {unit.number: unit.num_rows for unit in plan.state.todo}
        self._started = time.monotonic()
        self._logged = 0.0
        self._command = "classify" if plan.job.options.labels else "embed"
        self._artifact = ProgressArtifact(self._command)
        self._logger: Any = run_logger()

    def begin(self) -> None:
        """Start the clock, when the workers are about to begin."""
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds of labelling or embedding so far."""
        return time.monotonic() - self._started

    def show(self, receipts: Sequence[Receipt]) -> None:
        """Report the progress after a unit."""
        done, total = sum(self._rows[receipt.unit] for receipt in receipts), self._plan.rows_todo
        rate = done / max(self.seconds, 1e-9)
        remaining = (total - done) / rate
        facts = f"{done:,} of {total:,} rows, {rate:,.0f} rows/s, {naturaldelta(remaining)} left"
        LIVE_TABLE.show(self._command, f"{100 * done / total:.0f} %", facts, percent=100 * done / total)
        if receipts[-1].failure:
            self._logger.warning("unit %d failed: %s", receipts[-1].unit, receipts[-1].failure)
        now = time.monotonic()
        if not self._logged or now - self._logged >= _LOG_SECONDS or done == total:
            self._logger.info("%s%s", "first estimate: " if not self._logged and done < total else "", facts)
            self._logged = now
        self._artifact.show(100 * done / total, facts)


def _extent(source: BulkInput) -> str:
    rows, files = counted(source.num_rows, "row"), counted(len(source.files), "file")
    return f"{rows} in {files}, {counted(len(source.units), 'unit')}"


def _units(plan: BulkPlan, receipts: Sequence[Receipt]) -> str:
    done = plan.state.num_done + sum(not receipt.failure for receipt in receipts)
    return f"{done} of {counted(len(plan.source.units), 'unit')}"
