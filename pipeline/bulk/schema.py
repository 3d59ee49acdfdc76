"""One schema for all files of a bulk job and for its output: what is kept, what cannot be, and the metadata that lie in a footer."""

from __future__ import annotations

import json
import re
from base64 import b64decode
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import DataError

ARROW_SCHEMA = b"ARROW:schema"
"""Key of Arrow's own schema in a footer."""
Kinds = Mapping[str, Sequence[str]]
"""Top-level column -> the type of each leaf in it: its logical type, or the physical one where there is none."""

_STRINGS = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
_BINARIES = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
_LISTS = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
_TIME_UNITS = ("s", "ms", "us", "ns")
_WKB, _GEOMETRIES, _VARIANT = "geoarrow.wkb", ("Geometry", "Geography"), "Variant"
_EXTENSION_NAME, _EXTENSION_METADATA = b"ARROW:extension:name", b"ARROW:extension:metadata"
_PANDAS, _SPARK = b"pandas", b"org.apache.spark.sql.parquet.row.metadata"
# Of a value that is no JSON, nested too deep, or another object than expected.
_NOT_UNDERSTOOD = (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError)
_TEXT_LABELS = ("unicode", "string", "mixed", "mixed-integer", "empty")
_SPARK_TYPES = {"string": "string", "float": "float", "bool": "boolean"}
# Parquet's older annotation of a time stays: it says nothing of time zones, and DuckDB and Polars take it for one without.
_FLAGS = re.compile(r", (?:is_from_converted_type=false|force_set_converted_type=\w+)")
# What Parquet's integers are where nothing is said about them.
_PLAIN = {"Int(bitWidth=32, isSigned=true)": "int32", "Int(bitWidth=64, isSigned=true)": "int64"}


@dataclass(frozen=True)
class FileSchema:
    """The schema of one file."""

    path: str
    schema: pa.Schema


def text_type(kind: pa.DataType) -> bool:
    """Whether a column of this type holds text."""
    kind = _plain(kind)
    return any(is_one(kind) for is_one in _STRINGS)


def binary_type(kind: pa.DataType) -> bool:
    """Whether a column of this type holds bytes, which may be text."""
    kind = _plain(kind)
    return any(is_one(kind) for is_one in _BINARIES)


def is_utf8(value: bytes) -> bool:
    """Whether bytes can be read as text."""
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


def join_schemas(files: Sequence[FileSchema], columns: Sequence[str] | None) -> pa.Schema:
    """The schema that the kept columns of all files can be read in without a loss.

    A column takes the wider of two integer, floating-point, string or time types. One that a file lacks is null there. The order is that
    of the first file, with what only later files have behind.

    Args:
        files: At least one.
        columns: Those that are kept; all where left out.
    Raises: DataError: two files, named with the column, that cannot be read together so.
    """
    joined: dict[str, tuple[pa.Field, FileSchema]] = {}
    spelt: dict[str, str] = {}
    chosen = None if columns is None else set(columns)
    different = list({id(file.schema): file for file in files}.values())  # most files share theirs
    for file in different:
        for field in file.schema:
            if chosen is not None and field.name not in chosen:
                continue
            if field.name in joined:
                joined[field.name] = _joined(*joined[field.name], field, file)
                continue
            known = joined.get(spelt.setdefault(field.name.casefold(), field.name))
            if known is not None and known[1] is not file:
                raise DataError(
                    f"{file.path}: column {field.name!r} is {known[0].name!r} in {known[1].path}; give both one name, or {_TWO_JOBS}"
                )
            joined[field.name] = field, file
    names = [(file, set(file.schema.names)) for file in different]
    for field, origin in joined.values():
        lacking = next((file for file, there in names if field.name not in there), None)
        if lacking is not None and not field.nullable:
            raise DataError(f"{lacking.path}: column {field.name!r} is missing, and in {origin.path} it is required; {_TWO_JOBS}")
    return pa.schema([field for field, _ in joined.values()])


_TWO_JOBS = "label them in two jobs, or choose the columns that they share with --columns"


def _joined(field: pa.Field, origin: FileSchema, other: pa.Field, file: FileSchema) -> tuple[pa.Field, FileSchema]:
    kind = wider(field.type, other.type)
    if kind is None:
        raise DataError(
            f"{file.path}: column {field.name!r} is {other.type}, and {field.type} in {origin.path}; "
            f"these two cannot be joined without a loss; {_TWO_JOBS}"
        )
    return field.with_type(kind).with_nullable(field.nullable or other.nullable), origin


def wider(one: pa.DataType, two: pa.DataType) -> pa.DataType | None:
    """The type that holds every value of both; none where one of them would lose something."""
    if one == two:
        return one
    if pa.types.is_null(one) or pa.types.is_null(two):
        return two if pa.types.is_null(one) else one
    if pa.types.is_dictionary(one) or pa.types.is_dictionary(two):
        return _wider_dictionary(one, two)
    for family, widest in ((_STRINGS, pa.large_string()), (_BINARIES, pa.large_binary())):
        if all(any(is_one(kind) for is_one in family) for kind in (one, two)):
            return widest
    if pa.types.is_integer(one) and pa.types.is_integer(two):
        return _wider_integer(one, two)
    if pa.types.is_floating(one) and pa.types.is_floating(two):
        return max(one, two, key=lambda kind: kind.bit_width)
    if pa.types.is_decimal(one) and pa.types.is_decimal(two):
        return _wider_decimal(one, two)
    return _wider_time(one, two) or _wider_nested(one, two)


def _wider_dictionary(one: pa.DataType, two: pa.DataType) -> pa.DataType | None:
    values = wider(*(kind.value_type if pa.types.is_dictionary(kind) else kind for kind in (one, two)))
    if values is None or not (pa.types.is_dictionary(one) and pa.types.is_dictionary(two)):
        return values
    return pa.dictionary(pa.int32(), values) if not one.ordered and not two.ordered else None  # the order of categories is each file's own


def _wider_integer(one: pa.DataType, two: pa.DataType) -> pa.DataType | None:
    signed = [kind for kind in (one, two) if pa.types.is_signed_integer(kind)]
    if len(signed) != 1:
        return max(one, two, key=lambda kind: kind.bit_width)
    unsigned = two if signed[0] == one else one
    width = max(signed[0].bit_width, 2 * unsigned.bit_width)
    return {16: pa.int16(), 32: pa.int32(), 64: pa.int64()}.get(width)


def _wider_decimal(one: pa.DataType, two: pa.DataType) -> pa.DataType | None:
    scale = max(one.scale, two.scale)
    precision = scale + max(one.precision - one.scale, two.precision - two.scale)
    return pa.decimal128(precision, scale) if precision <= 38 else pa.decimal256(precision, scale) if precision <= 76 else None


def _wider_time(one: pa.DataType, two: pa.DataType) -> pa.DataType | None:
    """Of times of day, any two. Of timestamps and durations those up to microseconds: nanoseconds have room for 585 years only."""
    if pa.types.is_time(one) and pa.types.is_time(two):
        unit = max(one.unit, two.unit, key=_TIME_UNITS.index)
        return pa.time32(unit) if unit in ("s", "ms") else pa.time64(unit)
    for is_one, make in ((pa.types.is_timestamp, pa.timestamp), (pa.types.is_duration, pa.duration)):
        if is_one(one) and is_one(two) and "ns" not in (one.unit, two.unit):
            zones = [kind.tz for kind in (one, two) if pa.types.is_timestamp(kind)]
            unit = max(one.unit, two.unit, key=_TIME_UNITS.index)
            return None if len(set(zones)) > 1 else make(unit, *zones[:1])
    return None


def _wider_nested(one: pa.DataType, two: pa.DataType) -> pa.DataType | None:
    if pa.types.is_map(one) and pa.types.is_map(two):
        key, item = wider(one.key_type, two.key_type), wider(one.item_type, two.item_type)
        if key is None or item is None or one.keys_sorted != two.keys_sorted:
            return None
        item_field = one.item_field.with_type(item).with_nullable(one.item_field.nullable or two.item_field.nullable)
        return pa.map_(one.key_field.with_type(key), item_field, keys_sorted=one.keys_sorted)
    if all(any(is_one(kind) for is_one in _LISTS) for kind in (one, two)):
        value = wider(one.value_type, two.value_type)
        if value is None:
            return None
        element = one.value_field.with_type(value).with_nullable(one.value_field.nullable or two.value_field.nullable)
        if pa.types.is_fixed_size_list(one) and pa.types.is_fixed_size_list(two) and one.list_size == two.list_size:
            return pa.list_(element, one.list_size)
        return pa.large_list(element) if pa.types.is_large_list(one) or pa.types.is_large_list(two) else pa.list_(element)
    if pa.types.is_struct(one) and pa.types.is_struct(two) and [f.name for f in one] == [f.name for f in two]:
        parts = [(a, b, wider(a.type, b.type)) for a, b in zip(one, two, strict=True)]
        if all(kind is not None for _, _, kind in parts):
            return pa.struct([a.with_type(kind).with_nullable(a.nullable or b.nullable) for a, b, kind in parts])
    return None


def _plain(kind: pa.DataType) -> pa.DataType:
    """The type of the values themselves."""
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    return kind.value_type if pa.types.is_dictionary(kind) else kind


# Writing


@dataclass(frozen=True)
class WrittenAs:
    """How a table is given to pyarrow's writer so that it keeps all that it can express."""

    schema: pa.Schema
    options: dict[str, Any]
    metadata: dict[bytes, bytes]
    """Key-values to be added to the footer at the end."""

    def table(self, table: pa.Table) -> pa.Table:
        """The table in the schema's types."""
        columns = [_in_type(column, field.type) for column, field in zip(table.columns, self.schema, strict=True)]
        return pa.table(columns, schema=self.schema)


def written_as(schema: pa.Schema, kinds: Kinds, metadata: dict[bytes, bytes], *, with_arrow_schema: bool) -> WrittenAs:
    """Choose the writer's types and options.

    Args:
        schema: Of the output.
        kinds: Of the input.
        metadata: Key-values of the output's footer.
        with_arrow_schema: Whether the input's footer has Arrow's own schema too; some readers take other types where it is there.
    """
    fields = [_as_geometry(field) if kinds.get(field.name, [""])[0].startswith(_GEOMETRIES) else field for field in schema]
    times = [kind for name in schema.names for kind in kinds.get(name, ()) if kind.startswith("Time(")]
    adjusted = bool(times) and all("isAdjustedToUTC=true" in kind for kind in times)
    options = {"write_time_adjusted_to_utc": adjusted, "store_schema": with_arrow_schema}
    if with_arrow_schema:  # then pyarrow looks for them there alone
        return WrittenAs(pa.schema(fields, metadata=metadata), options, {})
    return WrittenAs(pa.schema(fields), options, metadata)


def _in_type(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    if not isinstance(kind, _Wkb):
        return column.cast(kind)
    return pa.chunked_array([pa.ExtensionArray.from_storage(kind, chunk) for chunk in column.chunks], type=kind)


def types_lost_in_reading(schema: pa.Schema, kinds: Kinds, metadata: Mapping[bytes, bytes]) -> dict[str, str]:
    """Column -> ``date64[ms] becomes date32[day]``, of each that pyarrow reads as another type than it was written from.

    Args:
        schema: As pyarrow reads the file.
        kinds: Of the same file; INT96 columns are a matter of their own.
        metadata: Of the file's footer, where Arrow's own schema may be.
    """
    try:
        written = pa.ipc.read_schema(pa.py_buffer(b64decode(metadata[ARROW_SCHEMA])))
    except (KeyError, ValueError, pa.ArrowException):
        return {}
    before = dict(zip(written.names, written.types, strict=True))
    pairs = {field.name: (before[field.name], field.type) for field in schema if field.name in before}
    return {
        name: f"{old} becomes {new}"
        for name, (old, new) in pairs.items()
        if old != new and not pa.types.is_dictionary(old) and "int96" not in kinds.get(name, ())
    }


def changed_types(schema: pa.Schema, before: Kinds) -> dict[str, str]:
    """Column -> ``GEOMETRY becomes BYTE_ARRAY``, of each whose Parquet type pyarrow reads or writes as another one.

    Args:
        schema: Of the output, without the columns that it adds.
        before: Kinds of an input file.
    """
    sink = pa.BufferOutputStream()
    how = written_as(schema, before, {}, with_arrow_schema=False)
    pq.ParquetWriter(sink, how.schema, **how.options).close()
    after = kinds_by_column(pq.ParquetFile(pa.BufferReader(sink.getvalue())))
    return {
        name: f"{', '.join(before[name])} becomes {', '.join(after[name])}"
        for name in schema.names
        if name in before and list(before[name]) != list(after[name])
    }


def kinds_by_column(parquet: pq.ParquetFile) -> dict[str, tuple[str, ...]]:
    """The kinds of a file's columns. Names may hold anything, so what belongs to which column is told by the order of the leaves.

    Raises: ValueError: the file's two schemas do not have the same leaves.
    """
    schema = parquet.schema
    leaves = [_kind_of_leaf(schema.column(index)) for index in range(len(schema))]
    rest, printed = iter(leaves), str(schema)
    found = {field.name: tuple(_kinds(field, rest, printed)) for field in parquet.schema_arrow}
    if next(rest, None) is not None:
        raise ValueError(f"its {len(leaves)} columns in Parquet are more than those that pyarrow reads")
    return found


def _kind_of_leaf(leaf: Any) -> str:
    kind = _FLAGS.sub("", str(leaf.logical_type))
    return str(leaf.physical_type).lower() if kind == "None" else _PLAIN.get(kind, kind)


def _kinds(field: pa.Field, leaves: Iterator[str], printed: str) -> Iterator[str]:
    kind = _plain(field.type)
    parts = [kind.field(index) for index in range(kind.num_fields)]
    if pa.types.is_struct(kind) and _is_variant(field.name, [part.name for part in parts], printed):
        yield _VARIANT
    for part in parts:
        yield from _kinds(part, leaves, printed)
    if not parts and not pa.types.is_struct(kind):
        leaf = next(leaves, None)
        if leaf is None:
            raise ValueError("its columns in Parquet are fewer than those that pyarrow reads")
        yield leaf


def _is_variant(name: str, parts: Sequence[str], printed: str) -> bool:
    """Whether the printed schema calls the group a VARIANT; pyarrow says it nowhere else."""
    return {"metadata", "value"} <= {*parts} and re.search(rf" group field_id=-?\d+ {re.escape(name)} \({_VARIANT}\(", printed) is not None


class _Wkb(pa.ExtensionType):
    """Geometries in well-known binary, which pyarrow writes as Parquet's GEOMETRY or GEOGRAPHY."""

    def __init__(self, metadata: bytes) -> None:
        self._metadata = metadata
        super().__init__(pa.binary(), _WKB)

    def __arrow_ext_serialize__(self) -> bytes:
        return self._metadata

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type: pa.DataType, serialized: bytes) -> _Wkb:
        return cls(serialized)


def _as_geometry(field: pa.Field) -> pa.Field:
    metadata = field.metadata or {}
    is_wkb = metadata.get(_EXTENSION_NAME) == _WKB.encode() and pa.types.is_binary(field.type)
    return field.with_type(_Wkb(metadata.get(_EXTENSION_METADATA, b""))) if is_wkb else field


# Metadata


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
    return len(levels) == 1 and levels[0]["pandas_type"] in _TEXT_LABELS and levels[0]["numpy_type"] in ("object", "str", "string")


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
        text = {"name": None, "field_name": None, "pandas_type": "unicode", "numpy_type": "object", "metadata": {"encoding": "UTF-8"}}
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
        fields = [{"name": field.name, "type": _spark_type(field.type), "nullable": True, "metadata": {}} for field in kind]
        return {"type": "struct", "fields": fields}
    return _SPARK_TYPES[str(kind)]


_EXTENDED = {_PANDAS: _extend_pandas, _SPARK: _extend_spark}
