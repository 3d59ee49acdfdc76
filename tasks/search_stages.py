"""Prefect tasks of a search: names, retries, progress. Each is policy around one call into the pipeline."""

from __future__ import annotations

from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from pipeline.config import SearchedConfig, with_absolute_paths
from pipeline.errors import DivergedError, LorafleetError
from pipeline.search.report import Outcome, write_results
from pipeline.search.study import Study
from pipeline.search.trials import SearchPlan, TrialFiles, TrialRecord
from tasks.fleet_worker import FleetWorker, WorkerDiedError
from tasks.live_table import LIVE_TABLE
from tasks.log import run_logger
from tasks.stages import Report


@task(name="preflight", task_run_name="preflight", cache_policy=NO_CACHE)
def check_search(config: SearchedConfig, worker: FleetWorker, runs: Path) -> SearchPlan | LorafleetError:
    """Have a worker check data, encoder and every value that may be tried.

    Returns: The plan, or the error: Prefect would log a raised error with a traceback.
    """
    logger = run_logger()
    try:
        plan: SearchPlan = worker.call(
            "check_search",
            with_absolute_paths(config),
            str(runs.resolve()),
            timeout_seconds=config.compute.timeout_seconds,
        )
    except WorkerDiedError:
        raise  # retried by the policy
    except LorafleetError as error:
        return error
    logger.info("encoder %s, %s on %s", plan.encoder.public_name, plan.runtime.dtype, plan.runtime.processor)
    for note in plan.notes:
        logger.warning("%s: %s", plan.mteb_task.name, note)
    return plan


@task(name="trial", task_run_name="trial {trial.number}", cache_policy=NO_CACHE)
def run_trial(
    trial: TrialRecord, plan: SearchPlan, study: Study, files: TrialFiles, worker: FleetWorker
) -> TrialRecord:
    """Train a trial epoch by epoch, until it ends or the study stops it. Its file is rewritten after every epoch."""
    trial = files.read(trial.number) or trial  # a retry goes on from there
    name = f"trial {trial.number}"
    LIVE_TABLE.show(name, "train")
    report = Report(name)
    spec = plan.spec(trial.learning_rate, trial.values)
    until = max(1, len(trial.scores))
    while trial.state == "running":
        try:
            found = worker.call(
                "advance_trial", spec, until, on_event=report, timeout_seconds=plan.config.compute.timeout_seconds
            )
        except DivergedError as error:
            trial = trial.changed(state="failed", fault=str(error))
        else:
            trial = trial.changed(**found.model_dump(exclude={"is_finished"}))
            is_behind = study.should_stop(trial)
            if found.is_finished or is_behind:
                trial = trial.changed(state="finished" if found.is_finished else "stopped")
        until = len(trial.scores) + 1
        files.write(trial)
    study.tell(trial)
    report.trained()
    score = "-" if trial.score is None else f"{100 * trial.score:.1f}"
    LIVE_TABLE.show(name, trial.state, f"validation {score}")
    run_logger().info("%s: %s after %d epochs, validation %s", name, trial.state, len(trial.scores), score)
    return trial


@task(name="results", task_run_name="results", cache_policy=NO_CACHE)
def write_search(folder: Path, plan: SearchPlan, trials: list[TrialRecord], outcome: Outcome) -> None:
    """Write the table, the configs, the page and the summary of a search."""
    write_results(folder, plan, trials, outcome)
