"""The report of a comparison as one HTML page, which loads nothing from the network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.compare.files import ArmResult
from pipeline.evaluation.metrics import title_of
from pipeline.reports.page import ADAPTED, BAD, FROZEN, INK, PAGE_WIDTH, SERIES, STYLE, inline_svg, render_page
from pipeline.store.files import write_atomically

_HEIGHT = 260
_COLOURS = (FROZEN, INK, ADAPTED, BAD, *SERIES)


def write_page(path: Path, summary: Mapping[str, Any], results: Sequence[ArmResult]) -> None:
    """Write the page. Arms keep their colour in all figures."""
    colours = {result.arm: _COLOURS[number % len(_COLOURS)] for number, result in enumerate(results)}
    panels: dict[str, Callable[[Axes], None]] = {"score": lambda axes: _draw_scores(axes, summary, colours)}
    if any(len(result.trials) > 1 for result in results):
        panels["learning rates"] = lambda axes: _draw_rates(axes, results, colours)
    panels["score against bytes"] = lambda axes: _draw_pareto(axes, summary, colours, cost="bytes_per_task")
    panels["score against seconds"] = lambda axes: _draw_pareto(axes, summary, colours, cost="seconds_per_training")
    page = render_page(
        "comparison.html.j2",
        summary=summary,
        answer=answer(summary),
        figure=_figure(panels, summary["task"]),
        metrics=_metrics(summary),
        title_of=title_of,
    )
    write_atomically(path, page)


def answer(summary: Mapping[str, Any]) -> list[str]:
    """Sentences that answer the question: which arm wins, and by how much."""
    metric, arms = summary["main_metric"], summary["arms"]
    ranked = sorted(arms, key=lambda arm: -arms[arm][metric]["value"])
    best = ranked[0]
    lines = [f"Best {title_of(metric)} on test: {best} with {_interval(arms[best][metric])}."]
    for arm in ranked:
        difference = summary["differences"].get(arm, {}).get("full", {}).get(metric)
        if difference is None or arm == "frozen":
            continue
        verdict = (
            "within noise of" if difference["p_value"] >= 0.05 else ("above" if difference["gain"] > 0 else "below")
        )
        share = "" if difference["share"] is None else f" ({100 * difference['share']:.1f} % of it)"
        lines.append(
            f"{arm} is {verdict} full fine-tuning: {difference['gain']:+.3f} "
            f"({_signed(difference['low'])} to {_signed(difference['high'])}){share}."
        )
    return lines


def _interval(value: Mapping[str, Any]) -> str:
    if value["low"] is None:
        return f"{value['value']:.3f}"
    return f"{value['value']:.3f} ({value['low']:.3f} to {value['high']:.3f})"


def _signed(number: float | None) -> str:
    return "–" if number is None else f"{number:+.3f}"


def _metrics(summary: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(metric for of_arm in summary["arms"].values() for metric in of_arm))


def _figure(panels: Mapping[str, Callable[[Axes], None]], name: str) -> Markup:
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(PAGE_WIDTH / 72, _HEIGHT / 72))
        figure.subplots_adjust(left=0.1, right=0.99, bottom=0.2, top=0.88, wspace=0.35)
        for number, draw in enumerate(panels.values()):
            draw(figure.add_subplot(1, len(panels), number + 1))
        return inline_svg(figure, f"{name}: {', '.join(panels)}")


def _draw_scores(axes: Axes, summary: Mapping[str, Any], colours: Mapping[str, str]) -> None:
    metric = summary["main_metric"]
    for row, (arm, of_arm) in enumerate(reversed(list(summary["arms"].items()))):
        value = of_arm[metric]
        ends = [value["low"], value["high"]] if value["low"] is not None else [value["value"]] * 2
        axes.plot(ends, [row, row], color=colours[arm], linewidth=1.5)
        axes.plot([value["value"]], [row], "o", color=colours[arm], markersize=5)
    axes.set_yticks(range(len(summary["arms"])), labels=list(reversed(list(summary["arms"]))))
    axes.set(title=f"{title_of(metric)} on test")
    axes.grid(axis="x")


def _draw_rates(axes: Axes, results: Sequence[ArmResult], colours: Mapping[str, str]) -> None:
    for result in results:
        points = [(trial.learning_rate, trial.score) for trial in result.trials if trial.score is not None]
        if points:
            rates, found = zip(*points, strict=True)
            axes.plot(rates, found, "o-", color=colours[result.arm], markersize=4, label=result.arm)
    axes.set_xscale("log")
    axes.set(title="validation, by learning rate")
    axes.legend(fontsize=7)


def _draw_pareto(axes: Axes, summary: Mapping[str, Any], colours: Mapping[str, str], *, cost: str) -> None:
    metric = summary["main_metric"]
    for arm, of_arm in summary["arms"].items():
        spent = summary["costs"][arm][cost]
        axes.plot([max(spent, 1)], [of_arm[metric]["value"]], "o", color=colours[arm], markersize=6, label=arm)
    axes.set_xscale("log")
    axes.set(title=f"{title_of(metric)}, by {cost.replace('_', ' ')}")
