"""The report of a run: one HTML page that loads nothing from the network. Equal records give equal pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from pipeline.evaluation.metrics import title_of
from pipeline.history.values import values_of
from pipeline.records import ClassificationResults, EpochRow, ReliabilityBin, TaskResult
from pipeline.reports.formatting import percent, utc, without_local_paths
from pipeline.reports.page import (
    ADAPTED,
    FROZEN,
    INK,
    OPEN_UP_TO,
    PAGE_WIDTH,
    PAPER,
    STYLE,
    duration,
    inline_svg,
    render_page,
    shorten,
)
from pipeline.reports.score_table import (
    HOW_IT_WAS_MADE,
    SCORE_HEADINGS,
    Accuracy,
    ScoreLine,
    ScoreTable,
    score_table,
    task_heading,
)
from pipeline.reports.summary import data_source, score_row, task_entry, warm_start_summary
from pipeline.reports.vector_figures import vector_panels
from pipeline.reports.vector_table import (
    DETAIL_HEADINGS,
    HOW_VECTORS_ARE_MEASURED,
    VECTOR_HEADINGS,
    vector_details,
    vector_rows,
)

_PANELS_WIDTH = 780


@dataclass(frozen=True)
class _TaskView:
    """Values of one MTEB task for the template."""

    result: TaskResult
    line: ScoreLine
    anchor: str
    panels: Markup
    source: str
    notes: tuple[str, ...]
    head_without_overlap: str
    metrics: str


@dataclass(frozen=True)
class _VectorView:
    """Values of one embedding adapter for the template."""

    result: TaskResult
    cells: tuple[str, ...]
    details: list[tuple[str, ...]]
    panels: Markup
    source: str
    notes: tuple[str, ...]


def render_report(results: Sequence[TaskResult], summary: ClassificationResults) -> str:
    """Render ``report.html``.

    Args:
        results: Results of the MTEB tasks in ``summary``, with intervals, curves, confusions and calibration.
        summary: Summary of the results.
    """
    table = score_table(summary, results)
    by_name = {result.mteb_task.name: result for result in results}
    tasks = [_view(by_name[line.task], line, number) for number, line in enumerate(table.lines) if line.task in by_name]
    return render_page(
        "report.html.j2",
        summary=summary,
        created_at=utc(summary.created_at),
        runtimes=_runtimes(results),
        task_heading=task_heading(results),
        headings=SCORE_HEADINGS[1:],
        table=table,
        rows=[(line, line.cells()) for line in table.lines],
        anchors={task.line.task: task.anchor for task in tasks},
        average=table.average_cells() if len(table.lines) > 1 else (),
        bars=_bars(table) if table.lines else Markup(),
        tasks=tasks,
        unfold=len(tasks) <= OPEN_UP_TO,
        vectors=_vector_views(results),
        vector_headings=VECTOR_HEADINGS,
        detail_headings=DETAIL_HEADINGS,
        how=(*(HOW_IT_WAS_MADE if table.lines or not results else ()), *_how_vectors(results)),
        busy=duration(sum(result.busy_seconds for result in results if result.reused_from is None)),
    )


def _vector_views(results: Sequence[TaskResult]) -> list[_VectorView]:
    shown = []
    for result in results:
        if not result.has_head:
            (cells,) = vector_rows([task_entry(result)]) or [(result.mteb_task.name,)]
            notes = tuple(without_local_paths(note) for note in result.data.notes)
            panels, source = vector_panels(result), data_source(result.mteb_task)
            shown.append(_VectorView(result, cells, vector_details(result), panels, source, notes))
    return shown


def _how_vectors(results: Sequence[TaskResult]) -> tuple[tuple[str, str], ...]:
    return () if all(result.has_head for result in results) else HOW_VECTORS_ARE_MEASURED


def _view(result: TaskResult, line: ScoreLine, number: int) -> _TaskView:
    head = score_row(result, "head")
    head_values = [row for row in values_of(result) if row.column == "head" and row.slice is None and row.width is None]
    parts = [f"{title_of(row.metric)} {percent(row.value)}" for row in head_values if row.metric != "accuracy"]
    return _TaskView(
        result=result,
        line=line,
        anchor=f"task-{number + 1}",
        panels=_panels(result),
        source=data_source(result.mteb_task),
        notes=(*(without_local_paths(note) for note in result.data.notes), *filter(None, [warm_start_summary(result)])),
        head_without_overlap=percent(None if head is None else head.accuracy_without_overlap),
        metrics=", ".join(parts),
    )


def _runtimes(results: Sequence[TaskResult]) -> list[str]:
    """Distinct runtimes of the results. Several only if results were reused from another run."""
    runtimes = [result.runtime for result in results]
    texts = [
        f"{r.device}, {r.dtype}, {r.attention} attention, {'compiled' if r.compiled else 'not compiled'}, "
        f"{r.threads} thread{'s' * (r.threads != 1)} per worker, {r.processor}"
        for r in runtimes
    ]
    return sorted(set(texts))


def _bars(table: ScoreTable) -> Markup:
    """Draw frozen against adapted for each protocol, with a tick for the majority class."""
    lines, row_height = table.lines, 44 if len(table.lines) <= OPEN_UP_TO else 30
    height, left = 92 + row_height * len(lines), 285
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(PAGE_WIDTH / 72, height / 72))
        pairs = (
            ("mteb few-shot", [(line.few_shot, line.lora_few_shot) for line in lines]),
            ("all training texts: probe against own head", [(line.probe, line.head) for line in lines]),
        )
        width = (PAGE_WIDTH - left - 60) / 2
        for column, (title, scores) in enumerate(pairs):
            box = ((left + column * (width + 30)) / PAGE_WIDTH, 34 / height, width / PAGE_WIDTH, (height - 92) / height)
            axes = figure.add_axes(box)
            _draw_pairs(axes, scores, [line.majority for line in lines])
            axes.set_title(title, pad=6)
            axes.set_yticks(
                range(len(lines)), labels=[shorten(line.task) for line in lines] if column == 0 else [""] * len(lines)
            )
        handles, names = figure.axes[0].get_legend_handles_labels()
        figure.legend(
            handles,
            names,
            loc="upper left",
            bbox_to_anchor=(left / PAGE_WIDTH, 1),
            ncols=3,
            fontsize=11,
            borderaxespad=0,
            handlelength=1.4,
        )
        return inline_svg(figure, "Accuracy in per cent per MTEB task, frozen encoder against adapted encoder")


def _draw_pairs(
    axes: Axes, scores: Sequence[tuple[Accuracy | None, Accuracy | None]], majority: Sequence[Accuracy | None]
) -> None:
    for side, (colour, name) in enumerate(((FROZEN, "frozen encoder"), (ADAPTED, "with the adapter"))):
        shown = [(row, pair[side]) for row, pair in enumerate(scores)]
        positions = [row + (side - 0.5) * 0.36 for row, score in shown if score]
        measured = [score for _, score in shown if score]
        axes.barh(positions, [100 * s.accuracy for s in measured], height=0.32, color=colour, label=name)
        below = [100 * max(s.accuracy - s.low, 0) if s.low is not None else 0 for s in measured]
        above = [100 * max(s.high - s.accuracy, 0) if s.high is not None else 0 for s in measured]
        axes.errorbar(
            [100 * s.accuracy for s in measured],
            positions,
            xerr=[below, above],
            fmt="none",
            color=INK,
            ecolor=INK,
            elinewidth=1.1,
            capsize=2.5,
        )
        for position, score, end in zip(positions, measured, above, strict=True):
            text = axes.text(100 * score.accuracy + end + 1, position, percent(score.accuracy), va="center", fontsize=9)
            text.set_in_layout(False)
    ticks = [(row, 100 * score.accuracy) for row, score in enumerate(majority) if score]
    label = "majority class"
    for row, position in ticks:
        axes.vlines(position, row - 0.44, row + 0.44, color=INK, linestyle=(0, (2, 1.5)), linewidth=1.2, label=label)
        label = "_"
    axes.set(xlim=(0, 106), ylim=(len(scores) - 0.5, -0.5), xticks=range(0, 101, 20))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f} %"))
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    axes.set_axisbelow(True)


def _panels(result: TaskResult) -> Markup:
    """Draw loss, accuracy and reliability of one MTEB task side by side."""
    height = 220
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(_PANELS_WIDTH / 72, height / 72))
        loss, accuracy, reliability = figure.subplots(1, 3)
        figure.subplots_adjust(
            left=56 / _PANELS_WIDTH, right=1 - 8 / _PANELS_WIDTH, bottom=46 / height, top=1 - 28 / height, wspace=0.32
        )
        searched = [row for row in result.epochs if row.validation_accuracy is not None]
        refit = [row for row in result.epochs if row.validation_accuracy is None]
        _draw_loss(loss, searched, refit)
        _draw_accuracy(accuracy, searched, result)
        for axes in (loss, accuracy):
            last = max(row.epoch for row in result.epochs)
            first = 0 if axes is accuracy and searched and result.start_accuracy is not None else 1
            axes.set_xlim(first - 0.3, last + 0.3)
            axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
            axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
            axes.grid(axis="y")
        _draw_reliability(reliability, result.calibration.reliability if result.calibration else ())
        return inline_svg(
            figure, f"{result.mteb_task.name}: training loss and accuracy per epoch, reliability of the confidences"
        )


def _draw_loss(axes: Axes, searched: Sequence[EpochRow], refit: Sequence[EpochRow]) -> None:
    for rows, style in ((searched, "-"), (refit, "--" if searched else "-")):
        axes.plot(
            [row.epoch for row in rows],
            [row.train_loss for row in rows],
            style,
            color=ADAPTED,
            marker="o",
            markersize=4,
        )
    axes.set(title="training loss" + (" (dashed: refit)" if searched and refit else ""), xlabel="epoch")


def _draw_accuracy(axes: Axes, rows: Sequence[EpochRow], result: TaskResult) -> None:
    """Draw the accuracy over the epochs, including the start of training if it was measured."""
    axes.set(title=f"accuracy on {'test' if result.selected_on == 'test' else 'validation'}, per cent", xlabel="epoch")
    if not rows:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color=INK)
        axes.set_yticks([])
        return
    epochs, scores = [row.epoch for row in rows], [100 * (row.validation_accuracy or 0.0) for row in rows]
    if result.start_accuracy is not None:
        epochs, scores = [0, *epochs], [100 * result.start_accuracy, *scores]
    axes.plot(epochs, scores, color=ADAPTED, marker="o", markersize=4, markerfacecolor=PAPER)
    for epoch, score in zip(epochs, scores, strict=True):
        if epoch == result.best_epoch:
            axes.plot([epoch], [score], color=ADAPTED, marker="o", markersize=7)
            last = len(epochs) > 1 and epoch == epochs[-1]
            axes.annotate(
                f"{score:.1f}",
                (epoch, score),
                xytext=(0, 7),
                textcoords="offset points",
                ha="right" if last else "center",
            )
    low, high = min(scores), max(scores)
    room = max((high - low) * 0.3, 0.5)
    axes.set_ylim(low - room, min(high + room, 110))


def _draw_reliability(axes: Axes, bins: Sequence[ReliabilityBin]) -> None:
    axes.plot([0, 100], [0, 100], color=INK, linewidth=0.8, linestyle=(0, (3, 2)))
    total = sum(b.num_texts for b in bins) or 1
    shown = [b for b in bins if b.num_texts]
    axes.plot([100 * b.confidence for b in shown], [100 * b.accuracy for b in shown], color=ADAPTED, linewidth=1)
    sizes = [12 + 160 * b.num_texts / total for b in shown]
    axes.scatter(
        [100 * b.confidence for b in shown], [100 * b.accuracy for b in shown], s=sizes, color=ADAPTED, linewidth=0
    )
    axes.set(title="accuracy at confidence, test", xlabel="confidence, per cent", xlim=(0, 103), ylim=(0, 103))
    axes.set_xticks([0, 25, 50, 75, 100])
    axes.set_yticks([0, 25, 50, 75, 100])
    axes.grid()
