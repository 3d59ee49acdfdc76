"""Figures of an embedding adapter: learning curve, score by width, similarities of the pairs, and ROC."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pipeline.evaluation.metrics import title_of
from pipeline.history.values import values_of
from pipeline.records import SimilarityCounts, TaskResult, ValueRow
from pipeline.reports.page import ADAPTED, FROZEN, INK, PAGE_WIDTH, PAPER, STYLE, inline_svg
from pipeline.reports.summary import selection_score

_HEIGHT = 230
_COLOURS = {"frozen": FROZEN, "adapted": ADAPTED}
_SHOWN_BINS = 40


def vector_panels(result: TaskResult) -> Markup:
    """Draw the panels that the task's numbers allow, side by side."""
    panels: dict[str, Callable[[Axes], None]] = {"learning curve": lambda axes: _draw_curve(axes, result)}
    if any(row.width is not None for row in _main_values(result)):
        panels["score by width"] = lambda axes: _draw_widths(axes, _main_values(result))
    if result.similarities:
        panels["similarities of the pairs"] = lambda axes: _draw_similarities(axes, result.similarities)
        if {counts.group for counts in result.similarities} == {"label 0", "label 1"}:
            panels["ROC"] = lambda axes: _draw_roc(axes, result.similarities)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(PAGE_WIDTH / 72, _HEIGHT / 72))
        figure.subplots_adjust(
            left=56 / PAGE_WIDTH, right=1 - 8 / PAGE_WIDTH, bottom=46 / _HEIGHT, top=1 - 28 / _HEIGHT, wspace=0.3
        )
        for number, draw in enumerate(panels.values()):
            draw(figure.add_subplot(1, 4, number + 1))
        return inline_svg(figure, f"{result.mteb_task.name}: {', '.join(panels)}")


def _main_values(result: TaskResult) -> list[ValueRow]:
    return [row for row in values_of(result) if row.main and row.slice is None]


def _draw_curve(axes: Axes, result: TaskResult) -> None:
    """Draw the selection score over the epochs, including the start of training if it was measured."""
    start = result.start_accuracy if result.start_score is None else result.start_score
    points = [] if start is None else [(0, start)]
    points += [(row.epoch, score) for row in result.epochs if (score := selection_score(row)) is not None]
    split = "test" if result.selected_on == "test" else "validation"
    axes.set(title=f"{title_of(result.selection_metric)} on {split}, per cent", xlabel="epoch")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
    axes.grid(axis="y")
    if not points:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color=INK)
        return
    epochs, scores = [epoch for epoch, _ in points], [100 * score for _, score in points]
    axes.plot(epochs, scores, color=ADAPTED, marker="o", markersize=4, markerfacecolor=PAPER)
    best = [(epoch, score) for epoch, score in zip(epochs, scores, strict=True) if epoch == result.best_epoch]
    axes.plot([epoch for epoch, _ in best], [score for _, score in best], "o", color=ADAPTED, markersize=7)


def _draw_widths(axes: Axes, rows: Sequence[ValueRow]) -> None:
    """Draw the main metric by the width of the vectors, with intervals. The whole vector stands at the right end."""
    widths = sorted({row.width for row in rows if row.width is not None})
    places = {width: place for place, width in enumerate([*widths, None])}
    for column, shift in (("frozen", -0.06), ("adapted", 0.06)):
        shown = sorted((row for row in rows if row.column == column), key=lambda row: places[row.width])
        values = np.array([row.value for row in shown])
        ends = np.array([[row.low if row.low is not None else row.value for row in shown],
                         [row.high if row.high is not None else row.value for row in shown]])  # fmt: skip
        axes.errorbar(
            [places[row.width] + shift for row in shown],
            100 * values,
            yerr=100 * np.abs(ends - values),
            color=_COLOURS[column],
            marker="o",
            markersize=4,
            linewidth=1,
            elinewidth=1,
            label=column,
        )
    axes.set_xticks(range(len(places)), labels=[*map(str, widths), "all"])
    axes.set(title=f"{title_of(rows[0].metric)} by width, per cent", xlabel="dimensions")
    axes.grid(axis="y")
    axes.legend(fontsize=9)


def _draw_similarities(axes: Axes, histograms: Sequence[SimilarityCounts]) -> None:
    """Draw the share of each group's pairs by similarity. The colour shows the encoder, the line style the group."""
    groups = list(dict.fromkeys(counts.group for counts in histograms))
    for counts in histograms:
        merged = np.array(counts.counts).reshape(_SHOWN_BINS, -1).sum(axis=1)
        edges = np.linspace(-1, 1, _SHOWN_BINS + 1)
        axes.plot(
            (edges[:-1] + edges[1:]) / 2,
            100 * merged / max(1, merged.sum()),
            color=_COLOURS[counts.column],
            linestyle=("-", "--", ":")[groups.index(counts.group) % 3],
            linewidth=1.1,
            label=f"{counts.column}, {counts.group}",
        )
    axes.set(title="pairs by similarity, per cent", xlabel="cosine similarity", xlim=(-1, 1))
    axes.legend(fontsize=8)


def _draw_roc(axes: Axes, histograms: Sequence[SimilarityCounts]) -> None:
    """Draw the share of positive pairs against that of negative pairs above each threshold."""
    axes.plot([0, 100], [0, 100], color=INK, linewidth=0.8, linestyle=(0, (3, 2)))
    for column, colour in _COLOURS.items():
        by_group = {h.group: np.array(h.counts)[::-1].cumsum() for h in histograms if h.column == column}
        if len(by_group) == 2:
            shares = {
                group: np.concatenate([[0], 100 * total / max(1, total[-1])]) for group, total in by_group.items()
            }
            axes.plot(shares["label 0"], shares["label 1"], color=colour, linewidth=1.2, label=column)
    axes.set(title="ROC, test pairs, per cent", xlabel="false positives", xlim=(0, 102), ylim=(0, 102))
    axes.legend(fontsize=9)
