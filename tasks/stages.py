"""The Prefect tasks of a run: names, retries, progress. Each is policy around one call of a worker or of the pipeline.

What is only needed once workers have trained (the report, the Hub) is imported then, so that the first of them starts sooner.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect import task
from prefect.blocks.system import Secret
from prefect.cache_policies import NO_CACHE

from pipeline.config import ComputeConfig, PublishConfig, RunConfig, anchored
from pipeline.errors import InputError, LorafleetError
from pipeline.printable import markdown
from pipeline.records import (
    AdapterRef,
    ClassificationResults,
    DataSummary,
    EpochRow,
    Failure,
    GateDecision,
    LogLine,
    Progress,
    ScoreRow,
    TaskResult,
)
from pipeline.reports.formatting import label_changes, percent
from pipeline.reports.score_table import SCORE_HEADINGS, score_table
from pipeline.reports.summary import accuracy_change, warm_start_summary
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

if TYPE_CHECKING:
    from pipeline.publishing.publish import PublishResult

REPORTS_URL = "LORAFLEET_REPORTS_URL"
"""Variable of the environment: the address under which the run store is served, if it is."""


def _died(_task: Any, _run: Any, state: Any) -> bool:
    """Only a dead worker is worth a retry: the same input fails in the same way, bit for bit."""
    return isinstance(state.result(raise_on_failure=False), WorkerDiedError)


def with_policy(stage: Any, compute: ComputeConfig) -> Any:
    """The stage with the config's retries and back-off."""
    delays = [compute.retry_delay_seconds * 2**n for n in range(compute.retries)]
    return stage.with_options(retries=compute.retries, retry_delay_seconds=delays or 0, retry_condition_fn=_died)


@task(name="preflight", task_run_name="preflight", cache_policy=NO_CACHE)
def check_inputs(config: RunConfig, worker: FleetWorker, runs: Path) -> Plan | LorafleetError:
    """A worker checks data and encoder before any trains; returns what is wrong: Prefect logs what is raised with a traceback.

    Labels that are new or have vanished since the newest run of an MTEB task are named.
    """
    logger = run_logger()
    try:
        _check_target(config.publish)
        plan: Plan = worker.call("check", anchored(config), timeout_seconds=config.compute.timeout_seconds)
    except WorkerDiedError:
        raise  # worth another try
    except LorafleetError as error:
        return error
    encoder, runtime = plan.encoder, plan.runtime
    logger.info("encoder %s at %s, %s on %s", encoder.public_name, encoder.revision, runtime.dtype, runtime.processor)
    before = latest_results(runs, [planned.mteb_task.name for planned in plan.tasks])
    for planned in plan.tasks:
        name = planned.mteb_task.name
        logger.info("%s: %d training texts, revision %s", name, planned.num_train, planned.mteb_task.revision)
        for note in planned.notes:
            logger.warning("%s: %s", name, note)
        if name in before and (changes := label_changes(before[name].data.label_names, planned.label_names)):
            logger.warning("%s: its labels are not those of run %s: %s", name, before[name].run_id, changes)
    return plan


@task(name="preflight", task_run_name="preflight without Ray", cache_policy=NO_CACHE)
def find_unchanged_early(check: EarlyCheck, config: PublishConfig, runs: Path) -> RunFolder | LorafleetError | None:
    """The newest run, if it was made from these very inputs; or what is wrong with them, as ``check_inputs``."""
    try:
        _check_target(config)
        keys = check.keys()
    except LorafleetError as error:
        return error
    return None if keys is None else find_unchanged_run(runs, keys)


@task(name="find unchanged", task_run_name="find unchanged", cache_policy=NO_CACHE)
def find_unchanged(plan: Plan, runs: Path) -> RunFolder | None:
    """The newest run, if it was made from these very inputs."""
    return find_unchanged_run(runs, {planned.mteb_task.name: planned.key for planned in plan.tasks})


@task(name="reuse", task_run_name="reuse", cache_policy=NO_CACHE)
def reuse_finished(plan: Plan, runs: Path, run_id: str) -> list[TaskResult]:
    """Take over what an earlier run has finished for the same inputs."""
    from pipeline.run.collect import reuse

    found = find_finished(runs, {planned.key for planned in plan.tasks})
    folder = RunFolder(runs / run_id)
    results = []
    for planned in plan.tasks:
        if planned.key in found:
            source, result = found[planned.key]
            results.append(reuse(source, result, run_id=run_id, folder=folder))
            run_logger().info("%s: unchanged, taken over from run %s", planned.mteb_task.name, results[-1].reused_from)
    return results


@task(name="load data", task_run_name="load data · {name}", cache_policy=NO_CACHE)
def load_data(name: str, worker: FleetWorker, timeout_seconds: float) -> DataSummary:
    """A worker reads and tokenises its data and loads the encoder."""
    LIVE_TABLE.show(name, "load data")
    summary: DataSummary = worker.call("load", on_event=_Report(name), timeout_seconds=timeout_seconds)
    run_logger().info(
        "%s: loaded %d training texts, %d validation, %d test, %d classes; %d test texts also in train, %d empty, %d cut",
        name,
        summary.num_train,
        summary.num_validation,
        summary.num_test,
        len(summary.label_names),
        summary.num_overlap,
        summary.num_empty_train + summary.num_empty_test,
        summary.num_truncated_train + summary.num_truncated_test,
    )
    return summary


@task(name="frozen baselines", task_run_name="frozen baselines · {name}", cache_policy=NO_CACHE)
def evaluate_frozen(name: str, worker: FleetWorker, timeout_seconds: float) -> tuple[ScoreRow, ...]:
    """A worker measures the frozen encoder."""
    LIVE_TABLE.show(name, "frozen baselines")
    rows: tuple[ScoreRow, ...] = worker.call("evaluate_frozen", on_event=_Report(name), timeout_seconds=timeout_seconds)
    run_logger().info("%s: frozen encoder: %s", name, _accuracies(rows))
    return rows


@task(name="train", task_run_name="train · {name}", cache_policy=NO_CACHE)
def train_adapter(name: str, worker: FleetWorker, timeout_seconds: float) -> AdapterRef:
    """A worker trains its adapter; epochs go to the log, steps to a progress artifact."""
    LIVE_TABLE.show(name, "train")
    report = _Report(name)
    adapter: AdapterRef = worker.call("train", on_event=report, timeout_seconds=timeout_seconds)
    report.trained()
    return adapter


@task(name="evaluate", task_run_name="evaluate · {name}", cache_policy=NO_CACHE)
def evaluate_adapter(name: str, worker: FleetWorker, timeout_seconds: float) -> TaskResult:
    """A worker evaluates its adapter and reloads it in a fresh process."""
    LIVE_TABLE.show(name, "evaluate")
    result: TaskResult = worker.call("finish", on_event=_Report(name), timeout_seconds=timeout_seconds)
    LIVE_TABLE.show(name, "finished", _accuracies([row for row in result.scores if row.column == "head"]))
    run_logger().info(
        "%s: finished: %s; best of %d epochs is %d, %.0f s of work",
        name,
        _accuracies(result.scores),
        len(result.epochs),
        result.best_epoch,
        result.busy_seconds,
    )
    if said := warm_start_summary(result):
        run_logger().info("%s: %s", name, said)
    return result


@task(name="collect", task_run_name="collect", cache_policy=NO_CACHE)
def collect(
    plan: Plan, results: Sequence[TaskResult], failures: Sequence[Failure], run_id: str, folder: RunFolder
) -> tuple[ClassificationResults, tuple[TaskResult, ...]]:
    """Write metrics, results, card and report; show the score table in the UI."""
    from pipeline.run.collect import collect as write_files

    before = latest_results(
        folder.root.parent, [result.mteb_task.name for result in results]
    )  # this run has no manifest yet
    summary, corrected = write_files(plan, results, failures, run_id=run_id, folder=folder)
    table = score_table(summary, corrected)
    rows = []
    for line, result in zip(table.lines, corrected, strict=True):
        cells = {heading: cell.text for heading, cell in zip(SCORE_HEADINGS, line.cells(), strict=True)}
        name, head = SCORE_HEADINGS[0], "LoRA, own head"
        change = accuracy_change(result, before.get(result.mteb_task.name))
        rows.append(
            {name: cells.pop(name), head: cells.pop(head), "Since the run before": change} | cells
        )  # what a laptop shows first
    create_table_artifact(table=rows, key="score-table", description=f"Accuracy in per cent on test, run {run_id}")
    facts = [f"- run folder: {markdown(folder.root.name)}", *(f"- {markdown(note)}" for note in table.notes())]
    facts += [
        f"- {markdown(f'{result.mteb_task.name}: {said}')}"
        for result in corrected
        if (said := warm_start_summary(result))
    ]
    create_markdown_artifact(
        "\n".join(facts), key="score-notes", description=f"How to read the score table of run {run_id}"
    )
    create_link_artifact(_report_url(folder), key="report", link_text=f"report of run {run_id}")
    return summary, corrected


def _report_url(folder: RunFolder) -> str:
    """Where the report can be read: at the address under which the run store is served, else as a file."""
    served = os.environ.get(REPORTS_URL)
    return (
        f"{served.rstrip('/')}/{folder.root.name}/{folder.report.name}" if served else folder.report.resolve().as_uri()
    )


@task(name="publish", task_run_name="publish", cache_policy=NO_CACHE)
def publish(folder: RunFolder, config: PublishConfig, *, trust_remote_code: bool) -> PublishResult | LorafleetError:
    """Gate, stage, verify and publish the finished run; returns why it could not, as ``check_inputs`` does."""
    from pipeline.publishing.publish import publish as publish_run

    logger = run_logger()
    try:
        with _hub_token(config.token_block):
            published = publish_run(folder.root, config, trust_remote_code=trust_remote_code)
    except LorafleetError as error:
        logger.error("not published: %s", error)
        return error
    rows = [
        decision.model_dump(mode="json", exclude={"run_id", "to", "created_at"}) for decision in published.decisions
    ]
    create_table_artifact(
        table=rows, key="gate", description=f"Promotion gate of run {folder.root.name}, to {config.to}"
    )
    for decision in published.decisions:
        logger.log(logging.ERROR if decision.decision == "block" else logging.INFO, "%s: %s: %s", *_said(decision))
    logger.info(
        "published %d adapters to %s%s",
        len(published.verified),
        config.to,
        f"@{published.revision}" * bool(published.revision),
    )
    create_link_artifact(published.url, key="published", link_text=f"what is published after run {folder.root.name}")
    return published


def _check_target(config: PublishConfig) -> None:
    if config.to is not None and config.to.startswith("hf:"):
        from pipeline.publishing.hub import HubRepository

        with _hub_token(config.token_block):
            HubRepository(config.to.removeprefix("hf:")).check_access()


def _said(decision: GateDecision) -> tuple[str, str, str]:
    return decision.mteb_task, decision.decision, decision.reason


@contextmanager
def _hub_token(block: str | None) -> Iterator[None]:
    """While open, huggingface_hub finds the token of a Prefect Secret block where it looks for one."""
    if block is None:
        yield
        return
    try:
        secret: Any = Secret.load(block)
    except ValueError:
        raise InputError(
            f"publish.token_block: there is no Prefect Secret block {block!r}; create it, or set HF_TOKEN"
        ) from None
    before = os.environ.get("HF_TOKEN")
    os.environ["HF_TOKEN"] = secret.get()
    try:
        yield
    finally:
        os.environ.pop("HF_TOKEN")
        if before is not None:
            os.environ["HF_TOKEN"] = before


@task(name="manifest", task_run_name="manifest", cache_policy=NO_CACHE)
def finish_run(
    plan: Plan,
    results: Sequence[TaskResult],
    failures: Sequence[Failure],
    run_id: str,
    folder: RunFolder,
    seconds: float,
) -> RunManifest:
    """Enter the run into the history and mark it finished."""
    from pipeline.run.collect import finish_run as write_manifest

    return write_manifest(plan, results, failures, run_id=run_id, folder=folder, seconds=seconds)


class _Report:
    """Turns a worker's events into log lines and a progress artifact."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._logger = run_logger()
        self._artifact = ProgressArtifact(_artifact_key(name))

    def __call__(self, event: EpochRow | Progress | LogLine) -> None:
        if isinstance(event, LogLine):
            self._logger.log(event.level, "%s: %s", self._name, event.text)
            return
        if isinstance(event, EpochRow):
            score = "-" if event.validation_accuracy is None else percent(event.validation_accuracy)
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
        """The bar's end: between two looks the worker has gone further than was last shown, and patience may have stopped it before."""
        self._artifact.show(100, f"{self._name}: trained")


def _artifact_key(name: str) -> str:
    return "train-" + "".join(c if c.isalnum() else "-" for c in name.lower())


def _accuracies(rows: Sequence[ScoreRow]) -> str:
    return ", ".join(f"{row.column} {percent(row.accuracy)}" for row in rows)
