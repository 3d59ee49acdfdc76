"""Prefect tasks of a training run: names, retries, progress. Each is policy around one call into the pipeline.

Modules that are needed only after the training, such as the report, are imported late, so that workers start sooner.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from pipeline.config import ComputeConfig, PublishConfig, RunConfig, with_absolute_paths
from pipeline.errors import LorafleetError
from pipeline.history.values import values_of
from pipeline.printable import counted, markdown
from pipeline.records import (
    AdapterRef,
    ClassificationResults,
    DataSummary,
    EpochRow,
    Failure,
    LogLine,
    Progress,
    TaskResult,
    ValueRow,
)
from pipeline.reports.formatting import label_changes, percent
from pipeline.reports.score_table import SCORE_HEADINGS, score_table
from pipeline.reports.summary import accuracy_change, headline, selection_score, summarise_all, warm_start_summary
from pipeline.reports.vector_table import VECTOR_HEADINGS, vector_rows
from pipeline.run.plan import Plan
from pipeline.store.finished import find_finished, latest_results
from pipeline.store.finished import find_unchanged as find_unchanged_run
from pipeline.store.manifest import RunManifest
from pipeline.store.run_folder import RunFolder
from tasks.early_check import EarlyCheck
from tasks.fleet_worker import FleetWorker, WorkerDiedError
from tasks.live_table import LIVE_TABLE
from tasks.log import run_logger
from tasks.progress import ProgressArtifact, create_link_artifact, create_markdown_artifact, create_table_artifact
from tasks.publish_stage import check_target

REPORTS_URL = "LORAFLEET_REPORTS_URL"
"""Environment variable with the address at which the run store is served, if it is."""


def _died(_task: Any, _run: Any, state: Any) -> bool:
    """Whether a stage failed because its worker died. Other failures are deterministic, so a retry would not help."""
    return isinstance(state.result(raise_on_failure=False), WorkerDiedError)


def with_policy(stage: Any, compute: ComputeConfig) -> Any:
    """Apply the config's retries and back-off to a stage."""
    delays = [compute.retry_delay_seconds * 2**n for n in range(compute.retries)]
    return stage.with_options(retries=compute.retries, retry_delay_seconds=delays or 0, retry_condition_fn=_died)


@task(name="preflight", task_run_name="preflight", cache_policy=NO_CACHE)
def check_inputs(config: RunConfig, worker: FleetWorker, runs: Path) -> Plan | LorafleetError:
    """Have a worker check data and encoder before the training.

    Labels that have changed since the newest run of an MTEB task are logged.

    Returns:
        The plan, or the error: Prefect would log a raised error with a traceback.
    """
    logger = run_logger()
    try:
        check_target(config.publish)
        plan: Plan = worker.call("check", with_absolute_paths(config), timeout_seconds=config.compute.timeout_seconds)
    except WorkerDiedError:
        raise  # retried by the policy
    except LorafleetError as error:
        return error
    encoder, runtime = plan.encoder, plan.runtime
    logger.info("encoder %s at %s, %s on %s", encoder.public_name, encoder.revision, runtime.dtype, runtime.processor)
    previous = latest_results(runs, [planned.mteb_task.name for planned in plan.tasks])
    for planned in plan.tasks:
        name = planned.mteb_task.name
        logger.info("%s: %d training texts, revision %s", name, planned.num_train, planned.mteb_task.revision)
        for note in planned.notes:
            logger.warning("%s: %s", name, note)
        if name in previous and (changes := label_changes(previous[name].data.label_names, planned.label_names)):
            logger.warning("%s: its labels differ from those of run %s: %s", name, previous[name].run_id, changes)
    return plan


@task(name="preflight", task_run_name="preflight without Ray", cache_policy=NO_CACHE)
def find_unchanged_early(check: EarlyCheck, config: PublishConfig, runs: Path) -> RunFolder | LorafleetError | None:
    """Wait for the early check, and find out whether the newest run was made from the same inputs.

    Returns:
        The newest run's folder if the inputs are unchanged, None if they are not, or the error of the check.
    """
    try:
        check_target(config)
        keys = check.keys()
    except LorafleetError as error:
        return error
    return None if keys is None else find_unchanged_run(runs, keys)


@task(name="find unchanged", task_run_name="find unchanged", cache_policy=NO_CACHE)
def find_unchanged(plan: Plan, runs: Path) -> RunFolder | None:
    """Find the newest run, if it was made from the same inputs; otherwise return None."""
    return find_unchanged_run(runs, {planned.mteb_task.name: planned.key for planned in plan.tasks})


@task(name="reuse", task_run_name="reuse", cache_policy=NO_CACHE)
def reuse_finished(plan: Plan, runs: Path, run_id: str) -> list[TaskResult]:
    """Take over the MTEB tasks that earlier runs have finished with the same inputs."""
    from pipeline.run.collect import reuse

    finished = find_finished(runs, {planned.key for planned in plan.tasks})
    folder = RunFolder(runs / run_id)
    results = []
    for planned in plan.tasks:
        if planned.key in finished:
            source, result = finished[planned.key]
            results.append(reuse(source, result, run_id=run_id, folder=folder))
            run_logger().info("%s: unchanged, taken over from run %s", planned.mteb_task.name, results[-1].reused_from)
    return results


@task(name="load data", task_run_name="load data · {name}", cache_policy=NO_CACHE)
def load_data(name: str, worker: FleetWorker, timeout_seconds: float) -> DataSummary:
    """Have a worker read and tokenise its data, and load the encoder."""
    LIVE_TABLE.show(name, "load data")
    summary: DataSummary = worker.call("load", on_event=Report(name), timeout_seconds=timeout_seconds)
    run_logger().info("%s: loaded %s", name, _sizes(summary))
    return summary


def _sizes(summary: DataSummary) -> str:
    """Sizes and weak examples of the data of a task, in words."""
    pairs, what = summary.pairs, "texts" if summary.pairs is None else "pairs"
    sizes = f"{summary.num_train} training {what}, {summary.num_validation} validation, {summary.num_test} test"
    if pairs is None:
        sizes += f", {len(summary.label_names)} classes; {summary.num_overlap} test texts also in train"
    else:
        low, high = pairs.score_range or (0, 1)
        sizes += "" if (low, high) == (0, 1) else f", scores {low:g} to {high:g} scaled to 0 to 1"
        sizes += f"; {pairs.num_text_in_train} test pairs share a text with train"
    num_empty = summary.num_empty_train + summary.num_empty_test
    return f"{sizes}, {num_empty} empty, {summary.num_truncated_train + summary.num_truncated_test} truncated"


@task(name="frozen baselines", task_run_name="frozen baselines · {name}", cache_policy=NO_CACHE)
def evaluate_frozen(name: str, worker: FleetWorker, timeout_seconds: float) -> tuple[ValueRow, ...]:
    """Have a worker measure the frozen encoder."""
    LIVE_TABLE.show(name, "frozen baselines")
    rows: tuple[ValueRow, ...] = worker.call("evaluate_frozen", on_event=Report(name), timeout_seconds=timeout_seconds)
    run_logger().info("%s: frozen encoder: %s", name, headline(rows))
    return rows


@task(name="train", task_run_name="train · {name}", cache_policy=NO_CACHE)
def train_adapter(name: str, worker: FleetWorker, timeout_seconds: float) -> AdapterRef:
    """Have a worker train its adapter. Epochs are logged, and steps update a progress artifact."""
    LIVE_TABLE.show(name, "train")
    report = Report(name)
    adapter: AdapterRef = worker.call("train", on_event=report, timeout_seconds=timeout_seconds)
    report.trained()
    return adapter


@task(name="evaluate", task_run_name="evaluate · {name}", cache_policy=NO_CACHE)
def evaluate_adapter(name: str, worker: FleetWorker, timeout_seconds: float) -> TaskResult:
    """Have a worker evaluate its adapter, and verify it in a new process."""
    LIVE_TABLE.show(name, "evaluate")
    result: TaskResult = worker.call("finish", on_event=Report(name), timeout_seconds=timeout_seconds)
    values = values_of(result)
    LIVE_TABLE.show(name, "finished", headline([row for row in values if row.column in ("head", "adapted")]))
    run_logger().info(
        "%s: finished: %s; best of %s is %d, %.0f s of work",
        name,
        headline(values),
        counted(len(result.epochs), "epoch"),
        result.best_epoch,
        result.busy_seconds,
    )
    if summary := warm_start_summary(result):
        run_logger().info("%s: %s", name, summary)
    return result


@task(name="collect", task_run_name="collect", cache_policy=NO_CACHE)
def collect(
    plan: Plan, results: Sequence[TaskResult], failures: Sequence[Failure], run_id: str, folder: RunFolder
) -> tuple[ClassificationResults, tuple[TaskResult, ...]]:
    """Write metrics, results, model card and report, and show the score table in the UI.

    Returns:
        The summary, and the results with p-values corrected over all MTEB tasks.
    """
    from pipeline.run.collect import collect as write_files

    # This run is not among them, because it has no manifest yet.
    previous = latest_results(folder.root.parent, [result.mteb_task.name for result in results])
    summary, corrected = write_files(plan, results, failures, run_id=run_id, folder=folder)
    table = score_table(summary, corrected)
    rows = []
    classifiers = [result for result in corrected if result.has_head]
    for line, result in zip(table.lines, classifiers, strict=True):
        cells = {heading: cell.text for heading, cell in zip(SCORE_HEADINGS, line.cells(), strict=True)}
        name, head = SCORE_HEADINGS[0], "LoRA, own head"
        change = accuracy_change(result, previous.get(result.mteb_task.name))
        # The most important columns come first, because a narrow screen shows only those.
        rows.append({name: cells.pop(name), head: cells.pop(head), "Since the run before": change} | cells)
    if rows or not corrected:
        create_table_artifact(table=rows, key="score-table", description=f"Test accuracy in percent, run {run_id}")
    entries = summarise_all(corrected, failures, encoder=plan.encoder, run_id=run_id, created_at=summary.created_at)
    if vectors := [dict(zip(VECTOR_HEADINGS, cells, strict=True)) for cells in vector_rows(entries.tasks)]:
        create_table_artifact(table=vectors, key="vector-table", description=f"Embedding adapters, run {run_id}")
    facts = [f"- run folder: {markdown(folder.root.name)}", *(f"- {markdown(note)}" for note in table.notes())]
    starts = [(result.mteb_task.name, warm_start_summary(result)) for result in corrected]
    facts += [f"- {markdown(f'{name}: {start}')}" for name, start in starts if start]
    create_markdown_artifact(
        "\n".join(facts), key="score-notes", description=f"How to read the score table of run {run_id}"
    )
    create_link_artifact(_report_url(folder), key="report", link_text=f"report of run {run_id}")
    return summary, corrected


def _report_url(folder: RunFolder) -> str:
    """Address of the report, at the server of the run store if there is one, else as a file."""
    served = os.environ.get(REPORTS_URL)
    return (
        f"{served.rstrip('/')}/{folder.root.name}/{folder.report.name}" if served else folder.report.resolve().as_uri()
    )


@task(name="manifest", task_run_name="manifest", cache_policy=NO_CACHE)
def finish_run(
    plan: Plan,
    results: Sequence[TaskResult],
    failures: Sequence[Failure],
    run_id: str,
    folder: RunFolder,
    seconds: float,
) -> RunManifest:
    """Add the run to the history, and mark it as finished."""
    from pipeline.run.collect import finish_run as write_manifest

    return write_manifest(plan, results, failures, run_id=run_id, folder=folder, seconds=seconds)


class Report:
    """Receiver of a worker's events, which updates the log, the live table and a progress artifact."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._logger = run_logger()
        self._artifact = ProgressArtifact(_artifact_key(name))

    def __call__(self, event: EpochRow | Progress | LogLine) -> None:
        """Show one event."""
        if isinstance(event, LogLine):
            self._logger.log(event.level, "%s: %s", self._name, event.text)
            return
        if isinstance(event, EpochRow):
            score = "-" if (selected := selection_score(event)) is None else percent(selected)
            self._logger.info(
                "%s: epoch %d: loss %.4f, validation %s, %.0f texts/s, %.0f s",
                self._name,
                event.epoch,
                event.train_loss,
                score,
                event.texts_per_second,
                event.seconds,
            )
            return
        facts = f"epoch {event.epoch}/{event.max_epochs}, step {event.step}/{event.num_steps}"
        facts += f", loss {event.train_loss:.4f}, {event.texts_per_second:.0f} texts/s"
        done = 100 * ((event.epoch - 1) * event.num_steps + event.step) / (event.max_epochs * event.num_steps)
        LIVE_TABLE.show(self._name, "train", facts, percent=done)
        self._artifact.show(done, f"{self._name}: {facts}")

    def trained(self) -> None:
        """Complete the bar: the last events may have been missed, and early stopping may have skipped epochs."""
        self._artifact.show(100, f"{self._name}: trained")


def _artifact_key(name: str) -> str:
    return "train-" + "".join(c if c.isalnum() else "-" for c in name.lower())
