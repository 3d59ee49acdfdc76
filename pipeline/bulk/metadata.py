"""Key-value metadata of Parquet files: kept, extended by the new columns, or left out and named."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

_PANDAS, _SPARK = b"pandas", b"org.apache.spark.sql.parquet.row.metadata"
# Of a value that is no JSON, nested too deep, or another object than expected.
_NOT_UNDERSTOOD = (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError)


ARROW_SCHEMA = b"ARROW:schema"
"""Key of Arrow's own schema in a footer."""


_TEXT_LABELS = ("unicode", "string", "mixed", "mixed-integer", "empty")


_SPARK_TYPES = {"string": "string", "float": "float", "bool": "boolean"}


def is_utf8(value: bytes) -> bool:
    """Whether bytes can be read as text."""
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


def output_metadata(
    metadata: Mapping[bytes, bytes], *, kept: Sequence[str], added: Sequence[pa.Field], leave_out: bytes
) -> dict[bytes, bytes]:
    """The key-values of an input's footer for its output. Those by which pandas and Spark find the columns learn of the new ones.

    Args:
        metadata: Of the input's footer.
        kept: Columns of the input that the output has.
        added: Columns that the output adds.
        leave_out: A key that is the output's own.
    """
    values = {key: value for key, value in metadata.items() if key not in (ARROW_SCHEMA, leave_out)}
    for key, extend in _EXTENDED.items():
        if key in values:
            try:
                values[key] = json.dumps(extend(json.loads(values[key]), kept, added)).encode()
            except _NOT_UNDERSTOOD:
                del values[key]  # a reader that trusts it would fail, or not see the new columns
    return values


def keys_left_out(metadata: Mapping[bytes, bytes], kept: Sequence[str]) -> list[str]:
    """The key-values of an input's footer that its output cannot have, because nobody understands them."""
    there = output_metadata(metadata, kept=kept, added=(), leave_out=b"")
    return [key.decode() for key in _EXTENDED if key in metadata and key not in there]


def _has_text_names(pandas: dict[str, Any]) -> bool:
    levels = pandas["column_indexes"]
    return (
        len(levels) == 1
        and levels[0]["pandas_type"] in _TEXT_LABELS
        and levels[0]["numpy_type"] in ("object", "str", "string")
    )


def pandas_labels(metadata: Mapping[bytes, bytes]) -> str:
    """The type of the column labels that pandas wrote, where that is not one text each: the new columns have no such labels."""
    try:
        pandas = json.loads(metadata[_PANDAS])
        levels = pandas["column_indexes"]
        return "" if not levels or _has_text_names(pandas) else ", ".join(level["pandas_type"] for level in levels)
    except _NOT_UNDERSTOOD:
        return ""


def _extend_pandas(pandas: dict[str, Any], _kept: Sequence[str], added: Sequence[pa.Field]) -> dict[str, Any]:
    """With other than one text per column, pandas would try to read a new column's name as a number, a date or a tuple."""
    if pandas.get("column_indexes") and not _has_text_names(pandas):
        text = {
            "name": None,
            "field_name": None,
            "pandas_type": "unicode",
            "numpy_type": "object",
            "metadata": {"encoding": "UTF-8"},
        }
        pandas = pandas | {"column_indexes": [text]}
        for column in pandas["columns"]:
            column["name"] = column["field_name"]
    known = {"string": ("unicode", "object"), "float": ("float32", "float32"), "bool": ("bool", "bool")}
    new = [
        {"name": f.name, "field_name": f.name, "pandas_type": kinds[0], "numpy_type": kinds[1], "metadata": None}
        for f in added
        if (kinds := known.get(str(f.type), ("object", "object")))
    ]
    return pandas | {"columns": [*pandas["columns"], *new]}


def _extend_spark(spark: dict[str, Any], kept: Sequence[str], added: Sequence[pa.Field]) -> dict[str, Any]:
    """Spark takes these for the file's columns, whatever else is in it."""
    new = [{"name": field.name, "type": _spark_type(field.type), "nullable": True, "metadata": {}} for field in added]
    return spark | {"fields": [*(field for field in spark["fields"] if field["name"] in kept), *new]}


def _spark_type(kind: pa.DataType) -> Any:
    if pa.types.is_list(kind):
        return {"type": "array", "elementType": _spark_type(kind.value_type), "containsNull": True}
    if pa.types.is_struct(kind):
        fields = [
            {"name": field.name, "type": _spark_type(field.type), "nullable": True, "metadata": {}} for field in kind
        ]
        return {"type": "struct", "fields": fields}
    return _SPARK_TYPES[str(kind)]


_EXTENDED = {_PANDAS: _extend_pandas, _SPARK: _extend_spark}
