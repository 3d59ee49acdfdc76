"""Checks of a table of texts and labels, and its conversion to plain types."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.splits import label_key
from pipeline.errors import DataError, first_line
from pipeline.records import MtebTask


@dataclass(frozen=True)
class LoadedTask:
    """The data of one task, as read."""

    task: MtebTask
    """The task, with the revision of the data that was read."""
    mteb_task: Any
    """An ``mteb.abstasks.AbsTaskClassification`` that holds the data, with one subset."""
    splits: dict[str, Any]
    """pyarrow tables ``train``, ``test`` and optionally ``validation``.

    Columns: ``text`` (string), ``label`` (int64 or string), and optionally ``group`` and ``label_text`` (string). Only
    ``label_text`` may have nulls."""
    notes: tuple[str, ...] = ()
    """Notes for the user on how the data was read, one sentence each."""


def check_kinds(splits: dict[str, Any], name: str) -> None:
    """Check that the labels of all splits have one type.

    Raises: DataError: they differ.
    """
    kinds = {split: table["label"].type for split, table in splits.items()}
    if len(set(kinds.values())) > 1:
        found = ", ".join(f"{split} {kind}" for split, kind in kinds.items())
        raise DataError(
            f"{name}: labels are numbers in one split and strings in another ({found}); "
            "write them alike (CSV has only strings)"
        )


def checked_table(table: Any, task: MtebTask, where: str) -> Any:
    """Return the columns of a table with the names and types of ``LoadedTask.splits``.

    Raises: DataError: the table is empty, has nulls, or a column has another type.
    """
    if table.num_rows == 0:
        raise DataError(f"{where} is empty; expected at least one text")
    text = as_strings(table[task.text_column], where, task.text_column)
    if text is None:
        kind = table[task.text_column].type
        raise DataError(
            f"{where}: column {task.text_column!r} is {kind}, not text; set text_column to a column of strings"
        )
    columns = {"text": text, "label": _checked_label(table[task.label_column], task, where)}
    if task.group_column is not None:
        columns["group"] = group_names(table[task.group_column], task.group_column, where)
    for column, values in zip(columns_by_key(task).values(), columns.values(), strict=True):
        _refuse_nulls(values, column, where)
    if (
        "label_text" in table.column_names
        and (names := as_strings(table["label_text"], where, "label_text")) is not None
    ):
        columns["label_text"] = names
    checked = pa.table(columns)
    try:
        checked.validate(full=True)
    except pa.ArrowInvalid as error:
        raise DataError(f"{where}: holds bytes that are not UTF-8: {first_line(error)}; write the file again") from None
    return checked


def text_values(values: Any, name: str, where: str) -> list[str]:
    """Return a pyarrow column of texts as a list.

    Args:
        values: A pyarrow array.
        name: Name of the column, for messages.
        where: The table, for messages.
    Raises: DataError: it is not of text, or a text is missing.
    """
    strings = as_strings(values, where, name)
    if strings is None and not pa.types.is_null(values.type):
        raise DataError(f"{where}: column {name!r} is {values.type}, not text; set columns to columns of strings")
    return whole_values(values if strings is None else strings, name, where)


def whole_values(values: Any, name: str, where: str) -> list[str]:
    """Return a pyarrow column of strings as a list; arguments as ``text_values``.

    Raises: DataError: a value is missing, or is not UTF-8.
    """
    _refuse_nulls(values, name, where)
    try:
        values.validate(full=True)
    except pa.ArrowInvalid as error:
        raise DataError(f"{where}: holds bytes that are not UTF-8: {first_line(error)}; write the file again") from None
    return values.to_pylist()


def _refuse_nulls(values: Any, name: str, where: str) -> None:
    if values.null_count:
        first = pc.index(pc.is_null(values), True).as_py() + 1
        count = f"{values.null_count} of {len(values)} rows have no value"
        raise DataError(f"{where}: column {name!r}: {count}; remove these rows or fill them (the first is row {first})")


def as_strings(values: Any, where: str, column: str) -> Any | None:
    """Return the values as pyarrow strings; None if they are not text. Bytes are text if they are UTF-8.

    Args:
        values: A pyarrow array.
        where: The table, for messages.
        column: Name of the column, for messages.
    Raises: DataError: they are bytes that are not UTF-8.
    """
    values = plain(values)
    kind = values.type
    is_bytes = pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)
    if not is_bytes and not (
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    ):
        return None
    try:
        return values.cast(pa.string())
    except pa.ArrowInvalid as error:
        fault = f"column {column!r} holds bytes that are not UTF-8: {first_line(error)}"
        raise DataError(f"{where}: {fault}; write the file again, or choose another column") from None


def plain(values: Any) -> Any:
    """Return a pyarrow array without dictionary, and without an extension type such as JSON."""
    if isinstance(values.type, pa.BaseExtensionType):
        values = values.cast(values.type.storage_type)
    return values.cast(values.type.value_type) if pa.types.is_dictionary(values.type) else values


def _checked_label(values: Any, task: MtebTask, where: str) -> Any:
    """Return the labels as strings or int64. An invisible string or NaN counts as null."""
    strings = as_strings(values, where, task.label_column)
    if strings is not None:
        blank = [label for label in pc.unique(strings).to_pylist() if label is not None and not label_key(label)]
        return (
            pc.if_else(pc.is_in(strings, value_set=pa.array(blank, pa.string())), None, strings) if blank else strings
        )
    where, values = f"{where}: column {task.label_column!r}", plain(values)
    kind = values.type
    if pa.types.is_boolean(kind):
        return values.cast(pa.string())
    if pa.types.is_floating(kind):
        values = pc.if_else(pc.is_nan(values), None, values)
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind):
        try:
            return values.cast(pa.int64())
        except pa.ArrowInvalid as error:
            expected = "whole numbers" if pa.types.is_floating(kind) else "numbers of 64 bits with a sign"
            raise DataError(
                f"{where} is {kind}, but not of {expected}: {first_line(error)}; write the labels as strings"
            ) from None
    if (
        pa.types.is_list(kind)
        or pa.types.is_large_list(kind)
        or pa.types.is_fixed_size_list(kind)
        or pa.types.is_list_view(kind)
    ):
        raise DataError(
            f"{where} is {kind}, which means several labels for a text; "
            "expected one label for each text, several are not supported yet"
        )
    raise DataError(f"{where} is {kind}; expected strings, whole numbers or booleans; set label_column")


def group_names(values: Any, column: str, where: str) -> Any:
    """Return the groups as strings that are equal if the values are. An empty string or NaN counts as null.

    The files of a split may hold one value in several types: pandas writes 7 as 7.0 if the column has gaps.

    Args:
        values: A pyarrow array.
        column: Name of the column, for messages.
        where: The table, for messages.
    Raises: DataError: a value is not one value but several.
    """
    strings = as_strings(values, where, column)
    if strings is None:
        strings = _names_of_values(values, f"{where}: column {column!r}")
    return pc.if_else(pc.equal(strings, ""), None, strings)


def _names_of_values(values: Any, where: str) -> Any:
    values = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
    kind = plain(values).type
    try:
        if pa.types.is_fixed_size_binary(kind):  # includes Parquet's UUID, whose values are objects
            return pa.array(
                [value.hex() if isinstance(value, bytes) else value and str(value) for value in values.to_pylist()],
                pa.string(),
            )
        values = plain(values)
        if pa.types.is_decimal(kind):
            return pa.array(
                [None if value is None else f"{value.normalize():f}" for value in values.to_pylist()], pa.string()
            )
        if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
            return values.cast(pa.timestamp("us", getattr(kind, "tz", None))).cast(pa.string())
        if pa.types.is_floating(kind):
            values = pc.if_else(pc.is_nan(values), None, values.cast(pa.float64()))
            is_whole = pc.and_(pc.equal(pc.floor(values), values), pc.less(pc.abs(values), 2.0**63))
            return pc.if_else(
                is_whole, pc.if_else(is_whole, values, 0.0).cast(pa.int64()).cast(pa.string()), values.cast(pa.string())
            )
        return values.cast(pa.string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise DataError(f"{where} is {kind}; expected one value for each text; set group_column") from None


def columns_by_key(task: MtebTask) -> dict[str, str]:
    """Return config key -> column name, for the columns that the files must have."""
    grouped = {} if task.group_column is None else {"group_column": task.group_column}
    return {"text_column": task.text_column, "label_column": task.label_column, **grouped}


def with_revision(task: MtebTask, revision: str) -> MtebTask:
    """Return the task with its resolved revision. Columns of text and label leave nothing undecided."""
    return task.changed(revision=revision, undecided=())
