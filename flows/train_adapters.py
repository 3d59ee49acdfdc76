"""The main job: train, evaluate and collect one adapter per MTEB task."""

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
from pipeline.errors import InputError, LorafleetError, first_line
from pipeline.printable import counted, printable
from pipeline.records import Failure, TaskResult
from pipeline.run.plan import Plan, PlannedTask, job_spec
from pipeline.store.lock import hold_store, store_folder
from pipeline.store.manifest import write_config
from pipeline.store.run_folder import RunFolder
from pipeline.store.tables import read_gate
from tasks import stages
from tasks.cancelling import RunCancelledError, interrupted_if_cancelled
from tasks.early_check import early_check
from tasks.fleet import Fleet, fleet_of_run
from tasks.fleet_worker import FleetWorker, WorkerDiedError
from tasks.log import run_logger


@dataclass(frozen=True)
class RunOutcome:
    """What a run of the flow came to."""

    run_id: str
    folder: RunFolder | None
    """None where the input was wrong and nothing was written."""
    results: tuple[TaskResult, ...]
    failures: tuple[Failure, ...]


_LOOK_UP_SECONDS = 0.5
_THREADS: ThreadPoolTaskRunner[Any] = ThreadPoolTaskRunner(max_workers=256)  # they wait, the workers work


@flow(name="train-adapters", task_runner=_THREADS)  # type: ignore[arg-type]
def train_adapters(
    config: str = "quickstart",
    overrides: list[str] | None = None,
    mteb_tasks: list[str] | None = None,
    runs: str = "runs",
    force: bool = False,
    publish: bool = True,
) -> State[Any]:
    """Train, evaluate, collect and publish; ends failed, with the table, if an MTEB task failed.

    Args:
        config: A preset (quickstart, minilm6, mteb8) or a TOML file on the machine that runs the flow; read anew by each run.
        overrides: Keys of the config to override, each as KEY=VALUE, such as train.seed=7.
        mteb_tasks: Only these of the config's MTEB tasks; all of them where left empty.
        runs: The run store, a folder.
        force: Train again what an earlier run has finished for the same inputs.
        publish: Publish what the gate promotes, where the config says to which place (publish.to).
    """
    run_id = datetime.now(UTC).strftime("%Y%m%d-%H%M%S-") + secrets.token_hex(2)
    try:
        values = select_tasks(
            load_config(config, overrides=tuple(overrides or ())), mteb_tasks=mteb_tasks, publish=publish
        )
        store = store_folder(runs)
        with interrupted_if_cancelled(), hold_store(store, run_id):
            return _run(values, store, run_id, force=force)
    except RunCancelledError as error:
        return Cancelled(message=str(error))
    except InputError as error:
        return _not_begun(run_id, error)


def _run(config: RunConfig, store: Path, run_id: str, *, force: bool) -> State[Any]:
    started = time.monotonic()
    check = None if force else early_check(config, store)
    if check is not None and (found := stages.find_unchanged_early(check, config.publish, store)) is not None:
        return _not_begun(run_id, found) if isinstance(found, LorafleetError) else _unchanged(found, config)
    with fleet_of_run(config) as fleet:
        first = fleet.worker()
        plan = _check(config, first, store)
        if isinstance(plan, LorafleetError):
            return _not_begun(run_id, plan)
        if not force and (unchanged := stages.find_unchanged(plan, store)) is not None:
            return _unchanged(unchanged, plan.config)
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
    """One worker per MTEB task that is not there yet, ``first`` for one of them; a failing one leaves the others alone."""
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
    """Publish; where that fails the run is finished all the same, and `lorafleet publish` can be tried again."""
    published = stages.publish(folder, config.publish, trust_remote_code=config.encoder.trust_remote_code)
    if isinstance(published, LorafleetError):
        return [
            Failure(mteb_task="", stage="publish", reason=str(published), user_fault=isinstance(published, InputError))
        ]
    return [
        Failure(mteb_task=decision.mteb_task, stage="gate", reason=decision.reason) for decision in published.blocked
    ]


class _Chain:
    """The stages of one MTEB task, each a Prefect task run that waits for the one before."""

    def __init__(self, planned: PlannedTask, plan: Plan, worker: FleetWorker, *, store: Path, run_id: str) -> None:
        self.name = planned.mteb_task.name
        compute = plan.config.compute
        self.worker = worker
        worker.begin(job_spec(plan, planned, run_id=run_id, runs=store))
        self.futures: dict[str, PrefectFuture[Any]] = {}
        before: list[PrefectFuture[Any]] = []
        for stage in (stages.load_data, stages.evaluate_frozen, stages.train_adapter, stages.evaluate_adapter):
            future = stages.with_policy(stage, compute).submit(
                self.name, self.worker, compute.timeout_seconds, wait_for=before
            )
            self.futures[stage.name] = future
            before = [future]
        # The last stage ends with whichever fails before it. Its place is given on at once, not when the flow comes to look.
        before[-1].add_done_callback(lambda _: self.worker.release())

    def outcome(self) -> TaskResult | Failure:
        """Wait for the last stage, and say what came of it."""
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
    """The future's result, or its error. Looks up now and then: some libraries' signal handlers keep Ctrl-C from ending a wait."""
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
    """Nothing to train; a publication that did not come to its end is tried again."""
    run_id = folder.root.name
    to = config.publish.to
    settled = folder.gate.is_file() and any(decision.to == to for decision in read_gate(folder.gate))
    failures = _publish(folder, config) if to is not None and not settled else []
    message = f"nothing to do: data and config are those of run {run_id}"
    run_logger().info("%s", message)
    return _ended(RunOutcome(run_id, folder, (), tuple(failures)), message)


def _not_begun(run_id: str, error: LorafleetError) -> State[Any]:
    run_logger().error("%s", error)
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
