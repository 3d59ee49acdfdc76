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

from pipeline.evaluation.metrics import title_of
from pipeline.reports.page import ADAPTED, FAINT, FROZEN, INK, PAGE_WIDTH, STYLE, inline_svg, render_page
from pipeline.search.trials import SearchPlan, TrialRecord
from pipeline.store.files import write_atomically

_HEIGHT = 320


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


def expected_optimism(score: float, *, num_trials: int, num_items: int) -> float:
    """How much the best of several equally good trials is expected to be above its true score, at most.

    The largest of ``num_trials`` independent normal variables, in standard errors of a mean of numbers between 0 and 1.
    Trials see the same items, so they agree more than independent ones, and the truth is smaller.

    Args:
        score: Validation score of the best trial, 0..1.
        num_trials: Number of trials that were compared.
        num_items: Number of validation texts, pairs or queries.
    """
    error = np.sqrt(max(score * (1 - score), 0.0) / max(1, num_items))
    return float(error * _largest_of(num_trials))


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


def write_config(path: Path, plan: SearchPlan, trial: TrialRecord) -> None:
    """Write the config of a run that trains a trial."""
    config = plan.config_of(trial.learning_rate, trial.values)
    write_atomically(path, tomli_w.dumps(config.model_dump(mode="json", exclude_none=True)))


def summarise(plan: SearchPlan, trials: Sequence[TrialRecord], outcome: Outcome) -> dict[str, Any]:
    """Content of ``search.json``."""
    winner, default = winner_of(trials), trials[0]
    compared = [trial for trial in trials if trial.score is not None]
    assert winner.score is not None
    gain = None if default.score is None else winner.score - default.score
    return {
        "task": plan.mteb_task.name,
        "metric": outcome.metric,
        "num_trials": len(trials),
        "states": {state: sum(trial.state == state for trial in trials) for state in ("finished", "stopped", "failed")},
        "num_validation": plan.num_validation,
        "winner": _of_trial(winner, outcome.winner),
        "default": _of_trial(default, outcome.default),
        "validation_gain": gain,
        "expected_optimism": expected_optimism(winner.score, num_trials=len(compared), num_items=plan.num_validation),
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
    """What the search found, in three sentences that do not promise more than validation and test say."""
    winner, default, metric = summary["winner"], summary["default"], title_of(summary["metric"])
    if winner["number"] == default["number"]:
        first = (
            f"No trial is above the configuration as it was in {metric} on validation, {winner['validation_score']:.3f}"
        )
    else:
        first = f"Trial {winner['number']} has the best {metric} on validation, {winner['validation_score']:.3f}"
        if summary["validation_gain"] is not None:
            first += f", {summary['validation_gain']:+.3f} against the configuration as it was"
    lines = [
        f"{first}.",
        f"With {summary['num_trials']} trials on {summary['num_validation']} validation examples, chance alone may add "
        f"up to {summary['expected_optimism']:.3f}.",
    ]
    if winner["test"] is not None and default["test"] is not None:
        name = title_of(winner["test"]["metric"])
        lines.append(
            f"On test, {name} is {_score(winner['test'])}, with the configuration as it was {_score(default['test'])}."
        )
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
