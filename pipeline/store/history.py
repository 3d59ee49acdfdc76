"""What a run store knows over runs: which scores can be compared, how the data drifted, what the work cost. Draws nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from pipeline.errors import DataError
from pipeline.records import Column, MtebTaskRow, ScoreRow, ValueRow
from pipeline.store.lock import oldest_first
from pipeline.store.manifest import RunManifest, read_manifest
from pipeline.store.run_folder import RunFolder
from pipeline.store.tables import (
    mteb_tasks_of_run,
    read_mteb_tasks,
    read_scores,
    run_values,
    runs_in_history,
    scores_of_run,
    values_of_run,
)
from pipeline.store.values import find_value


@dataclass(frozen=True)
class RunFacts:
    """One run of the store."""

    run_id: str
    created_at: datetime | None
    """When it was finished; none where nothing of it but its id is left."""
    trained: tuple[str, ...]
    """MTEB tasks that it measured itself."""
    reused: tuple[str, ...]
    """MTEB tasks that it took over from an earlier run."""
    failed: tuple[str, ...] | None
    """None where its folder is gone: only that says so."""
    worker_seconds: float | None
    """Over its MTEB tasks; none, like the two below, where an older version ran them or all were taken over."""
    gpu_seconds: float | None
    peak_memory_bytes: int | None
    """Of its largest worker."""
    has_report: bool


@dataclass(frozen=True)
class Drift:
    """How the training labels moved from one run to the next."""

    total_variation: float
    """Half the sum of the differences of the shares: 0 for equal labels, 1 for wholly different ones."""
    new: tuple[str, ...]
    vanished: tuple[str, ...]


@dataclass(frozen=True)
class Point:
    """One MTEB task in one run."""

    run_id: str
    when: datetime
    """When the run was finished."""
    scores: Mapping[Column, ScoreRow]
    """Facts of the measurement, by column; empty for an adapter without a head."""
    values: tuple[ValueRow, ...]
    """Every measured number."""
    facts: MtebTaskRow | None
    """None where an older version ran it."""
    test_changed: bool
    """Its test data are not those of the run before: the two scores are of different exams."""
    drift: Drift | None
    """Against the newest run before it whose labels are known."""

    @property
    def reused_from(self) -> str | None:
        """The run that measured this, if not this one."""
        if not self.scores:
            return None if self.facts is None else self.facts.reused_from
        return next(row.reused_from for row in self.scores.values())

    def value(self, column: Column, metric: str = "accuracy") -> ValueRow | None:
        """The number of one column; None if it was not measured."""
        return find_value(self.values, column, metric)


@dataclass(frozen=True)
class TaskHistory:
    """One MTEB task over the runs that have it, oldest first; at least one."""

    name: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class StoreHistory:
    """A run store over runs."""

    runs: tuple[RunFacts, ...]
    """Newest first."""
    tasks: tuple[TaskHistory, ...]
    """By name."""
    num_older: int
    """Runs that were left out, because there are more than were asked for."""
    faults: tuple[str, ...]
    """One line per file that could not be read."""


def read_store(runs: Path, *, newest: int) -> StoreHistory:
    """Read the newest runs of a store. What is damaged is left out and said: one bad file must not hide all other runs."""
    every = runs_in_history(runs)
    shown = every[-newest:]
    faults: list[str] = []
    facts, scores, values, tasks = [], [], [], []
    for run_id in shown:
        try:
            of_run = read_scores(scores_of_run(runs, run_id))
            file = mteb_tasks_of_run(runs, run_id)
            of_tasks = read_mteb_tasks(file) if file.exists() else []
            numbers = run_values(runs, run_id, of_run)
            _check_run_id(scores_of_run(runs, run_id), run_id, of_run)
            _check_run_id(values_of_run(runs, run_id), run_id, numbers)
            _check_run_id(file, run_id, of_tasks)
        except DataError as error:
            faults.append(str(error))
            continue
        scores += of_run
        values += numbers
        tasks += of_tasks
        facts.append(_run_facts(runs, run_id, of_run, of_tasks))
    when = {run.run_id: run.created_at for run in facts if run.created_at is not None}
    return StoreHistory(
        tuple(reversed(facts)), task_histories(scores, values, tasks, when), len(every) - len(shown), tuple(faults)
    )


def task_histories(
    scores: Sequence[ScoreRow],
    values: Sequence[ValueRow],
    tasks: Sequence[MtebTaskRow],
    when: Mapping[str, datetime],
) -> tuple[TaskHistory, ...]:
    """Each MTEB task over the runs that have it.

    Args:
        scores: In any order, like ``values`` and ``tasks``.
        values: The numbers that the scores go with.
        tasks: Those of the runs that recorded them.
        when: When each run was finished.
    """
    changed = changed_test_data(scores)
    facts = {(row.mteb_task, row.run_id): row for row in tasks}
    rows: dict[tuple[str, str], dict[Column, ScoreRow]] = {}
    for row in scores:
        rows.setdefault((row.mteb_task, row.run_id), {})[row.column] = row
    numbers: dict[str, dict[str, list[ValueRow]]] = {}
    for value in values:
        numbers.setdefault(value.mteb_task, {}).setdefault(value.run_id, []).append(value)
    histories = []
    for name, by_run in sorted(numbers.items()):
        points: list[Point] = []
        before: MtebTaskRow | None = None
        for run_id in oldest_first(by_run):
            now = facts.get((name, run_id))
            known = now is not None and bool(now.label_shares)
            points.append(
                Point(
                    run_id=run_id,
                    when=when[run_id],
                    scores=rows.get((name, run_id), {}),
                    values=tuple(by_run[run_id]),
                    facts=now,
                    test_changed=(name, run_id) in changed,
                    drift=label_drift(before, now) if known and before is not None and now is not None else None,
                )
            )
            before = now if known else before
        histories.append(TaskHistory(name, tuple(points)))
    return tuple(histories)


def changed_test_data(scores: Sequence[ScoreRow]) -> frozenset[tuple[str, str]]:
    """MTEB task and run wherever the test data are not those of the run before that has the MTEB task; rows in any order.

    Runs of older versions know their test data only by the number of texts; the hash is compared with the newest one that is known.
    """
    by_run: dict[str, dict[str, ScoreRow]] = {}
    for row in scores:
        by_run.setdefault(row.run_id, {})[row.mteb_task] = row
    before: dict[str, tuple[int, str | None]] = {}  # MTEB task -> number and hash of its newest test texts so far
    changed = set()
    for run_id in oldest_first(by_run):
        for mteb_task, row in by_run[run_id].items():
            num_texts, sha256 = before.get(mteb_task, (row.num_texts, None))
            if row.num_texts != num_texts or (None not in (sha256, row.test_sha256) and row.test_sha256 != sha256):
                changed.add((mteb_task, run_id))
                sha256 = None  # what it is now is not known before a row says so
            before[mteb_task] = row.num_texts, row.test_sha256 or sha256
    return frozenset(changed)


def shares_of(point: Point) -> dict[str, float]:
    """Label -> its share of train; empty where they are not known."""
    return {row.label: row.share for row in point.facts.label_shares} if point.facts is not None else {}


def label_drift(before: MtebTaskRow, now: MtebTaskRow) -> Drift:
    """How the labels of train moved between two runs that know them."""
    old, new = ({row.label: row.share for row in facts.label_shares} for facts in (before, now))
    moved = sum(abs(old.get(label, 0.0) - new.get(label, 0.0)) for label in old.keys() | new.keys())
    return Drift(moved / 2, tuple(sorted(new.keys() - old.keys())), tuple(sorted(old.keys() - new.keys())))


def most_moved_labels(points: Sequence[Point], *, most: int) -> tuple[str, ...]:
    """The labels whose share of train spans the widest range over the runs, widest first; an absent label's share is 0."""
    shares = [shares for shares in map(shares_of, points) if shares]
    spans = {}
    for label in {label for of_run in shares for label in of_run}:
        values = [of_run.get(label, 0.0) for of_run in shares]
        spans[label] = (min(values) - max(values), -values[-1], label)  # of equal spans the more frequent first
    return tuple(sorted(spans, key=lambda label: spans[label])[:most])


def _check_run_id(file: Path, run_id: str, rows: Sequence[ScoreRow | ValueRow | MtebTaskRow]) -> None:
    if others := sorted({row.run_id for row in rows} - {run_id}):
        raise DataError(
            f"{file}: holds rows of run {', '.join(others)}; give it the name of its run again, or move it away"
        )


def _run_facts(runs: Path, run_id: str, scores: Sequence[ScoreRow], tasks: Sequence[MtebTaskRow]) -> RunFacts:
    folder = RunFolder(runs / run_id)
    manifest: RunManifest | None = None
    with suppress(DataError):  # pruned, or damaged: the history outlives the folder
        manifest = read_manifest(folder)
    origins = {row.mteb_task: row.reused_from for row in scores}
    own = [row for row in tasks if row.reused_from is None]
    times = (
        [*(row.created_at for row in tasks), *(row.created_at for row in scores)]
        if manifest is None
        else [manifest.created_at]
    )
    return RunFacts(
        run_id=run_id,
        created_at=max(times, default=None),
        trained=tuple(name for name, origin in origins.items() if origin is None),
        reused=tuple(name for name, origin in origins.items() if origin is not None),
        failed=None if manifest is None else tuple(failure.mteb_task for failure in manifest.failures),
        worker_seconds=sum(row.worker_seconds for row in own) if own else None,
        gpu_seconds=sum(row.gpu_seconds for row in own) if own else None,
        peak_memory_bytes=max((row.peak_memory_bytes for row in own), default=None),
        has_report=folder.report.is_file(),
    )
