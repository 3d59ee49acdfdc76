"""Flow of a comparison: check, train each arm, score all of them together."""

from __future__ import annotations

import secrets
import time
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

from pipeline.compare.files import ArmResult, ComparisonFolder
from pipeline.compare.plan import ArmSpec, ComparisonPlan
from pipeline.config import ComparisonConfig, load_config_of, select_task
from pipeline.errors import InputError, LorafleetError, first_line
from pipeline.printable import counted, printable
from pipeline.records import Failure
from pipeline.store.lock import hold_store, store_folder
from tasks import compare_stages
from tasks.cancelling import RunCancelledError, interrupted_if_cancelled
from tasks.fleet import Fleet
from tasks.fleet_worker import FleetWorker
from tasks.log import run_logger
from tasks.stages import with_policy

_LOOK_UP_SECONDS = 0.5
_THREADS: ThreadPoolTaskRunner[Any] = ThreadPoolTaskRunner(max_workers=64)  # threads only wait for the workers


@dataclass(frozen=True)
class ComparisonOutcome:
    """Outcome of a comparison."""

    folder: ComparisonFolder | None
    """Folder; None if the comparison was refused, or no arm was finished."""
    failures: tuple[Failure, ...]


@flow(name="compare-arms", task_runner=_THREADS)  # type: ignore[arg-type]
def compare_arms(
    config: str,
    overrides: list[str] | None = None,
    mteb_task: str | None = None,
    comparisons: str = "comparisons",
    force: bool = False,
) -> State[Any]:
    """Compare ways to train an encoder on one data set. A failed arm fails the flow run, after the others have ended.

    Args:
        config: A TOML file on the machine that runs the flow, or a preset.
        overrides: Keys of the config to override, each as KEY=VALUE.
        mteb_task: MTEB task of the config to learn. Leave empty if it has one only.
        comparisons: Folder of the comparisons.
        force: Train again what an earlier comparison has finished with the same inputs.
    """
    run_id = datetime.now(UTC).strftime("%Y%m%d-%H%M%S-") + secrets.token_hex(2)
    try:
        whole = load_config_of(ComparisonConfig, config, overrides=tuple(overrides or ()))
        values = select_task(whole, mteb_task, command="compare")
        store = store_folder(comparisons)
        with interrupted_if_cancelled(), hold_store(store, run_id):
            return _run(values, store, run_id, force=force)
    except RunCancelledError as error:
        return Cancelled(message=str(error))
    except InputError as error:
        return _not_begun(error)


def _run(config: ComparisonConfig, store: Path, run_id: str, *, force: bool) -> State[Any]:
    started = time.monotonic()
    folder = ComparisonFolder(store / run_id)
    with Fleet(config.compute, num_tasks=1) as fleet:  # an arm after the other, each with all cores or a GPU
        plan = with_policy(compare_stages.check_comparison, config.compute)(config, fleet.worker(), store, run_id)
        if isinstance(plan, LorafleetError):
            return _not_begun(plan)
        reused = [] if force else compare_stages.reuse_arms(plan, folder)
        done = {result.arm for result in reused}
        outcomes = [*reused, *_fan_out(plan, [spec for spec in plan.arms if spec.arm not in done], fleet)]
        order = {arm: number for number, arm in enumerate(config.compare.arms)}
        results = sorted((o for o in outcomes if isinstance(o, ArmResult)), key=lambda result: order[result.arm])
        failures = tuple(o for o in outcomes if isinstance(o, Failure))
        if results:
            compare_stages.collect(plan, results, failures, folder, time.monotonic() - started)
        outcome = ComparisonOutcome(folder if results else None, failures)
    message = f"{counted(len(results) - len(reused), 'arm')} trained, {len(reused)} unchanged"
    if not failures:
        return Completed(message=message, data=outcome)
    failed = ", ".join(f"{failure.stage} ({failure.reason})" for failure in failures)
    return Failed(message=printable(f"{len(failures)} of {len(plan.arms)} failed: {failed}"), data=outcome)


def _fan_out(plan: ComparisonPlan, specs: list[ArmSpec], fleet: Fleet) -> list[ArmResult | Failure]:
    """Run each arm in a worker of its own. A failed arm does not affect the others."""
    compute = plan.config.compute
    futures: list[tuple[ArmSpec, PrefectFuture[Any]]] = []
    for spec in specs:
        worker = fleet.worker()
        future = with_policy(compare_stages.run_arm, compute).submit(spec, worker, compute.timeout_seconds)
        future.add_done_callback(_releasing(worker))
        futures.append((spec, future))
    return [_outcome(spec, future) for spec, future in futures]


def _releasing(worker: FleetWorker) -> Any:
    return lambda _: worker.release()


def _outcome(spec: ArmSpec, future: PrefectFuture[Any]) -> ArmResult | Failure:
    """Wait for an arm, and return its result or the failure.

    Polls, because some libraries' signal handlers keep Ctrl-C from interrupting a wait without a timeout.
    """
    while True:
        with suppress(TimeoutError):
            result = future.result(timeout=_LOOK_UP_SECONDS, raise_on_failure=False)
            break
    if isinstance(result, ArmResult):
        return result
    text = first_line(result)
    reason = text if isinstance(result, LorafleetError) else f"{type(result).__name__}: {text}"
    run_logger().error("%s failed: %s", spec.arm, reason)
    return Failure(
        mteb_task=spec.mteb_task.name, stage=spec.arm, reason=reason, user_fault=isinstance(result, InputError)
    )


def _not_begun(error: LorafleetError) -> State[Any]:
    run_logger().error("error: %s", error)
    failure = Failure(mteb_task="", stage="preflight", reason=str(error), user_fault=isinstance(error, InputError))
    return Failed(message=f"nothing was compared: {error}", data=ComparisonOutcome(None, (failure,)))
