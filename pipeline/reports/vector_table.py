"""The table of the embedding adapters of a run, which the terminal, the model card and the report show."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from pipeline.history.values import values_of
from pipeline.records import SIGNIFICANCE, TaskEntry, TaskResult, ValueRow
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

DETAIL_HEADINGS = ("Metric", "Test set", "Size", "Frozen", "Adapted", "Gain")
"""Headings of ``vector_details``, from left to right."""

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
    (
        "Test set",
        "All of test, and parts of it: the pairs that do not stand in train, those that share no text with train, and "
        "each value of the slices that the config names. The size counts pairs, queries or texts. A part of fewer than "
        "20 has no score. F1 and accuracy are at a threshold that validation chose.",
    ),
)
"""Explanation of each column."""

_NOT_PERCENT = ("margin", "cohens_d")
"""Metrics that are shown as they are, because they are no shares."""

_CHOSEN = {"validation": "", "test": ", chosen on test †", "last_epoch": ", the last"}
_PARTS = {"pair_in_train": "without pairs of train", "text_in_train": "without texts of train"}


def vector_rows(entries: Sequence[TaskEntry]) -> list[tuple[str, ...]]:
    """Texts under ``VECTOR_HEADINGS``, one row per embedding adapter. Empty if a run has classifiers only."""
    return [_cells(entry) for entry in entries if entry.family != "classification"]


def vector_details(result: TaskResult) -> list[tuple[str, ...]]:
    """Texts under ``DETAIL_HEADINGS``: every metric on test, and the main metric by width and by part of test."""
    values = [row for row in values_of(result) if row.column in ("frozen", "adapted")]
    frozen = {_place(row): row for row in values if row.column == "frozen"}
    adapted = {_place(row): row for row in values if row.column == "adapted"}
    shown = [row for row in _shown(list(frozen.values())) if _place(row) in adapted]
    return [_detail(row, adapted[_place(row)], adapted.get((f"{row.metric}_gain", *_place(row)[1:]))) for row in shown]


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
        f"{entry.best_epoch} of {entry.epochs}" + _CHOSEN[entry.selected_on],
    )


def _place(row: ValueRow) -> tuple[str, int | None, str | None, str | None]:
    return row.metric, row.width, row.slice, row.slice_value


def _shown(rows: Sequence[ValueRow]) -> Iterator[ValueRow]:
    scores = [row for row in rows if not row.metric.endswith("_threshold") or row.metric == "f1_best_threshold"]
    yield from (row for row in scores if row.slice is None and row.width is None)
    yield from (row for row in scores if row.main and row.slice is None and row.width is not None)
    yield from (row for row in scores if row.main and row.slice is not None and row.width is None)


def _detail(frozen: ValueRow, adapted: ValueRow, gain: ValueRow | None) -> tuple[str, ...]:
    from pipeline.evaluation.metrics import title_of  # late, because it computes, and the driver starts sooner without

    shown = _plain if frozen.metric in _NOT_PERCENT else percent
    part = "all" if frozen.slice is None else _PARTS.get(frozen.slice, f"{frozen.slice} = {frozen.slice_value}")
    return (
        title_of(frozen.metric) + (f", {frozen.width} dimensions" if frozen.width else ""),
        part,
        f"{frozen.num_texts:,}",
        *(_with_interval(shown(row.value), row.low, row.high, shown=shown) for row in (frozen, adapted)),
        "–" if gain is None else _with_interval(points(gain.value), gain.low, gain.high, shown=points),
    )


def _plain(value: float | None) -> str:
    return "–" if value is None else f"{value:+.3f}"


def _with_interval(value: str, low: float | None, high: float | None, *, shown: Callable[[float | None], str]) -> str:
    return value if low is None or high is None else f"{value} ({shown(low)} to {shown(high)})"
