"""The table of the embedding adapters of a run, which the terminal, the model card and the report show."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pipeline.records import SIGNIFICANCE, TaskEntry
from pipeline.reports.formatting import percent, points

VECTOR_HEADINGS = (
    "MTEB task",
    "Family",
    "Metric",
    "Frozen",
    "Adapted",
    "Gain",
    "Adapted against frozen",
    "Best epoch",
)
"""Headings of ``vector_rows``, from left to right."""

HOW_VECTORS_ARE_MEASURED = (
    (
        "Frozen, adapted",
        "The main metric of the task, by mteb's own evaluator, on the vectors of the encoder without and with the "
        "adapter. Similarity is the cosine.",
    ),
    (
        "Gain",
        "Adapted minus frozen, with the 95 % interval of a paired bootstrap. It draws texts, because texts repeat over "
        "pairs: pairs that share a text are drawn together.",
    ),
    (
        "Adapted against frozen",
        "Above or below only if the paired test has p < 0.05 after Holm's correction over the tasks of the run, within "
        "noise otherwise.",
    ),
)
"""Explanation of each column."""


def vector_rows(entries: Sequence[TaskEntry]) -> list[tuple[str, ...]]:
    """Texts under ``VECTOR_HEADINGS``, one row per embedding adapter. Empty if a run has classifiers only."""
    return [_cells(entry) for entry in entries if entry.family != "classification"]


def verdict(entry: TaskEntry) -> str:
    """The adapted against the frozen encoder on the same test texts: above, below, or within noise."""
    p_value = entry.p_value if entry.p_value_holm is None else entry.p_value_holm
    if p_value is None or entry.gain is None:
        return "–"
    if p_value >= SIGNIFICANCE or entry.gain == 0:
        return "within noise"
    return "above" if entry.gain > 0 else "below"


def _cells(entry: TaskEntry) -> tuple[str, ...]:
    from pipeline.evaluation.metrics import title_of  # late, because it computes, and the driver starts sooner without

    return (
        entry.task,
        entry.family,
        title_of(entry.metric),
        percent(entry.frozen),
        _with_interval(percent(entry.adapted), entry.low, entry.high, shown=percent),
        "–"
        if entry.gain is None
        else _with_interval(points(entry.gain), entry.gain_low, entry.gain_high, shown=points),
        verdict(entry),
        f"{entry.best_epoch} of {entry.epochs}",
    )


def _with_interval(value: str, low: float | None, high: float | None, *, shown: Callable[[float | None], str]) -> str:
    return value if low is None or high is None else f"{value} ({shown(low)} to {shown(high)})"
