"""JSON Lines files of texts and labels."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from pipeline.errors import DataError, first_line
from pipeline.labelled_files.column_names import check_columns, wanted_columns

_JSON_KINDS = {
    str: "a string",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "an object",
}


def read_json_lines(text: str, path: str, columns: Mapping[str, str]) -> Any:
    """Read a JSON Lines file as a pyarrow table. NaN counts as null.

    Args:
        text: Content of the file, one object on each line.
        path: Name of the file, for messages.
        columns: Config key -> column name.
    Raises: DataError: a line is not an object, a column is missing or holds several types.
    """
    rows, lines, names = [], [], dict[str, None]()
    for number, row in _objects(text, path):
        names |= dict.fromkeys(row)
        rows.append(tuple(map(row.get, (*columns.values(), "label_text"))))
        lines.append(number)
    check_columns(list(names), path, columns)
    wanted = wanted_columns(list(names), columns)
    by_name = dict(zip((*columns.values(), "label_text"), zip(*rows, strict=True), strict=True))
    return pa.table({name: _json_column(by_name[name], lines, f"{path}: column {name!r}") for name in wanted})


def keys_of_json_lines(text: str, path: str) -> list[str]:
    """Return the keys of all objects, in the order of their first occurrence.

    Args:
        text: Content of the file, one object on each line.
        path: Name of the file, for messages.
    Raises: DataError: a line is not an object.
    """
    return list(dict.fromkeys(key for _, row in _objects(text, path) for key in row))


def _objects(text: str, path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield each object with the number of its line.

    Raises: DataError: a line is not an object.
    """
    decode = json.JSONDecoder(object_pairs_hook=_object, parse_constant=lambda name: None).decode
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = decode(line)
        except json.JSONDecodeError as error:
            fault = f"line {number} is not JSON: {error.msg} at column {error.colno}"
            raise DataError(f"{path}: {fault}; expected one object on each line") from None
        except (ValueError, RecursionError) as error:  # a repeated key, thousands of digits, thousands of brackets
            raise DataError(
                f"{path}: line {number}: {first_line(error).partition(';')[0]}; write the file again"
            ) from None
        if not isinstance(row, dict):
            raise DataError(
                f"{path}: line {number} is {_JSON_KINDS.get(type(row), 'null')}; expected an object, such as {{...}}"
            )
        yield number, row


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Raises: ValueError: a key occurs twice."""
    values = dict(pairs)
    if len(values) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(
            f"the key {next(name for name, count in counts.items() if count > 1)!r} occurs twice in an object"
        )
    return values


def _json_column(values: Sequence[Any], lines: Sequence[int], where: str) -> Any:
    """Return the values of a column as an array.

    Raises: DataError: they have several types, or cannot be stored.
    """
    first: dict[str, int] = {}
    for value, line in zip(values, lines, strict=True):
        if value is not None:
            first.setdefault(_JSON_KINDS[type(value)], line)
    if len(first) > 1:
        found = " and ".join(f"{kind} (line {line})" for kind, line in first.items())
        raise DataError(f"{where} holds {found}; write them alike")
    if "a list" in first or "an object" in first:  # refused later; only the type matters, for the message
        return pa.nulls(len(values), pa.list_(pa.null()) if "a list" in first else pa.struct([]))
    try:
        return pa.array(values)
    except UnicodeEncodeError:
        line = next(
            line for value, line in zip(values, lines, strict=True) if value is not None and not _is_encodable(value)
        )
        raise DataError(
            f"{where}: line {line} holds half a surrogate pair (\\ud800 to \\udfff), which is not a character"
        ) from None
    except (OverflowError, pa.ArrowInvalid):
        raise DataError(f"{where} holds a whole number that needs more than 64 bits; write it as a string") from None


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
