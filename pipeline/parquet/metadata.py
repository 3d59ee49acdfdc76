"""Key-value metadata of Parquet files: kept, extended by the new columns, or dropped and reported."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

_PANDAS, _SPARK = b"pandas", b"org.apache.spark.sql.parquet.row.metadata"
# Raised for a value that is not JSON, is nested too deep, or has another shape than expected.
_NOT_UNDERSTOOD = (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError)
ARROW_SCHEMA = b"ARROW:schema"
"""Key of the Arrow schema in a footer."""
_TEXT_LABELS = ("unicode", "string", "mixed", "mixed-integer", "empty")
# Spark reads unsigned bytes as short. It reads no half-precision numbers.
_SPARK_TYPES = {"string": "string", "float": "float", "bool": "boolean", "int8": "byte", "uint8": "short"}


def is_utf8(value: bytes) -> bool:
    """Return whether bytes are UTF-8."""
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


def output_metadata(
    metadata: Mapping[bytes, bytes], *, kept: Sequence[str], added: Sequence[pa.Field], leave_out: bytes
) -> dict[bytes, bytes]:
    """Return the key-values of the output's footer, from those of the input's.

    The entries by which pandas and Spark find columns are extended by the new ones.

    Args:
        metadata: Key-values of the input's footer.
        kept: Input columns that the output keeps.
        added: Columns that the output adds.
        leave_out: A key that the output sets itself.
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
    """Return the keys of an input's footer that its output drops, because their values cannot be parsed."""
    remaining = output_metadata(metadata, kept=kept, added=(), leave_out=b"")
    return [key.decode() for key in _EXTENDED if key in metadata and key not in remaining]


def _has_text_names(pandas: dict[str, Any]) -> bool:
    levels = pandas["column_indexes"]
    return (
        len(levels) == 1
        and levels[0]["pandas_type"] in _TEXT_LABELS
        and levels[0]["numpy_type"] in ("object", "str", "string")
    )


def pandas_labels(metadata: Mapping[bytes, bytes]) -> str:
    """Return the type of the column labels that pandas wrote; empty if each is one text, as for the new columns."""
    try:
        pandas = json.loads(metadata[_PANDAS])
        levels = pandas["column_indexes"]
        return "" if not levels or _has_text_names(pandas) else ", ".join(level["pandas_type"] for level in levels)
    except _NOT_UNDERSTOOD:
        return ""


def _extend_pandas(pandas: dict[str, Any], _kept: Sequence[str], added: Sequence[pa.Field]) -> dict[str, Any]:
    """Add the new columns to the entry of pandas.

    Column labels become texts. Otherwise pandas would try to parse a new column's name as a number, a date or a tuple.
    """
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
    pandas_types = {"string": ("unicode", "object"), "float": ("float32", "float32"), "bool": ("bool", "bool")}
    new = [
        {"name": f.name, "field_name": f.name, "pandas_type": kinds[0], "numpy_type": kinds[1], "metadata": None}
        for f in added
        if (kinds := pandas_types.get(str(f.type), ("object", "object")))
    ]
    return pandas | {"columns": [*pandas["columns"], *new]}


def _extend_spark(spark: dict[str, Any], kept: Sequence[str], added: Sequence[pa.Field]) -> dict[str, Any]:
    """Add the new columns to the entry of Spark, which reads no column that is not listed."""
    new = [{"name": field.name, "type": _spark_type(field.type), "nullable": True, "metadata": {}} for field in added]
    return spark | {"fields": [*(field for field in spark["fields"] if field["name"] in kept), *new]}


def _spark_type(kind: pa.DataType) -> Any:
    if pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
        return {"type": "array", "elementType": _spark_type(kind.value_type), "containsNull": True}
    if pa.types.is_struct(kind):
        fields = [
            {"name": field.name, "type": _spark_type(field.type), "nullable": True, "metadata": {}} for field in kind
        ]
        return {"type": "struct", "fields": fields}
    return _SPARK_TYPES[str(kind)]


_EXTENDED = {_PANDAS: _extend_pandas, _SPARK: _extend_spark}
