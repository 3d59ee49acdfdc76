"""Main flow: train, evaluate, collect and publish one adapter per MTEB task."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture
from prefect.states import Cancelled, Completed, Failed
from prefect.task_runners import ThreadPoolTaskRunner

from pipeline.config import RunConfig, load_config, select_tasks
from pipeline.data.families import check_train_keys
from pipeline.errors import InputError, LorafleetError, first_line
from pipeline.history.tables import read_gate
from pipeline.printable import counted, printable
from pipeline.records import Failure, TaskResult
from pipeline.run.plan import Plan, PlannedTask, job_spec
from pipeline.store.lock import hold_store, store_folder
from pipeline.store.manifest import write_config
from pipeline.store.run_folder import RunFolder
from tasks import publish_stage, stages
from tasks.ahead import check_of_run, fleet_of_run
from tasks.cancelling import RunCancelledError, interrupted_if_cancelled
from tasks.fleet import Fleet
from tasks.fleet_worker import FleetWorker, WorkerDiedError
from tasks.log import run_logger


@dataclass(frozen=True)
class RunOutcome:
    """Outcome of a run of the flow."""

    run_id: str
    folder: RunFolder | None
    """Run folder; None if the run was refused before anything was written."""
    results: tuple[TaskResult, ...]
    failures: tuple[Failure, ...]


_LOOK_UP_SECONDS = 0.5
_THREADS: ThreadPoolTaskRunner[Any] = ThreadPoolTaskRunner(max_workers=256)  # threads only wait for the workers


@flow(name="train-adapters", task_runner=_THREADS)  # type: ignore[arg-type]
def train_adapters(
    config: str = "quickstart",
    overrides: list[str] | None = None,
    mteb_tasks: list[str] | None = None,
    runs: str = "runs",
    force: bool = False,
    publish: bool = True,
) -> State[Any]:
    """Train, evaluate, collect and publish. A failed MTEB task fails the flow run, after the others have finished.

    Args:
        config: A preset (quickstart, minilm6, mteb8), or a TOML file on the machine that runs the flow. Each run reads
            it again.
        overrides: Keys of the config to override, each as KEY=VALUE, such as train.seed=7.
        mteb_tasks: MTEB tasks of the config to train. Leave empty for all.
        runs: Run store, a folder.
        force: Train again even if an earlier run has finished with the same inputs.
        publish: Publish the adapters that the gate promotes, if the config has a target (publish.to).
    """
    run_id = datetime.now(UTC).strftime("%Y%m%d-%H%M%S-") + secrets.token_hex(2)
    try:
        values = select_tasks(
            load_config(config, overrides=tuple(overrides or ())), mteb_tasks=mteb_tasks, publish=publish
        )
        store = store_folder(runs)
        with interrupted_if_cancelled(), hold_store(store, run_id):
            return _run(values, store, run_id, force=force, has_every_task=not mteb_tasks)
    except RunCancelledError as error:
        return Cancelled(message=str(error))
    except InputError as error:
        return _not_begun(run_id, error)


def _run(config: RunConfig, store: Path, run_id: str, *, force: bool, has_every_task: bool) -> State[Any]:
    started = time.monotonic()
    check = None if force else check_of_run(config, store)
    unchanged = None if check is None else stages.find_unchanged_early(check, config.publish, store)
    if unchanged is not None:
        return _not_begun(run_id, unchanged) if isinstance(unchanged, LorafleetError) else _unchanged(unchanged, config)
    with fleet_of_run(config) as fleet:
        first = fleet.worker()
        plan = _check(config, first, store)
        if isinstance(plan, LorafleetError):
            return _not_begun(run_id, plan)
        if has_every_task:  # keys of [train] may be for a task that is left out
            check_train_keys([planned.mteb_task for planned in plan.tasks], plan.config.train)
        if not force and (newest := stages.find_unchanged(plan, store)) is not None:
            return _unchanged(newest, plan.config)
        folder = RunFolder(store / run_id)
        write_config(plan.config, folder)
        reused = [] if force else stages.reuse_finished(plan, store, run_id)
        trained, failures = _fan_out(plan, reused, fleet, first, store=store, run_id=run_id)
        _, results = stages.collect(plan, _in_config_order(plan, [*reused, *trained]), failures, run_id, folder)
        stages.finish_run(plan, results, failures, run_id, folder, time.monotonic() - started)
        if plan.config.publish.to is not None and results:
            failures += _publish(folder, plan.config)
        num_trained = sum(result.reused_from is None for result in results)
        message = f"{counted(num_trained, 'adapter')} trained, {len(results) - num_trained} unchanged"
        return _ended(RunOutcome(run_id, folder, results, tuple(failures)), message)


def _check(config: RunConfig, worker: FleetWorker, store: Path) -> Plan | LorafleetError:
    try:
        plan: Plan | LorafleetError = stages.with_policy(stages.check_inputs, config.compute)(config, worker, store)
    except WorkerDiedError as error:
        return error
    return plan


def _fan_out(
    plan: Plan, reused: Sequence[TaskResult], fleet: Fleet, first: FleetWorker, *, store: Path, run_id: str
) -> tuple[list[TaskResult], list[Failure]]:
    """Run the stages of each MTEB task that is not reused, on one worker per task.

    Args:
        plan: Plan of the run.
        reused: Results taken over from an earlier run.
        fleet: Source of further workers.
        first: Worker that has checked the inputs, used for the first task.
        store: Run store.
        run_id: Id of the run.
    Returns:
        New results, and failures. A failed task does not affect the others.
    """
    done = {result.mteb_task.name for result in reused}
    todo = [planned for planned in plan.tasks if planned.mteb_task.name not in done]
    workers = [first, *(fleet.worker() for _ in todo[1:])]
    chains = [
        _Chain(planned, plan, worker, store=store, run_id=run_id)
        for planned, worker in zip(todo, workers, strict=False)
    ]
    outcomes = [chain.outcome() for chain in chains]
    return [o for o in outcomes if isinstance(o, TaskResult)], [o for o in outcomes if isinstance(o, Failure)]


def _publish(folder: RunFolder, config: RunConfig) -> list[Failure]:
    """Publish a finished run. A failure leaves the run finished, so that `lorafleet publish` can retry."""
    published = publish_stage.publish(folder, config.publish, trust_remote_code=config.encoder.trust_remote_code)
    if isinstance(published, LorafleetError):
        return [
            Failure(mteb_task="", stage="publish", reason=str(published), user_fault=isinstance(published, InputError))
        ]
    return [
        Failure(mteb_task=decision.mteb_task, stage="gate", reason=decision.reason) for decision in published.blocked
    ]


class _Chain:
    """Stages of one MTEB task. Each is a Prefect task run that waits for the previous one."""

    def __init__(self, planned: PlannedTask, plan: Plan, worker: FleetWorker, *, store: Path, run_id: str) -> None:
        self.name = planned.mteb_task.name
        compute = plan.config.compute
        self.worker = worker
        worker.begin(job_spec(plan, planned, run_id=run_id, runs=store))
        self.futures: dict[str, PrefectFuture[Any]] = {}
        previous: list[PrefectFuture[Any]] = []
        for stage in (stages.load_data, stages.evaluate_frozen, stages.train_adapter, stages.evaluate_adapter):
            future = stages.with_policy(stage, compute).submit(
                self.name, self.worker, compute.timeout_seconds, wait_for=previous
            )
            self.futures[stage.name] = future
            previous = [future]
        # The last stage ends as soon as an earlier one fails. Its slot is free at once, not when the flow next looks.
        previous[-1].add_done_callback(lambda _: self.worker.release())

    def outcome(self) -> TaskResult | Failure:
        """Wait for all stages, and return the result or the failure."""
        result: Any = None
        for stage, future in self.futures.items():
            result = _wait(future)
            if not future.state.is_completed():
                return Failure(
                    mteb_task=self.name, stage=stage, reason=_reason(result), user_fault=isinstance(result, InputError)
                )
        assert isinstance(result, TaskResult)
        return result


def _wait(future: PrefectFuture[Any]) -> Any:
    """Wait for a future, and return its result or error.

    Polls, because some libraries' signal handlers keep Ctrl-C from interrupting a wait without a timeout.
    """
    while True:
        with suppress(TimeoutError):
            return future.result(timeout=_LOOK_UP_SECONDS, raise_on_failure=False)


def _reason(error: Any) -> str:
    text = first_line(error)
    return text if isinstance(error, LorafleetError) else f"{type(error).__name__}: {text}"


def _in_config_order(plan: Plan, results: Sequence[TaskResult]) -> list[TaskResult]:
    order = {t.name: index for index, t in enumerate(plan.config.mteb_tasks)}
    return sorted(results, key=lambda result: order[result.mteb_task.name])


def _unchanged(folder: RunFolder, config: RunConfig) -> State[Any]:
    """End a run that has nothing to train. An interrupted publish is repeated."""
    run_id = folder.root.name
    to = config.publish.to
    is_published = folder.gate.is_file() and any(decision.to == to for decision in read_gate(folder.gate))
    failures = _publish(folder, config) if to is not None and not is_published else []
    message = f"nothing to do: data and config are those of run {run_id}"
    run_logger().info("%s", message)
    return _ended(RunOutcome(run_id, folder, (), tuple(failures)), message)


def _not_begun(run_id: str, error: LorafleetError) -> State[Any]:
    run_logger().error("error: %s", error)
    failure = Failure(mteb_task="", stage="preflight", reason=str(error), user_fault=isinstance(error, InputError))
    return Failed(message=f"nothing was trained: preflight: {error}", data=RunOutcome(run_id, None, (), (failure,)))


def _ended(outcome: RunOutcome, message: str) -> State[Any]:
    if not outcome.failures:
        return Completed(message=message, data=outcome)
    failed = ", ".join(f"{f.mteb_task} ({f.stage}: {f.reason})" for f in outcome.failures)
    names = {result.mteb_task.name for result in outcome.results} | {
        f.mteb_task for f in outcome.failures if f.mteb_task
    }
    return Failed(message=printable(f"{len(outcome.failures)} of {len(names)} failed: {failed}"), data=outcome)
