"""Figures of a comparison. Each is one SVG element, so that the page can put them beside or below one another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from pipeline.compare.report.pair_errors import PairErrors
from pipeline.compare.statistics import Series
from pipeline.evaluation.metrics import title_of
from pipeline.reports.page import ADAPTED, BAD, FAINT, FROZEN, INK, SERIES, STYLE, inline_svg, shorten

_COLOURS = (FROZEN, INK, ADAPTED, *SERIES[1:], BAD)
_WIDE, _NARROW = (580, 270), (285, 235)  # two and four of them fit the page
_BINS = 40
_MOST_LABELS = 5
_LABEL_COLOURS = {"label 0": FROZEN, "label 1": ADAPTED}


@dataclass(frozen=True)
class ArmColours:
    """Colour of each arm, the same in all figures."""

    arms: Sequence[str]

    def __getitem__(self, arm: str) -> str:
        """Colour of an arm."""
        return _COLOURS[self.arms.index(arm) % len(_COLOURS)]


def overview_figures(summary: Mapping[str, Any]) -> Iterator[Markup]:
    """Draw what every comparison has: scores, learning rates, and scores against costs."""
    given: dict[str, Any] = {"summary": summary, "colours": ArmColours(list(summary["arms"]))}
    yield _figure(partial(_draw_scores, **given), "score on test by arm")
    if any(len(trials) > 1 for trials in summary["trials"].values()):
        yield _figure(partial(_draw_rates, **given), "validation score by learning rate")
    for cost in ("bytes_per_task", "seconds_per_training"):
        yield _figure(partial(_draw_pareto, cost=cost, **given), f"score by {cost.replace('_', ' ')}")


def pair_figures(summary: Mapping[str, Any], errors: PairErrors) -> Iterator[Markup]:
    """Draw the similarities, groups and errors of labelled pairs."""
    colours = ArmColours(list(summary["arms"]))
    yield _figure(partial(_draw_roc, errors=errors, colours=colours), "ROC by arm")
    at_threshold = ("f1_best_threshold",) if errors.is_optimistic else ("accuracy", "precision", "recall", "f1")
    for title, metrics in (
        ("Cohen's d by arm", ("cohens_d",)),
        ("errors at the threshold by arm", at_threshold),
        ("purity of clusters by arm", ("purity", "v_measure", "map_purity")),
    ):
        yield _figure(partial(_draw_metrics, arms=summary["arms"], colours=colours, metrics=metrics), title)
    for column in errors.data.test.slices:
        parts = {
            value: {arm: found["margin"] for arm, found in by_arm.items()}
            for value, by_arm in summary["parts"].get(column, {}).items()
            if all("margin" in found for found in by_arm.values())
        }
        if parts:
            yield _figure(
                partial(_draw_margins, column=column, parts=parts, colours=colours),
                f"margin of the cosines by {column}",
            )
        yield _figure(
            partial(_draw_false_positives, column=column, errors=errors, colours=colours),
            f"false positives by {column}",
        )


def similarity_figures(errors: PairErrors) -> Iterator[Markup]:
    """Draw, of each arm, how similar the labelled pairs are."""
    for arm in errors.arms:
        yield _figure(partial(_draw_densities, arm=arm, errors=errors), f"similarities, {arm}", size=_NARROW)


def map_figures(series: Sequence[Series], labels: npt.NDArray[Any]) -> Iterator[Markup]:
    """Draw, of each arm, the map of its first seed.

    Args:
        series: Measured arrays.
        labels: Label of each item of test in words, (items,). The most frequent five are distinguished.
    """
    first = {one.arm: one for one in reversed(series)}
    for arm in dict.fromkeys(one.arm for one in series):
        if "map_items" in first[arm].arrays:
            yield _figure(partial(_draw_map, one=first[arm], labels=labels), f"map, {arm}", size=_NARROW)


def _figure(draw: Callable[[Axes], None], title: str, *, size: tuple[int, int] = _WIDE) -> Markup:
    width, height = size
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
        draw(figure.add_subplot())
        return inline_svg(figure, title)


def _make_logarithmic(axes: Axes) -> None:
    """Make the x axis logarithmic, after everything is drawn."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())


def _draw_scores(axes: Axes, *, summary: Mapping[str, Any], colours: ArmColours) -> None:
    metric = summary["main_metric"]
    for row, (arm, of_arm) in enumerate(reversed(list(summary["arms"].items()))):
        value = of_arm[metric]
        if value["low"] is not None:
            axes.plot([value["low"], value["high"]], [row, row], color=colours[arm], linewidth=1.5)
        axes.plot([value["value"]], [row], "o", color=colours[arm], markersize=5)
    axes.set_yticks(range(len(summary["arms"])), labels=list(reversed(list(summary["arms"]))))
    axes.set(title=f"{title_of(metric)} on test")
    axes.grid(axis="x")


def _draw_rates(axes: Axes, *, summary: Mapping[str, Any], colours: ArmColours) -> None:
    """Draw the validation score by learning rate. A rate that diverged stands at the bottom as a cross."""
    alive = [trial["score"] for trials in summary["trials"].values() for trial in trials if trial["score"] is not None]
    for arm, trials in summary["trials"].items():
        points = [(trial["learning_rate"], trial["score"]) for trial in trials if trial["score"] is not None]
        if points:
            axes.plot(*zip(*points, strict=True), "o-", color=colours[arm], markersize=4, linewidth=1, label=arm)
        lost = [trial["learning_rate"] for trial in trials if trial["score"] is None]
        if lost and alive:
            axes.plot(lost, [min(alive)] * len(lost), "x", color=colours[arm], markersize=6)
    _make_logarithmic(axes)
    axes.set(title="score on validation, by learning rate", xlabel="learning rate")
    axes.grid(axis="y")
    axes.legend(fontsize=8, ncols=2)


def _draw_pareto(axes: Axes, *, summary: Mapping[str, Any], colours: ArmColours, cost: str) -> None:
    """Draw score against cost. On the logarithmic axis, ``frozen`` stands left of all that cost something."""
    metric, costs = summary["main_metric"], {arm: found[cost] for arm, found in summary["costs"].items()}
    least = min((spent for spent in costs.values() if spent > 0), default=1.0) / 3
    for arm, of_arm in summary["arms"].items():
        place = (max(costs[arm], least), of_arm[metric]["value"])
        axes.plot(*place, "o", color=colours[arm], markersize=6)
        axes.annotate(arm, place, xytext=(6, -4), textcoords="offset points", fontsize=9)
    axes.margins(x=0.18, y=0.12)
    _make_logarithmic(axes)
    axes.set(title=f"{title_of(metric)} on test, by {cost.replace('_', ' ')}", xlabel=cost.replace("_", " "))


def _draw_roc(axes: Axes, *, errors: PairErrors, colours: ArmColours) -> None:
    """Draw the ROC of each arm, from the pairs of all its seeds together."""
    axes.plot([0, 100], [0, 100], color=FAINT, linewidth=0.8, linestyle=(0, (3, 2)))
    for arm in errors.arms:
        similarity = errors.similarity[arm].ravel()
        right = np.tile(errors.labels, len(errors.similarity[arm]))[np.argsort(-similarity, kind="stable")]
        ends = np.append(np.flatnonzero(np.diff(np.sort(-similarity))), len(right) - 1)  # equal ones are one step
        true, false = right.cumsum()[ends], (~right).cumsum()[ends]
        axes.plot(
            np.concatenate([[0], 100 * false / max(1, false[-1])]),
            np.concatenate([[0], 100 * true / max(1, true[-1])]),
            color=colours[arm],
            linewidth=1.3,
            label=arm,
        )
    axes.set(title="ROC, test pairs, per cent", xlabel="false positives", ylabel="true positives")
    axes.legend(fontsize=8, loc="lower right")


def _draw_metrics(axes: Axes, *, arms: Mapping[str, Any], colours: ArmColours, metrics: Sequence[str]) -> None:
    """Draw bars of some metrics, grouped by metric, with intervals."""
    shown = [metric for metric in metrics if any(metric in of_arm for of_arm in arms.values())]
    values = {arm: [of_arm.get(metric) for metric in shown] for arm, of_arm in arms.items()}
    _draw_bars(axes, [title_of(metric) for metric in shown], values, colours)
    axes.set(title=title_of(shown[0]) if len(shown) == 1 else "on test, by arm")


def _draw_margins(axes: Axes, *, column: str, parts: Mapping[str, Any], colours: ArmColours) -> None:
    """Draw the margin in each part."""
    values = {arm: [by_arm[arm] for by_arm in parts.values()] for arm in colours.arms}
    labels = [f"{shorten(v, 16)} ({by_arm[colours.arms[0]]['num_items']})" for v, by_arm in parts.items()]
    _draw_bars(axes, labels, values, colours)
    axes.set(title=f"margin of the cosines, by {shorten(column, 24)} (pairs)")


def _draw_false_positives(axes: Axes, *, column: str, errors: PairErrors, colours: ArmColours) -> None:
    rows = [row for row in errors.counts() if row.slice == column and row.num_negative]
    negatives = {row.slice_value: row.num_negative for row in rows}
    values = {
        arm: [{"value": row.false_positives, "low": None} for row in rows if row.arm == arm] for arm in errors.arms
    }
    _draw_bars(axes, [f"{shorten(value, 16)} ({count})" for value, count in negatives.items()], values, colours)
    optimistic = ", optimistic" if errors.is_optimistic else ""
    axes.set(title=f"false positives, by {shorten(column, 24)} (negative pairs){optimistic}")


def _draw_bars(axes: Axes, groups: Sequence[str], values: Mapping[str, Sequence[Any]], colours: ArmColours) -> None:
    """Draw groups of bars, one bar for each arm. None is no bar."""
    width = 0.8 / max(1, len(values))
    for number, (arm, of_arm) in enumerate(values.items()):
        places = [group + (number - (len(values) - 1) / 2) * width for group in range(len(of_arm))]
        shown = [(place, value) for place, value in zip(places, of_arm, strict=True) if value is not None]
        axes.bar(
            [p for p, _ in shown], [v["value"] for _, v in shown], width=0.9 * width, color=colours[arm], label=arm
        )
        for place, value in shown:
            if value["low"] is not None:
                axes.plot([place, place], [value["low"], value["high"]], color=INK, linewidth=0.8)
    axes.set_xticks(range(len(groups)), labels=list(groups))
    if slanted := len(groups) > 4:
        axes.tick_params("x", labelrotation=25)
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.margins(y=0.08)
    axes.legend(fontsize=8, ncols=5, loc="upper center", bbox_to_anchor=(0.5, -0.3 if slanted else -0.12))


def _draw_densities(axes: Axes, *, arm: str, errors: PairErrors) -> None:
    edges = np.linspace(-1, 1, _BINS + 1)
    for label, colour, style in ((0, FROZEN, "--"), (1, ADAPTED, "-")):
        found = errors.similarity[arm][:, errors.labels == label].ravel()
        counts, _ = np.histogram(np.clip(found, -1, 1), edges)
        middles = (edges[:-1] + edges[1:]) / 2
        axes.plot(middles, 100 * counts / max(1, len(found)), color=colour, linestyle=style, label=f"label {label}")
    axes.set(title=arm, xlabel="cosine similarity", xlim=(-1, 1), xticks=(-1, -0.5, 0, 0.5, 1))
    axes.legend(fontsize=8, loc="upper left")


def _draw_map(axes: Axes, *, one: Series, labels: npt.NDArray[Any]) -> None:
    """Draw the points of a map. Labels beyond the most frequent five are faint."""
    items, points = one.arrays["map_items"], one.arrays["map_points"]
    names, counts = np.unique(labels.astype(str), return_counts=True)
    frequent = names[np.argsort(-counts, kind="stable")[:_MOST_LABELS]]
    colours = _LABEL_COLOURS if set(names) <= _LABEL_COLOURS.keys() else dict(zip(frequent, SERIES, strict=False))
    rest = ~np.isin(labels[items].astype(str), list(colours))
    axes.plot(*points[rest].T, "o", color=FAINT, markersize=2.2)
    for name in colours:
        chosen = labels[items].astype(str) == name
        if chosen.any():
            axes.plot(*points[chosen].T, "o", color=colours[name], markersize=2.2, label=shorten(name, 18))
    axes.legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, 0))
    axes.set(title=one.arm)
    axes.set_xticks([])
    axes.set_yticks([])
