"""Prefect tasks of a comparison: names, retries, progress. Each is policy around one call into the pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from pipeline.compare.collect import collect_arms, find_arm, finish_comparison, reuse_arm
from pipeline.compare.files import ArmResult, ComparisonFolder
from pipeline.compare.plan import ArmSpec, ComparisonPlan
from pipeline.config import ComparisonConfig, with_absolute_paths
from pipeline.errors import LorafleetError
from pipeline.records import Failure
from tasks.fleet_worker import FleetWorker, WorkerDiedError
from tasks.live_table import LIVE_TABLE
from tasks.log import run_logger
from tasks.stages import Report


@task(name="preflight", task_run_name="preflight", cache_policy=NO_CACHE)
def check_comparison(
    config: ComparisonConfig, worker: FleetWorker, store: Path, run_id: str
) -> ComparisonPlan | LorafleetError:
    """Have a worker check data, encoder and arms.

    Returns: The plan, or the error: Prefect would log a raised error with a traceback.
    """
    logger = run_logger()
    try:
        plan: ComparisonPlan = worker.call(
            "check_comparison",
            with_absolute_paths(config),
            run_id,
            str(store.resolve()),
            timeout_seconds=config.compute.timeout_seconds,
        )
    except WorkerDiedError:
        raise  # retried by the policy
    except LorafleetError as error:
        return error
    finally:
        worker.release()  # each arm has a process of its own, whose peak memory counts
    runtime = plan.runtime
    logger.info("encoder %s, %s on %s", plan.encoder.public_name, runtime.dtype, runtime.processor)
    for note in plan.notes:
        logger.warning("%s: %s", plan.mteb_task.name, note)
    return plan


@task(name="reuse", task_run_name="reuse", cache_policy=NO_CACHE)
def reuse_arms(plan: ComparisonPlan, folder: ComparisonFolder) -> list[ArmResult]:
    """Take over the arms that earlier comparisons have finished with the same inputs, if their files are unchanged."""
    taken = []
    for spec in plan.arms:
        found = find_arm(folder.root.parent, spec)
        if isinstance(found, str):
            run_logger().warning("%s: %s; it is made again", spec.arm, found)
        elif found is not None:
            folder.root.mkdir(exist_ok=True)
            taken.append(reuse_arm(*found, folder.arm(spec.arm), run_id=folder.root.name))
            run_logger().info("%s: unchanged, taken over from %s", spec.arm, taken[-1].reused_from)
    return taken


@task(name="arm", task_run_name="{spec.arm}", cache_policy=NO_CACHE)
def run_arm(spec: ArmSpec, worker: FleetWorker, timeout_seconds: float) -> ArmResult:
    """Have a worker choose the learning rate of an arm, train it with every seed, and measure it."""
    LIVE_TABLE.show(spec.arm, "train")
    report = Report(spec.arm)
    result: ArmResult = worker.call("run_arm", spec, on_event=report, timeout_seconds=timeout_seconds)
    report.trained()
    LIVE_TABLE.show(spec.arm, "finished")
    rates = {one.learning_rate for one in result.seeds if one.learning_rate is not None}
    chosen = "".join(f", learning rate {rate:g}" for rate in rates)
    run_logger().info("%s: finished%s, %.0f s of training", spec.arm, chosen, result.train_seconds)
    return result


@task(name="collect", task_run_name="collect", cache_policy=NO_CACHE)
def collect(
    plan: ComparisonPlan,
    results: Sequence[ArmResult],
    failures: Sequence[Failure],
    folder: ComparisonFolder,
    seconds: float,
) -> None:
    """Score all arms on test, write tables, JSON and page, and mark the comparison as finished."""
    collect_arms(plan, results, failures, folder=folder)
    finish_comparison(plan, results, failures, folder=folder, seconds=seconds)
