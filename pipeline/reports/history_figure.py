"""The figure of an MTEB task over all runs of a store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from pipeline.evaluation.metrics import title_of
from pipeline.history.timeline import Point, TaskHistory, most_moved_labels, shares_of
from pipeline.records import ValueColumn, ValueRow
from pipeline.reports.page import ADAPTED, BAD, FROZEN, INK, PAGE_WIDTH, PAPER, SERIES, STYLE, inline_svg, shorten

_HEIGHT = 410
_WORDS_HEIGHT, _WORDS_WIDTH = 16, 96  # size of "test data changed" in pixels
_ROOM_FOR = 6  # runs; with fewer, space is left for later ones
_LABELS_SHOWN = len(SERIES)


@dataclass(frozen=True)
class _Line:
    """Style of a column of the score table."""

    column: ValueColumn
    name: str
    colour: str
    style: str
    marker: str


_LINES = (
    _Line("head", "LoRA, own head", ADAPTED, "-", "o"),
    _Line("frozen_full_data", "frozen, full-data probe", FROZEN, "-", "s"),
    _Line("adapted_few_shot", "LoRA, few-shot", SERIES[1], "--", "^"),
)
_VECTOR_LINES = (
    _Line("adapted", "adapted", ADAPTED, "-", "o"),
    _Line("frozen", "frozen", FROZEN, "-", "s"),
)


def draw_history(task: TaskHistory) -> Markup:
    """Draw scores and worker time on the left, and labels and text lengths on the right, over the same runs."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(PAGE_WIDTH / 72, _HEIGHT / 72))

        def panel(title: str, *, left: int, top: int, width: int, height: int, pad: int = 6) -> Axes:
            axes = figure.add_axes(
                (left / PAGE_WIDTH, 1 - (top + height) / _HEIGHT, width / PAGE_WIDTH, height / _HEIGHT)
            )
            axes.set_title(title, pad=pad)
            axes.grid(axis="y")
            axes.set_axisbelow(True)
            _mark_runs(axes, task.points)
            return axes

        vectors = next(filter(None, (point.value("adapted") for point in reversed(task.points))), None)
        metric = "accuracy" if vectors is None else title_of(vectors.metric)
        _draw_scores(panel(f"{metric} on test, per cent", left=50, top=48, width=590, height=200, pad=21), task.points)
        _draw_seconds(panel("worker time", left=50, top=300, width=590, height=84), task.points)
        _draw_labels(
            panel("most moved labels, per cent of train", left=712, top=24, width=300, height=114), task.points
        )
        _draw_variation(
            panel("labels moved (total variation), per cent", left=712, top=176, width=300, height=72), task.points
        )
        _draw_tokens(panel("tokens per training text", left=712, top=300, width=300, height=84), task.points)
        figure.axes[2].tick_params(axis="x", labelbottom=False)  # the panel below has the same runs
        return inline_svg(
            figure, f"{task.name}: scores, labels, text lengths and worker time over {len(task.points)} runs"
        )


def _draw_scores(axes: Axes, every: Sequence[Point]) -> None:
    has_vectors = any(point.value("adapted") is not None for point in every)
    for line in _VECTOR_LINES if has_vectors else _LINES:
        _draw_line(axes, every, line)
    axes.yaxis.set_major_locator(_few_ticks(6))
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=3,
        fontsize=10,
        borderaxespad=0.2,
        handlelength=2.2,
        columnspacing=1.6,
    )
    _mark_test_data(axes, [position - 0.5 for position, point in enumerate(every) if point.test_changed])


def _mark_test_data(axes: Axes, marks: Sequence[float]) -> None:
    """Draw a line between the runs before and after each change, with words if there is room for them."""
    if not marks:
        return
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + (high - low) * _WORDS_HEIGHT / (axes.bbox.height - _WORDS_HEIGHT))
    left, right = axes.get_xlim()
    pixel = (right - left) / axes.bbox.width
    free_from = left
    for mark in marks:
        axes.axvline(mark, color=BAD, linewidth=1.2, linestyle=(0, (3, 2)))
        start = min(mark + 4 * pixel, right - _WORDS_WIDTH * pixel)
        if start >= free_from:
            axes.text(
                start, 0.99, "test data changed", transform=axes.get_xaxis_transform(), color=BAD, fontsize=10, va="top"
            )
            free_from = start + _WORDS_WIDTH * pixel


def _draw_line(axes: Axes, every: Sequence[Point], line: _Line) -> None:
    """Draw a column of the score table, one piece per version of the test data. Reused points are hollow."""
    size = 5 if len(every) <= 26 else 3
    for piece in _comparable(every):
        shown = [(position, row) for position in piece if (row := every[position].value(line.column)) is not None]
        axes.plot(
            [position for position, _ in shown],
            [100 * row.value for _, row in shown],
            line.style,
            color=line.colour,
            linewidth=1.4,
        )
        measured = [(position, row) for position, row in shown if every[position].reused_from is None]
        if line.column in ("head", "adapted"):
            _draw_intervals(axes, measured, line.colour)
        reused = [pair for pair in shown if pair not in measured]
        for rows, fill in ((measured, line.colour), (reused, PAPER)):
            positions, values = [position for position, _ in rows], [100 * row.value for _, row in rows]
            axes.plot(positions, values, line.marker, color=line.colour, markerfacecolor=fill, markersize=size)
    axes.plot([], [], line.style, color=line.colour, marker=line.marker, markersize=5, label=line.name)


def _draw_intervals(axes: Axes, rows: Sequence[tuple[int, ValueRow]], colour: str) -> None:
    below = [100 * max(row.value - row.low, 0) if row.low is not None else 0 for _, row in rows]
    above = [100 * max(row.high - row.value, 0) if row.high is not None else 0 for _, row in rows]
    positions, values = [position for position, _ in rows], [100 * row.value for _, row in rows]
    axes.errorbar(
        positions,
        values,
        yerr=[below, above],
        fmt="none",
        color=colour,
        ecolor=colour,
        elinewidth=1,
        capsize=2,
        alpha=0.6,
    )


def _comparable(every: Sequence[Point]) -> list[list[int]]:
    """Positions of runs whose scores a line may join: neighbours with the same test data."""
    pieces: list[list[int]] = []
    for position, point in enumerate(every):
        if point.test_changed or not pieces:
            pieces.append([])
        pieces[-1].append(position)
    return pieces


def _draw_seconds(axes: Axes, every: Sequence[Point]) -> None:
    recorded = [
        (position, point.facts.worker_seconds)
        for position, point in enumerate(every)
        if point.facts and point.reused_from is None
    ]
    if not recorded:
        _say(axes, "not recorded" if not any(point.facts for point in every) else "reused, nothing was computed")
        return
    longest = max(seconds for _, seconds in recorded)
    unit, name = (3600, "h") if longest >= 7200 else (60, "min") if longest >= 120 else (1, "s")
    axes.bar(
        [position for position, _ in recorded], [seconds / unit for _, seconds in recorded], width=0.6, color=FROZEN
    )
    axes.set_title(f"worker time, {name}", pad=6)
    axes.set_ylim(0, max(longest / unit * 1.1, 1e-9))
    axes.yaxis.set_major_locator(_few_ticks())


def _draw_labels(axes: Axes, every: Sequence[Point]) -> None:
    recorded = _recorded_shares(every)
    if not recorded:
        _say(axes, "not recorded")
        return
    positions = [position for position, _ in recorded]
    shown = {
        label: [100 * shares.get(label, 0.0) for _, shares in recorded]
        for label in most_moved_labels(every, most=_LABELS_SHOWN)
    }
    for (label, shares), colour in zip(shown.items(), SERIES, strict=False):
        axes.plot(positions, shares, color=colour, marker="o", markersize=3, linewidth=1.4, label=_for_legend(label))
    if len(recorded) == 1:
        axes.set_title("most frequent labels, per cent of train", pad=6)
    axes.set_ylim(0, 1.1 * max(max(shares) for shares in shown.values()))
    axes.yaxis.set_major_locator(_few_ticks())
    axes.legend(
        loc="upper left", bbox_to_anchor=(1.02, 1), fontsize=10, borderaxespad=0, handlelength=1.2, labelspacing=0.35
    )


def _draw_variation(axes: Axes, every: Sequence[Point]) -> None:
    recorded = [
        (position, 100 * point.drift.total_variation) for position, point in enumerate(every) if point.drift is not None
    ]
    if not recorded:
        _say(axes, "from the second run on" if len(_recorded_shares(every)) == 1 else "not recorded")
        return
    axes.bar([position for position, _ in recorded], [moved for _, moved in recorded], width=0.6, color=FROZEN)
    axes.set_ylim(0, max(1.0, *(1.1 * moved for _, moved in recorded)))
    axes.yaxis.set_major_locator(_few_ticks())


def _draw_tokens(axes: Axes, every: Sequence[Point]) -> None:
    recorded = [
        (position, point.facts)
        for position, point in enumerate(every)
        if point.facts and point.facts.tokens_p90 is not None
    ]
    if not recorded:
        _say(axes, "not recorded")
        return
    positions = [position for position, _ in recorded]
    low, middle, high = (
        [getattr(facts, name) for _, facts in recorded] for name in ("tokens_p10", "tokens_p50", "tokens_p90")
    )
    axes.fill_between(positions, low, high, color=FROZEN, alpha=0.25, linewidth=0)
    for values, width in ((low, 1.0), (middle, 1.8), (high, 1.0)):
        axes.plot(positions, values, color=INK, linewidth=width, marker="o", markersize=3)
    axes.set_ylim(0, max(high) * 1.15)
    heights = _apart([values[-1] / (max(high) * 1.15) for values in (low, middle, high)], gap=14 / axes.bbox.height)
    for height, name, values in zip(heights, ("10 %", "half", "90 %"), (low, middle, high), strict=True):
        axes.text(1.02, height, f"{name} up to {values[-1]}", transform=axes.transAxes, va="center", fontsize=10)
    axes.yaxis.set_major_locator(_few_ticks())


def _apart(heights: Sequence[float], *, gap: float) -> list[float]:
    """Move rising heights up so that the words at them do not overlap."""
    moved: list[float] = []
    for height in heights:
        moved.append(max(height, moved[-1] + gap) if moved else height)
    return moved


def _mark_runs(axes: Axes, every: Sequence[Point]) -> None:
    """Mark the runs at equal distances, so that a weekly schedule and an afternoon of trials are both readable."""
    axes.set_xlim(-0.6, max(len(every), _ROOM_FOR) - 0.4)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7 if axes.bbox.width > 400 else 4, integer=True, min_n_ticks=1))
    one_a_day = len({point.when.date() for point in every}) == len(every)
    axes.xaxis.set_major_formatter(FuncFormatter(_dates(every, "%Y-%m-%d" if one_a_day else "%m-%d %H:%M")))
    axes.tick_params(axis="x", length=3)


def _dates(every: Sequence[Point], form: str) -> Callable[[float, int], str]:
    return lambda value, _: (
        every[int(value)].when.strftime(form) if value == int(value) and 0 <= value < len(every) else ""
    )


def _few_ticks(most: int = 4) -> MaxNLocator:
    return MaxNLocator(nbins=most, steps=[1, 2, 5, 10])


def _say(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=INK)
    axes.set_yticks([])


def _recorded_shares(every: Sequence[Point]) -> list[tuple[int, dict[str, float]]]:
    return [(position, shares) for position, shares in enumerate(map(shares_of, every)) if shares]


def _for_legend(label: str) -> str:
    text = shorten(" ".join(label.split()) or "(empty)", 22)
    return f" {text}" if text.startswith("_") else text  # matplotlib hides labels that begin with an underscore
