"""Values of a result or of a history: one row per measured number, also for runs that older versions made."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pipeline.records import MainMetric, ScoreRow, TaskResult, ValueColumn, ValueRow

_OF_SCORES = ("accuracy", "macro_f1", "average_precision")


def values_of(result: TaskResult) -> tuple[ValueRow, ...]:
    """The values of a result. Older versions wrote score rows only, from which they are then made."""
    return result.values or values_of_scores(result.scores)


def values_of_scores(rows: Sequence[ScoreRow]) -> tuple[ValueRow, ...]:
    """The values that score rows hold: accuracy with its interval, macro-F1, and average precision where it exists."""
    main = {(row.run_id, row.mteb_task): row.main_metric for row in rows if row.main_metric is not None}
    return tuple(
        _value_of(row, metric, main.get((row.run_id, row.mteb_task), "accuracy"))
        for row in rows
        for metric in _OF_SCORES
        if getattr(row, metric) is not None
    )


def find_value(values: Iterable[ValueRow], column: ValueColumn, metric: str = "accuracy") -> ValueRow | None:
    """The value of one column and metric over all test texts; None if it was not measured."""
    return next(
        (row for row in values if (row.column, row.metric, row.width, row.slice) == (column, metric, None, None)), None
    )


def main_value(values: Iterable[ValueRow], column: ValueColumn) -> ValueRow | None:
    """The main metric of one column over all test texts and the whole width; None if it was not measured."""
    whole = (row for row in values if row.column == column and row.main and row.slice is None and row.width is None)
    return next(whole, None)


def _value_of(row: ScoreRow, metric: str, main: MainMetric) -> ValueRow:
    has_interval = metric == "accuracy"
    return ValueRow(
        run_id=row.run_id,
        mteb_task=row.mteb_task,
        split=row.split,
        column=row.column,
        metric=metric,
        value=getattr(row, metric),
        low=row.low if has_interval else None,
        high=row.high if has_interval else None,
        num_texts=row.num_texts,
        main=metric == main,
    )
