"""Flow of a search: check, try settings on validation, evaluate the winner and the default on test."""

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

from flows.train_adapters import RunOutcome, train_adapters
from pipeline.config import SearchedConfig, load_config_of, select_task
from pipeline.errors import InputError, LorafleetError, first_line
from pipeline.history.values import main_value, values_of
from pipeline.printable import counted
from pipeline.records import TaskResult
from pipeline.search.report import Outcome, TestScore, default_of, winner_of, write_config
from pipeline.search.study import Study
from pipeline.search.trials import SearchPlan, TrialFiles, TrialRecord
from pipeline.store.files import read_record
from pipeline.store.lock import hold_store, store_folder
from tasks import search_stages
from tasks.cancelling import RunCancelledError, interrupted_if_cancelled
from tasks.fleet import Fleet
from tasks.fleet_worker import FleetWorker
from tasks.log import run_logger
from tasks.stages import with_policy

_LOOK_UP_SECONDS = 0.5
_THREADS: ThreadPoolTaskRunner[Any] = ThreadPoolTaskRunner(max_workers=64)  # threads only wait for the workers


@dataclass(frozen=True)
class SearchOutcome:
    """Outcome of a search."""

    folder: Path | None
    """None if the search was refused, or no trial was finished."""
    fault: str | None
    """What failed, in one line."""
    is_user_fault: bool = False


@flow(name="search-settings", task_runner=_THREADS)  # type: ignore[arg-type]
def search_settings(
    config: str,
    overrides: list[str] | None = None,
    mteb_task: str | None = None,
    runs: str = "runs",
    searches: str = "searches",
) -> State[Any]:
    """Search for settings of one data set on validation, then evaluate the winner and the default on test, once.

    Args:
        config: A TOML file on the machine that runs the flow, or a preset.
        overrides: Keys of the config to override, each as KEY=VALUE.
        mteb_task: MTEB task of the config. Leave empty if it has one only.
        runs: Run store, where the trainings are kept.
        searches: Folder of the searches.
    """
    search_id = datetime.now(UTC).strftime("%Y%m%d-%H%M%S-") + secrets.token_hex(2)
    try:
        whole = load_config_of(SearchedConfig, config, overrides=tuple(overrides or ()))
        values = select_task(whole, mteb_task, command="search")
        store, folder = store_folder(runs), store_folder(searches) / search_id
        if store.resolve() == folder.parent.resolve():
            raise InputError(f"runs and searches: expected two folders, found {runs} for both")
        with hold_store(folder.parent, search_id):
            with interrupted_if_cancelled(), hold_store(store, search_id):
                plan, trials, fault = _try(values, store, folder.parent)
            if not any(trial.state == "finished" for trial in trials):
                why = "no trial was finished in the time; raise search.minutes"
                if any(trial.state == "failed" for trial in trials):
                    why = "every trial diverged; lower train.learning_rate, or the range of search.learning_rate"
                return _failed(SearchOutcome(None, fault or why))
            return _evaluate(plan, trials, fault, runs=str(store), folder=folder)
    except RunCancelledError as error:
        return Cancelled(message=str(error))
    except LorafleetError as error:
        return _failed(SearchOutcome(None, str(error), is_user_fault=isinstance(error, InputError)))


def _try(config: SearchedConfig, runs: Path, searches: Path) -> tuple[SearchPlan, list[TrialRecord], str | None]:
    """Run the trials that are not known yet.

    Returns: The plan, the trials, and what failed besides trials that diverged.
    Raises: LorafleetError: a check failed.
    """
    wanted = 1 if config.compute.workers == "auto" else config.compute.workers
    with Fleet(config.compute, num_tasks=wanted) as fleet:
        first = fleet.worker()
        plan = with_policy(search_stages.check_search, config.compute)(config, first, runs)
        if isinstance(plan, LorafleetError):
            raise plan
        trials = _Trials(plan, TrialFiles(searches / ".work" / plan.key))
        at_once = min(wanted, fleet.num_workers)
        trials.run([first, *(fleet.worker() for _ in range(at_once - 1))])
        return plan, trials.done, trials.fault


class _Trials:
    """The trials of a search, as many at a time as there are workers."""

    def __init__(self, plan: SearchPlan, files: TrialFiles) -> None:
        self._plan, self._files = plan, files
        self._most = plan.config.search.trials
        minutes = plan.config.search.minutes
        self._deadline = float("inf") if minutes is None else time.monotonic() + 60 * minutes
        known = files.known()[: self._most]
        self._study = Study(plan.config, known, lambda rate, values: plan.spec(rate, values).key)
        self._interrupted = [trial for trial in known if trial.state == "running"]
        self._number = len(known)
        self._done = {trial.number: trial for trial in known if trial.state != "running"}
        self.fault: str | None = None
        """First failure of a trial, other than that it diverged."""
        if known:
            run_logger().info("%s known from an earlier search", counted(len(known), "trial"))

    @property
    def done(self) -> list[TrialRecord]:
        """Trials that have ended, by their number."""
        return [self._done[number] for number in sorted(self._done)]

    def run(self, workers: list[FleetWorker]) -> None:
        """Run trials until their number or the time is reached, or until one fails."""
        running: dict[PrefectFuture[Any], FleetWorker] = {}
        idle = list(workers)
        while True:
            while idle and (trial := self._next()) is not None:
                stage = with_policy(search_stages.run_trial, self._plan.config.compute)
                worker = idle.pop()
                future = stage.submit(trial, self._plan, self._study, self._files, worker)
                running[future] = worker
            if not running:
                return
            for future in _ended(list(running)):
                idle.append(running.pop(future))
                self._take(future.result(raise_on_failure=False))

    def _next(self) -> TrialRecord | None:
        """The next trial. None if no further one is to start."""
        if self.fault is not None or time.monotonic() > self._deadline:
            return None
        if self._interrupted:
            return self._interrupted.pop(0)
        if self._number >= self._most:
            return None
        trial = self._study.ask()
        if trial is None:
            run_logger().info("every combination of the values has been tried")
            self._number = self._most
            return None
        self._number += 1
        self._files.write(trial)
        return trial

    def _take(self, result: Any) -> None:
        if isinstance(result, TrialRecord):
            self._done[result.number] = result
        elif self.fault is None:
            text = first_line(result)
            self.fault = text if isinstance(result, LorafleetError) else f"{type(result).__name__}: {text}"
            run_logger().error("a trial failed: %s", self.fault)


def _ended(futures: list[PrefectFuture[Any]]) -> list[PrefectFuture[Any]]:
    """Wait until some of the futures have ended. Polls, because a wait without a timeout may not see Ctrl-C."""
    while True:
        with suppress(TimeoutError):
            futures[0].wait(timeout=_LOOK_UP_SECONDS)
        if ended := [future for future in futures if future.state.is_final()]:
            return ended


def _evaluate(plan: SearchPlan, trials: list[TrialRecord], fault: str | None, *, runs: str, folder: Path) -> State[Any]:
    """Evaluate the winner and the configuration as it was on test, each in an ordinary run, and write the results."""
    winner, default = winner_of(trials), default_of(trials)
    folder.mkdir()
    own = plan.config
    write_config(folder / "best.toml", plan.config_of(winner.learning_rate, winner.values))
    write_config(folder / "default.toml", own.with_values(own.train.learning_rate, {}))
    faults = [fault] if fault else []
    found: dict[str, TestScore] = {}
    for name, trial in (("best.toml", winner), ("default.toml", default)):
        if trial is not None and trial.state == "finished" and trial.key not in found:
            score = _on_test(folder / name, plan.mteb_task.name, runs)
            if isinstance(score, TestScore):
                found[trial.key] = score
            else:
                faults.append(score)
    outcome = Outcome(
        winner.metric or "score", found.get(winner.key), None if default is None else found.get(default.key)
    )
    search_stages.write_search(folder, plan, trials, outcome)
    if faults:
        return Failed(message=faults[0], data=SearchOutcome(folder, faults[0]))
    return Completed(message=f"{counted(len(trials), 'trial')}, best {winner.number}", data=SearchOutcome(folder, None))


def _on_test(config: Path, name: str, runs: str) -> TestScore | str:
    """Run a config, whose training is finished already, and read its main score on test. Or what failed."""
    state: State[Any] = train_adapters(str(config), runs=runs, return_state=True)
    if state.is_cancelled():
        raise RunCancelledError("the run was cancelled; finished work is kept")
    outcome: Any = state.result(raise_on_failure=False)
    if not isinstance(outcome, RunOutcome):
        return f"{config.name}: {first_line(outcome)}"
    if outcome.failures or outcome.folder is None:
        return f"{config.name}: {outcome.failures[0].reason}"
    result = read_record(outcome.folder.task(name).result, TaskResult)
    row = main_value(values_of(result), "head" if result.has_head else "adapted")
    assert row is not None, "every result has a main score"
    return TestScore(row.metric, row.value, row.low, row.high, result.run_id)


def _failed(outcome: SearchOutcome) -> State[Any]:
    run_logger().error("error: %s", outcome.fault)
    return Failed(message=f"nothing was found: {outcome.fault}", data=outcome)
