"""Scores and labels of pairs: read as numbers, and brought to 0..1 once for all splits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.data.families import PairKind
from pipeline.data.table_checks import as_strings, group_names, plain
from pipeline.errors import DataError
from pipeline.printable import counted

_BOOLEANS = {"true": "1", "false": "0"}
_LONGEST_SLICE = 1024  # characters, as in a table of scores
_REMEDY = "give every pair a number, or remove the row"


@dataclass(frozen=True)
class Scale:
    """Meaning of the numbers of a task, and the range that becomes 0..1."""

    kind: PairKind
    range: tuple[float, float] | None
    """Numbers that become 0 and 1. None for labels, which are 0 and 1 already, and without numbers."""

    def apply(self, values: NDArray[np.float64] | None) -> NDArray[np.float64] | None:
        """Return the numbers within 0..1."""
        if values is None or self.range is None:
            return values
        low, high = self.range
        return (values - low) / (high - low)


def read_values(values: Any, where: str) -> NDArray[np.float64]:
    """Read a column of scores or labels: numbers, booleans, or strings of either; float64 (pairs,).

    Args:
        values: A pyarrow array.
        where: The column, for messages.
    Raises: DataError: a value is missing, infinite or not a number.
    """
    strings = as_strings(values, where, "of scores")
    if strings is not None:
        return _parsed(strings.to_pylist(), where)
    values = plain(values)
    if pa.types.is_boolean(values.type):
        values = values.cast(pa.int8())
    kind = values.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)):
        if values.null_count and values.null_count == len(values):
            raise DataError(f"{where} has no value in row 1; {_REMEDY}")
        raise DataError(f"{where} is {kind}; expected numbers; set score_column")
    numbers = np.array(pc.cast(values, pa.float64(), safe=False).fill_null(np.nan).to_numpy(zero_copy_only=False))
    _refuse_infinite(numbers, where)
    return numbers


def slice_values(values: Any, name: str, where: str) -> list[str]:
    """Read a column of slices as strings. Null becomes an empty string.

    Args:
        values: A pyarrow array.
        name: Name of the column.
        where: The file, for messages.
    Raises: DataError: the values are no categories.
    """
    names = [value or "" for value in group_names(values, name, where).to_pylist()]
    if too_long := next((value for value in names if len(value) > _LONGEST_SLICE), None):
        raise DataError(
            f"{where}: column {name!r} of slices has a value of {len(too_long):,} characters; "
            f"at most {_LONGEST_SLICE:,} are read; name a column of categories"
        )
    return names


def find_scale(values: Mapping[str, NDArray[np.float64] | None], name: str) -> Scale:
    """Find the meaning of the numbers of all splits, and their common range.

    Numbers that are all 0 or 1 are labels. Other numbers within 0..1 stay as they are. All others are brought to 0..1
    by the smallest and the largest of all splits.

    Args:
        values: Split -> its numbers. None: every pair of the split is positive.
        name: Name of the task, for messages.
    Raises: DataError: a split has a single score or label.
    """
    given = {split: numbers for split, numbers in values.items() if numbers is not None}
    if not given:
        return Scale("positives", None)
    every = np.unique(np.concatenate(list(given.values())))
    is_labels = set(every.tolist()) <= {0.0, 1.0}
    for split, numbers in given.items():
        if len(distinct := np.unique(numbers)) < 2:
            raise DataError(f"{name}: {split} has {_fault_of_one(float(distinct[0]), len(numbers), is_labels)}")
    if is_labels:
        return Scale("labels", None)
    low, high = float(every[0]), float(every[-1])
    if not np.isfinite(high - low):
        raise DataError(f"{name}: the scores go from {low:g} to {high:g}, a range that cannot be computed with")
    return Scale("scores", (0.0, 1.0) if low >= 0 and high <= 1 else (low, high))


def _fault_of_one(value: float, count: int, is_labels: bool) -> str:
    if is_labels and value == 0:
        return f"no positive pair: the label of all {count} pairs is 0; expected pairs of both labels, 0 and 1"
    if is_labels:
        return f"one label only: that of all {count} pairs is 1; expected pairs of both labels, 0 and 1"
    return f"the score {value:g} for all {count} pairs; expected different scores; check score_column"


def _parsed(strings: list[str | None], where: str) -> NDArray[np.float64]:
    numbers = np.empty(len(strings))
    for row, text in enumerate(strings):
        try:
            numbers[row] = float(_BOOLEANS.get((text or "").strip().lower(), text or ""))
        except ValueError:
            shown = "no value" if not text or not text.strip() else repr(text[:40])
            raise DataError(f"{where} has {shown} in row {row + 1}, which is not a number; {_REMEDY}") from None
    _refuse_infinite(numbers, where)
    return numbers


def _refuse_infinite(numbers: NDArray[np.float64], where: str) -> None:
    if len(rows := np.flatnonzero(~np.isfinite(numbers))):
        shown = "no value" if np.isnan(numbers[rows[0]]) else "an infinite number"
        more = f", and {counted(len(rows) - 1, 'more such row')}" if len(rows) > 1 else ""
        raise DataError(f"{where} has {shown} in row {rows[0] + 1}{more}; {_REMEDY}")
