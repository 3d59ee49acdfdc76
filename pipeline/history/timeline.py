"""History over the runs of a store: comparable scores, drift of the data, cost of the work. Draws nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from pipeline.errors import DataError
from pipeline.history.tables import (
    mteb_tasks_of_run,
    read_mteb_tasks,
    read_scores,
    run_values,
    runs_in_history,
    scores_of_run,
    values_of_run,
)
from pipeline.history.values import find_value, main_value
from pipeline.records import Column, MtebTaskRow, ScoreRow, ValueColumn, ValueRow
from pipeline.store.lock import oldest_first
from pipeline.store.manifest import RunManifest, read_manifest
from pipeline.store.run_folder import RunFolder

_OF_VECTORS = ("frozen", "adapted")


@dataclass(frozen=True)
class RunFacts:
    """One run of the store."""

    run_id: str
    created_at: datetime | None
    """Time at which it finished; None if only its id is left."""
    trained: tuple[str, ...]
    """MTEB tasks that this run measured itself."""
    reused: tuple[str, ...]
    """MTEB tasks taken over from an earlier run."""
    failed: tuple[str, ...] | None
    """MTEB tasks that failed; None if the run folder, which is the only source, was deleted."""
    worker_seconds: float | None
    """Sum over the MTEB tasks measured by this run. None if there are none, or an older version did not record it."""
    gpu_seconds: float | None
    """GPU time of the workers, in seconds, as ``worker_seconds``."""
    peak_memory_bytes: int | None
    """Peak of the largest worker. None as for ``worker_seconds``."""
    has_report: bool


@dataclass(frozen=True)
class Drift:
    """Change of the training labels between two runs."""

    total_variation: float
    """Total variation distance between the label shares: 0 if they are equal, 1 if no label is shared."""
    new: tuple[str, ...]
    """Labels that only the later run has, sorted."""
    vanished: tuple[str, ...]
    """Labels that only the earlier run has, sorted."""


@dataclass(frozen=True)
class Point:
    """One MTEB task in one run."""

    run_id: str
    when: datetime
    """Time at which the run finished."""
    scores: Mapping[Column, ScoreRow]
    """Facts of the measurement, by column; empty for an adapter without a head."""
    values: tuple[ValueRow, ...]
    """Every measured number."""
    facts: MtebTaskRow | None
    """Data and cost; None if an older version ran it."""
    test_changed: bool
    """Whether the test data differ from those of the previous run, so that the two scores are not comparable."""
    drift: Drift | None
    """Drift since the newest earlier run with known labels; None if either run's labels are unknown."""

    @property
    def reused_from(self) -> str | None:
        """Id of the earlier run that measured these numbers; None if this run did."""
        if not self.scores:
            return None if self.facts is None else self.facts.reused_from
        return next(row.reused_from for row in self.scores.values())

    def value(self, column: ValueColumn) -> ValueRow | None:
        """Accuracy of a column of the score table, or main metric of vectors; None if it was not measured."""
        return main_value(self.values, column) if column in _OF_VECTORS else find_value(self.values, column)


@dataclass(frozen=True)
class TaskHistory:
    """One MTEB task over the runs that have it."""

    name: str
    points: tuple[Point, ...]
    """At least one, oldest first."""


@dataclass(frozen=True)
class StoreHistory:
    """History of a run store."""

    runs: tuple[RunFacts, ...]
    """Runs, newest first."""
    tasks: tuple[TaskHistory, ...]
    """MTEB tasks, sorted by name."""
    num_older: int
    """Number of older runs beyond the requested limit."""
    faults: tuple[str, ...]
    """One message per unreadable file."""


def read_store(runs: Path, *, newest: int) -> StoreHistory:
    """Read the newest runs of a store. Damaged files are reported in ``faults`` and do not hide other runs.

    Args:
        runs: Run store.
        newest: Largest number of runs to read.
    """
    every = runs_in_history(runs)
    shown = every[-newest:]
    faults: list[str] = []
    facts, scores, values, tasks = [], [], [], []
    for run_id in shown:
        try:
            score_rows = read_scores(scores_of_run(runs, run_id))
            file = mteb_tasks_of_run(runs, run_id)
            task_rows = read_mteb_tasks(file) if file.exists() else []
            value_rows = run_values(runs, run_id, score_rows)
            _check_run_id(scores_of_run(runs, run_id), run_id, score_rows)
            _check_run_id(values_of_run(runs, run_id), run_id, value_rows)
            _check_run_id(file, run_id, task_rows)
        except DataError as error:
            faults.append(str(error))
            continue
        scores += score_rows
        values += value_rows
        tasks += task_rows
        facts.append(_run_facts(runs, run_id, score_rows, task_rows))
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
    """Group score rows into one history per MTEB task.

    Args:
        scores: Score rows of all runs, in any order.
        values: Values of all runs, in any order.
        tasks: Task rows of the runs that recorded them, in any order.
        when: Run id -> time at which the run finished.
    """
    changed = changed_test_data(scores, tasks)
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
        previous: MtebTaskRow | None = None
        for run_id in oldest_first(by_run):
            current = facts.get((name, run_id))
            has_labels = current is not None and bool(current.label_shares)
            points.append(
                Point(
                    run_id=run_id,
                    when=when[run_id],
                    scores=rows.get((name, run_id), {}),
                    values=tuple(by_run[run_id]),
                    facts=current,
                    test_changed=(name, run_id) in changed,
                    drift=label_drift(previous, current) if has_labels and previous and current else None,
                )
            )
            previous = current if has_labels else previous
        histories.append(TaskHistory(name, tuple(points)))
    return tuple(histories)


def changed_test_data(scores: Sequence[ScoreRow], tasks: Sequence[MtebTaskRow] = ()) -> frozenset[tuple[str, str]]:
    """Find the points at which the test data changed, compared with the previous run of the same MTEB task.

    Older versions recorded only the number of test texts. A hash is compared with the newest earlier hash.

    Args:
        scores: Score rows, in any order.
        tasks: Task rows, in any order. Tasks without a score, those of vectors, are looked up here.
    Returns:
        Pairs of MTEB task and run id.
    """
    by_run: dict[str, dict[str, _TestData]] = {}
    for task in tasks:
        by_run.setdefault(task.run_id, {})[task.mteb_task] = _TestData(task.num_test, task.test_sha256)
    for score in scores:
        by_run.setdefault(score.run_id, {})[score.mteb_task] = _TestData(score.num_texts, score.test_sha256)
    previous: dict[str, tuple[int, str | None]] = {}  # MTEB task -> number and hash of its newest test texts so far
    changed = set()
    for run_id in oldest_first(by_run):
        for mteb_task, row in by_run[run_id].items():
            num_texts, sha256 = previous.get(mteb_task, (row.num_texts, None))
            if row.num_texts != num_texts or (None not in (sha256, row.test_sha256) and row.test_sha256 != sha256):
                changed.add((mteb_task, run_id))
                sha256 = None  # unknown until a later row records it
            previous[mteb_task] = row.num_texts, row.test_sha256 or sha256
    return frozenset(changed)


class _TestData(NamedTuple):
    """Size and hash of the test data of one task in one run."""

    num_texts: int
    test_sha256: str | None


def shares_of(point: Point) -> dict[str, float]:
    """Map each label to its share of the training texts; empty if unknown."""
    return {row.label: row.share for row in point.facts.label_shares} if point.facts is not None else {}


def label_drift(previous: MtebTaskRow, current: MtebTaskRow) -> Drift:
    """Compare the training labels of two runs that recorded them."""
    old, new = ({row.label: row.share for row in facts.label_shares} for facts in (previous, current))
    moved = sum(abs(old.get(label, 0.0) - new.get(label, 0.0)) for label in old.keys() | new.keys())
    return Drift(moved / 2, tuple(sorted(new.keys() - old.keys())), tuple(sorted(old.keys() - new.keys())))


def most_moved_labels(points: Sequence[Point], *, most: int) -> tuple[str, ...]:
    """Select the labels whose share of the training texts varies most over the runs.

    Args:
        points: Points of one MTEB task. A label that is absent from a run has share 0 there.
        most: Largest number of labels to return.
    Returns:
        Labels, the widest range of shares first. Ties go to the more frequent label.
    """
    shares = [shares for shares in map(shares_of, points) if shares]
    spans = {}
    for label in {label for by_label in shares for label in by_label}:
        values = [by_label.get(label, 0.0) for by_label in shares]
        spans[label] = (min(values) - max(values), -values[-1], label)
    return tuple(sorted(spans, key=lambda label: spans[label])[:most])


def _check_run_id(file: Path, run_id: str, rows: Sequence[ScoreRow | ValueRow | MtebTaskRow]) -> None:
    if others := sorted({row.run_id for row in rows} - {run_id}):
        raise DataError(f"{file}: holds rows of run {', '.join(others)}; rename it to match its run, or move it away")


def _run_facts(runs: Path, run_id: str, scores: Sequence[ScoreRow], tasks: Sequence[MtebTaskRow]) -> RunFacts:
    folder = RunFolder(runs / run_id)
    manifest: RunManifest | None = None
    with suppress(DataError):  # the history outlives a pruned or damaged folder
        manifest = read_manifest(folder)
    origins = {task.mteb_task: task.reused_from for task in tasks}
    origins |= {row.mteb_task: row.reused_from for row in scores}
    measured = [row for row in tasks if row.reused_from is None]
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
        worker_seconds=sum(row.worker_seconds for row in measured) if measured else None,
        gpu_seconds=sum(row.gpu_seconds for row in measured) if measured else None,
        peak_memory_bytes=max((row.peak_memory_bytes for row in measured), default=None),
        has_report=folder.report.is_file(),
    )
