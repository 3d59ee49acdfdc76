"""What a search found: its table, its configs, its page, and what chance may have added."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tomli_w
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import integrate, special

from pipeline.config import RunConfig
from pipeline.evaluation.metrics import title_of
from pipeline.printable import counted
from pipeline.reports.page import ADAPTED, FAINT, FROZEN, INK, PAGE_WIDTH, STYLE, inline_svg, render_page
from pipeline.search.trials import SearchPlan, TrialRecord
from pipeline.store.files import write_atomically

_HEIGHT = 320
_MEANS = ("accuracy", "ndcg_at_10", "mrr_at_10")


@dataclass(frozen=True)
class TestScore:
    """Score of one training on test, with its 95 % interval."""

    metric: str
    value: float
    low: float | None
    high: float | None
    run_id: str
    """Run that evaluated it."""


@dataclass(frozen=True)
class Outcome:
    """What is known beyond the trials."""

    metric: str
    """Name of the validation score."""
    winner: TestScore | None
    """None if it was not evaluated on test."""
    default: TestScore | None


def winner_of(trials: Sequence[TrialRecord]) -> TrialRecord:
    """The finished trial with the best validation score, the earlier of equals."""
    return max(
        (trial for trial in trials if trial.state == "finished"),
        key=lambda trial: (trial.score or 0.0, -trial.number),
    )


def default_of(trials: Sequence[TrialRecord]) -> TrialRecord | None:
    """The trial of the configuration as it is. None if it has not ended."""
    return next((trial for trial in trials if trial.number == 0), None)


def expected_optimism(metric: str, score: float, *, num_trials: int, num_items: int) -> float | None:
    """How far the best of several equally good trials is expected above its true score, by chance.

    The largest of ``num_trials`` independent normal variables, in standard errors of the score. Trials see the same
    items, so they differ less than independent ones, and what is expected of them is less. The standard error is that
    of a mean of numbers between 0 and 1, or Spearman's (Bonett & Wright 2000).

    Args:
        metric: Name of the validation score.
        score: Score of the best trial.
        num_trials: Number of trials that have a score.
        num_items: Number of validation texts, pairs or queries.
    Returns: None for a metric whose standard error is not known.
    """
    if metric == "spearman":
        error = (1 - score**2) * np.sqrt((1 + score**2 / 2) / max(1, num_items - 3))
    elif metric in _MEANS:
        error = np.sqrt(max(score * (1 - score), 0.0) / max(1, num_items))
    else:
        return None
    return float(error * max(0.0, _largest_of(num_trials)))


def _largest_of(count: int) -> float:
    """Expectation of the largest of independent standard normal variables."""

    def above(x: float) -> float:
        return float(1 - special.ndtr(x) ** count)

    def below(x: float) -> float:
        return float(special.ndtr(x) ** count)

    return float(integrate.quad(above, 0, 12)[0] - integrate.quad(below, -12, 0)[0])


def write_results(folder: Path, plan: SearchPlan, trials: Sequence[TrialRecord], outcome: Outcome) -> None:
    """Write ``trials.parquet``, ``search.html`` and ``search.json``. The configs are written before."""
    rows = [
        {
            "number": trial.number,
            "state": trial.state,
            "score": trial.score,
            "epochs": len(trial.scores),
            "learning_rate": trial.learning_rate,
            **{name: _text_of(value) for name, value in trial.values.items()},
            "scores": list(trial.scores),
            "seconds": trial.seconds,
            "key": trial.key,
            "fault": trial.fault,
        }
        for trial in trials
    ]
    temporary = folder / "trials.parquet.writing"
    pq.write_table(pa.Table.from_pylist(rows), temporary)
    temporary.replace(folder / "trials.parquet")
    summary = summarise(plan, trials, outcome)
    write_atomically(
        folder / "search.html",
        render_page(
            "search.html.j2",
            summary=summary,
            trials=rows,
            settings=["learning_rate", *trials[0].values],
            sentences=sentences(summary),
            figure=_figure(trials, summary["winner"]["number"]),
            metric=title_of(outcome.metric),
        ),
    )
    write_atomically(folder / "search.json", json.dumps(summary, indent=1, ensure_ascii=False))


def write_config(path: Path, config: RunConfig) -> None:
    """Write the config of a run. Defaults are left out: some keys are refused beside another one's value."""
    values = config.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
    write_atomically(path, tomli_w.dumps(values))


def summarise(plan: SearchPlan, trials: Sequence[TrialRecord], outcome: Outcome) -> dict[str, Any]:
    """Content of ``search.json``."""
    winner, default = winner_of(trials), default_of(trials)
    compared = [trial for trial in trials if trial.score is not None]
    assert winner.score is not None
    return {
        "task": plan.mteb_task.name,
        "metric": outcome.metric,
        "num_trials": len(trials),
        "num_compared": len(compared),
        "states": {state: sum(trial.state == state for trial in trials) for state in ("finished", "stopped", "failed")},
        "num_validation": plan.num_validation,
        "winner": _of_trial(winner, outcome.winner),
        "default": None if default is None else _of_trial(default, outcome.default),
        "validation_gain": None if default is None or default.score is None else winner.score - default.score,
        "expected_optimism": expected_optimism(
            outcome.metric, winner.score, num_trials=len(compared), num_items=plan.num_validation
        ),
        "seconds": sum(trial.seconds for trial in trials),
    }


def _of_trial(trial: TrialRecord, test: TestScore | None) -> dict[str, Any]:
    return {
        "number": trial.number,
        "key": trial.key,
        "learning_rate": trial.learning_rate,
        "values": trial.values,
        "validation_score": trial.score,
        "test": None if test is None else asdict(test),
    }


def sentences(summary: Mapping[str, Any]) -> list[str]:
    """What the search found, in up to three sentences: on validation, by chance, and on test."""
    winner, default, metric = summary["winner"], summary["default"], title_of(summary["metric"])
    reached = f"{winner['validation_score']:.3f}"
    if winner["number"] == 0:
        lines = [f"No finished trial is above the configuration as it is: its {metric} on validation is {reached}."]
    else:
        gain = summary["validation_gain"]
        over = "which diverged" if gain is None else f"{gain:+.3f} against the configuration as it is"
        over = "" if default is None else f", {over.replace('which', 'where the configuration as it is')}"
        lines = [f"Of the finished trials, {winner['number']} has the best {metric} on validation, {reached}{over}."]
    compared = counted(summary["num_compared"], "trial")
    on = f"{compared} on {summary['num_validation']:,} validation examples"
    if summary["expected_optimism"] is None:
        lines.append(f"The best of {on} is above its true score by chance; how far is not known for this metric.")
    else:
        most = f"{summary['expected_optimism']:.3f}"
        lines.append(f"The best of {on} is expected to be above its true score by chance, by {most} at most.")
    if winner["test"] is not None:
        line = f"On test, {title_of(winner['test']['metric'])} is {_score(winner['test'])}"
        if winner["number"] != 0 and default is not None and default["test"] is not None:
            line += f", and {_score(default['test'])} with the configuration as it is"
        lines.append(f"{line}.")
    return lines


def _score(test: Mapping[str, Any]) -> str:
    ends = "" if test["low"] is None else f" ({test['low']:.3f} to {test['high']:.3f})"
    return f"{test['value']:.3f}{ends}"


def _figure(trials: Sequence[TrialRecord], winner: int) -> Markup:
    """Draw a line for each trial over parallel axes: its settings, then its score."""
    axes_of = {"learning rate": [float(np.log10(trial.learning_rate)) for trial in trials]}
    ticks: dict[str, list[tuple[float, str]]] = {
        "learning rate": [
            (float(np.log10(rate)), f"{rate:g}")
            for rate in (min(t.learning_rate for t in trials), max(t.learning_rate for t in trials))
        ]
    }
    for name in trials[0].values:
        texts = [_text_of(trial.values[name]) for trial in trials]
        places = {text: float(place) for place, text in enumerate(dict.fromkeys(sorted(texts, key=_number_first)))}
        axes_of[name.replace("_", " ")] = [places[text] for text in texts]
        ticks[name.replace("_", " ")] = [(place, text) for text, place in places.items()]
    shown = [trial.score for trial in trials if trial.score is not None]
    axes_of["score"] = [min(shown) if trial.score is None else trial.score for trial in trials]
    ticks["score"] = [(value, f"{value:.3f}") for value in dict.fromkeys((min(shown), max(shown)))]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(PAGE_WIDTH / 72, _HEIGHT / 72), layout="constrained")
        _draw_parallel(figure.add_subplot(), axes_of, ticks, trials, winner)
        return inline_svg(figure, "trials over parallel axes")


def _draw_parallel(
    axes: Axes,
    axes_of: Mapping[str, list[float]],
    ticks: Mapping[str, list[tuple[float, str]]],
    trials: Sequence[TrialRecord],
    winner: int,
) -> None:
    def scaled(name: str, value: float) -> float:
        low, high = min(axes_of[name]), max(axes_of[name])
        return 0.5 if high == low else (value - low) / (high - low)

    for row, trial in enumerate(trials):
        heights = [scaled(name, values[row]) for name, values in axes_of.items()]
        special_one = trial.number in (0, winner)
        if trial.score is None:
            heights = heights[:-1]  # it has no score to end at
        colour = ADAPTED if trial.number == winner else INK if trial.number == 0 else FROZEN
        style = "-" if trial.state == "finished" else (0, (3, 2))
        axes.plot(heights, color=colour, linewidth=2.0 if special_one else 0.9, linestyle=style)
    for place, name in enumerate(axes_of):
        axes.axvline(place, color=FAINT, linewidth=0.8)
        for value, text in ticks[name]:
            axes.annotate(text, (place, scaled(name, value)), xytext=(4, 2), textcoords="offset points", fontsize=9)
    axes.set_xticks(range(len(axes_of)), labels=list(axes_of))
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.margins(x=0.05)


def _text_of(value: Any) -> str:
    return value if isinstance(value, str) else "default" if value is None else json.dumps(value)


def _number_first(text: str) -> tuple[int, float, str]:
    try:
        return 0, float(text), text
    except ValueError:
        return 1, 0.0, text
