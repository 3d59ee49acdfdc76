"""The page over all runs of a store: scores, data drift, time and memory. Equal stores give equal pages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from markupsafe import Markup

from pipeline.evaluation.metrics import title_of
from pipeline.history.timeline import RunFacts, StoreHistory, TaskHistory, read_store
from pipeline.records import ScoreRow, ValueColumn
from pipeline.reports.formatting import percent, points, utc
from pipeline.reports.history_figure import draw_history
from pipeline.reports.page import (
    OPEN_UP_TO,
    duration,
    render_page,
    shorten,
)
from pipeline.store.files import write_atomically

NEWEST_RUNS = 104
"""Maximum number of runs on the page: two years of weekly runs."""

_CHANGES_SHOWN = 8
_NAMES_SHOWN = 5


@dataclass(frozen=True)
class _TaskView:
    """Values of one MTEB task for the template."""

    name: str
    anchor: str
    newest: str
    figure: Markup
    changes: tuple[str, ...]
    num_more_changes: int


@dataclass(frozen=True)
class _Few:
    """Names of a few MTEB tasks, or the number of many."""

    text: str
    names: str
    """All names, shown when the pointer rests on the text."""


@dataclass(frozen=True)
class _RunView:
    """A row of the table of runs. ``–`` stands for unknown values."""

    run_id: str
    link: str | None
    when: str
    trained: _Few
    reused: _Few
    failed: _Few
    worker_time: str
    gpu_time: str
    peak_memory: str


def write_history_page(runs: Path) -> Path:
    """Write ``history.html`` of a run store.

    Returns: Path of the file.
    """
    path = runs / "history.html"
    write_atomically(path, render_history(read_store(runs, newest=NEWEST_RUNS)))
    return path


def render_history(history: StoreHistory) -> str:
    """Render the page as HTML."""
    tasks = [_task_view(task, number) for number, task in enumerate(history.tasks, start=1)]
    return render_page(
        "history.html.j2",
        runs=[_run_view(run) for run in history.runs],
        tasks=tasks,
        unfold=len(tasks) <= OPEN_UP_TO,
        num_older=history.num_older,
        faults=history.faults,
    )


def _run_view(run: RunFacts) -> _RunView:
    return _RunView(
        run_id=run.run_id,
        link=f"{quote(run.run_id)}/report.html" if run.has_report else None,
        when="–" if run.created_at is None else utc(run.created_at),
        trained=_few(run.trained),
        reused=_few(run.reused),
        failed=_Few("?", "the run folder is gone") if run.failed is None else _few(run.failed, most=_NAMES_SHOWN),
        worker_time="–" if run.worker_seconds is None else duration(run.worker_seconds),
        gpu_time="–" if not run.gpu_seconds else duration(run.gpu_seconds),
        peak_memory="–" if run.peak_memory_bytes is None else f"{run.peak_memory_bytes / 1e9:.1f} GB",
    )


def _task_view(task: TaskHistory, number: int) -> _TaskView:
    changes = list(_changes(task))
    return _TaskView(
        name=task.name,
        anchor=f"task-{number}",
        newest=_newest(task),
        figure=draw_history(task),
        changes=tuple(changes[:_CHANGES_SHOWN]),
        num_more_changes=max(0, len(changes) - _CHANGES_SHOWN),
    )


def _newest(task: TaskHistory) -> str:
    """Score and data of the newest run, in a few words."""
    now, previous = task.points[-1], task.points[-2] if len(task.points) > 1 else None
    parts = []
    column: ValueColumn = "adapted" if now.value("adapted") is not None else "head"
    if (head := now.value(column)) is not None:
        name = "head" if column == "head" else f"adapted, {title_of(head.metric)}"
        interval = "" if head.low is None else f" ({percent(head.low)}–{percent(head.high)})"
        parts.append(f"{name} {percent(head.value)}{interval}")
        if now.test_changed:
            parts.append("test data differ from the previous run")
        elif now.reused_from is not None:
            parts.append(f"reused from run {now.reused_from}")
        elif previous is not None and (earlier := previous.value(column)) is not None:
            parts.append(f"{points(head.value - earlier.value)} against the previous run")
    if now.facts is not None:
        size = f"{now.facts.num_train:,} training and {now.facts.num_test:,} test"
        classes = now.facts.num_classes
        parts.append(f"{size} texts, {classes} classes" if classes else f"{size} examples")
    return f"newest of {len(task.points)}, {now.when:%Y-%m-%d}: {', '.join(parts)}"


def _changes(task: TaskHistory) -> Iterator[str]:
    """Changes from run to run, one line per run, newest first."""
    for previous, now in reversed(list(zip(task.points, task.points[1:], strict=False))):
        facts = []
        if now.test_changed:
            old, new = (point.values[0].num_texts for point in (previous, now))
            texts = f"{new:,} texts" + (" as before" if old == new else f", before {old:,}")
            facts.append(f"test data changed ({texts}), so scores before and after cannot be compared")
        if now.drift is not None and now.drift.new:
            facts.append(f"new {_plural('label', now.drift.new)} {_names(now.drift.new)}")
        if now.drift is not None and now.drift.vanished:
            facts.append(f"without {_plural('label', now.drift.vanished)} {_names(now.drift.vanished)}")
        old_encoder, new_encoder = (next(iter(point.scores.values()), None) for point in (previous, now))
        if old_encoder and new_encoder and _encoder_of(old_encoder) != _encoder_of(new_encoder):
            facts.append(f"another encoder: {new_encoder.encoder} at {new_encoder.encoder_revision[:19]}")
        if facts:
            yield f"{now.when:%Y-%m-%d %H:%M}, run {now.run_id}: {'; '.join(facts)}"


def _encoder_of(row: ScoreRow) -> tuple[str, str]:
    return row.encoder, row.encoder_revision


def _few(names: Sequence[str], *, most: int = 2) -> _Few:
    return _Few(", ".join(names) or "–" if len(names) <= most else str(len(names)), ", ".join(names))


def _plural(word: str, names: Sequence[str]) -> str:
    return word + "s" * (len(names) != 1)


def _names(names: Sequence[str]) -> str:
    more = len(names) - _NAMES_SHOWN
    return ", ".join(shorten(name) for name in names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
