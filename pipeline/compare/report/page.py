"""The report of a comparison as one HTML page, which loads nothing from the network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.compare.report.figures import map_figures, overview_figures, pair_figures, similarity_figures
from pipeline.compare.report.pair_errors import PairErrors
from pipeline.compare.statistics import Series
from pipeline.config import MapMethod
from pipeline.data.dataset import TaskData
from pipeline.evaluation.metrics import title_of
from pipeline.pairs.data import PairData
from pipeline.reports.page import render_page, shorten
from pipeline.store.files import write_atomically

_MOST_WRONG = 40
_MOST_LETTERS = 160


def write_page(
    path: Path,
    summary: Mapping[str, Any],
    *,
    data: PairData | TaskData,
    series: Sequence[Series],
    errors: PairErrors | None,
    method: MapMethod,
) -> None:
    """Write the page.

    Args:
        path: The file.
        summary: Content of ``comparison.json``.
        data: The data set.
        series: Measured arrays of the arms.
        errors: Errors on labelled pairs. None for other data.
        method: Method of the maps.
    """
    wrong = [] if errors is None else errors.pairs()
    page = render_page(
        "comparison.html.j2",
        summary=summary,
        answer=answer(summary),
        overview=list(overview_figures(summary)),
        of_pairs=[] if errors is None else list(pair_figures(summary, errors)),
        similarities=[] if errors is None else list(similarity_figures(errors)),
        maps=list(map_figures(series, _labels(data))),
        test_sets=_test_sets(summary),
        metrics=list(dict.fromkeys(metric for of_arm in summary["arms"].values() for metric in of_arm)),
        wrong=wrong[:_MOST_WRONG],
        num_wrong=len(wrong),
        method=method,
        is_optimistic=errors is not None and errors.is_optimistic,
        cut=lambda text: shorten(text, _MOST_LETTERS),
        title_of=title_of,
        verdict_of=verdict_of,
    )
    write_atomically(path, page)


def answer(summary: Mapping[str, Any]) -> list[str]:
    """Answer the reader's question in three sentences: which arm wins, what LoRA keeps, and what each costs."""
    metric, arms, costs = summary["main_metric"], summary["arms"], summary["costs"]
    best = max(arms, key=lambda arm: arms[arm][metric]["value"])
    first = f"{best} has the best {title_of(metric)} on test, {_interval(arms[best][metric])}"
    lines = [
        f"{first}; the frozen encoder has {_interval(arms['frozen'][metric])}." if "frozen" in arms else f"{first}."
    ]
    lora = next((arm for arm in arms if arm.startswith(("lora", "last:"))), None)
    if lora is None or "full" not in arms:
        return lines
    found = summary["differences"][lora]["full"][metric]
    kept = "" if found["share"] is None else f", {100 * found['share']:.1f} % of it"
    lines.append(
        f"{lora} is {verdict_of(found)} full fine-tuning: {found['gain']:+.3f} "
        f"({_signed(found['low'])} to {_signed(found['high'])}){kept}."
    )
    one, other = costs[lora], costs["full"]
    lines.append(
        f"{lora} stores {one['bytes_per_task'] / 1e6:.1f} MB for a data set and trains in "
        f"{one['seconds_per_training']:.0f} s, full {other['bytes_per_task'] / 1e6:.1f} MB in "
        f"{other['seconds_per_training']:.0f} s."
    )
    return lines


def verdict_of(difference: Mapping[str, Any]) -> str:
    """A paired difference in words. At a p-value of 0.05 or more it is within noise."""
    if difference["p_value"] >= 0.05:
        return "within noise of"
    return "above" if difference["gain"] > 0 else "below"


def _interval(value: Mapping[str, Any]) -> str:
    if value["low"] is None:
        return f"{value['value']:.3f}"
    return f"{value['value']:.3f} ({value['low']:.3f} to {value['high']:.3f})"


def _signed(number: float | None) -> str:
    return "–" if number is None else f"{number:+.3f}"


def _labels(data: PairData | TaskData) -> npt.NDArray[Any]:
    """Label of each test pair or text, in words, by which a map is coloured."""
    if isinstance(data, TaskData):
        return np.array(data.label_names, dtype=object)[data.test_labels]
    if data.test.scores is None:
        return np.full(len(data.test), "pair", dtype=object)
    return np.where(data.test.scores == 1, "label 1", "label 0").astype(object)


def _test_sets(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The main metric on all of test, without what train has, and by slice: a row for each part."""
    metric = summary["main_metric"]
    names = {"pair_in_train": "without pairs of train", "text_in_train": "without texts of train"}
    rows = [{"name": "all", "by_arm": {arm: of_arm[metric] for arm, of_arm in summary["arms"].items()}}]
    for column, parts in summary["parts"].items():
        for value, by_arm in parts.items():
            found = {arm: of_arm[metric] for arm, of_arm in by_arm.items() if metric in of_arm}
            if found:
                rows.append({"name": names.get(column, f"{column} = {value}"), "by_arm": found})
    return rows
