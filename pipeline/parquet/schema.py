"""The schema that all files of a bulk job are read in, and how its output keeps their Parquet types."""

from __future__ import annotations

import re
from base64 import b64decode
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import DataError
from pipeline.parquet.metadata import ARROW_SCHEMA
from pipeline.parquet.widening import plain_type, wider

Kinds = Mapping[str, Sequence[str]]
"""Top-level column -> the type of each of its leaves: the logical type, or else the physical one."""

_WKB, _GEOMETRIES, _VARIANT = "geoarrow.wkb", ("Geometry", "Geography"), "Variant"
_EXTENSION_NAME, _EXTENSION_METADATA = b"ARROW:extension:name", b"ARROW:extension:metadata"
# Parquet's older annotation of a time is kept as it is: DuckDB and Polars read it as a time without a zone.
_FLAGS = re.compile(r", (?:is_from_converted_type=false|force_set_converted_type=\w+)")
# Annotations that say no more than Parquet's physical types.
_PLAIN = {"Int(bitWidth=32, isSigned=true)": "int32", "Int(bitWidth=64, isSigned=true)": "int64"}


@dataclass(frozen=True)
class FileSchema:
    """The schema of one file."""

    path: str
    schema: pa.Schema


def join_schemas(files: Sequence[FileSchema], columns: Sequence[str] | None) -> pa.Schema:
    """Return the schema in which the kept columns of all files can be read without a loss.

    A column takes the wider of two integer, floating-point, string or time types. A column that a file lacks is null
    there. The order is that of the first file, followed by columns that only later files have.

    Args:
        files: At least one file.
        columns: Columns to keep; None for all.
    Raises: DataError: two files cannot be read together; the message names them and the column.
    """
    joined: dict[str, tuple[pa.Field, FileSchema]] = {}
    spellings: dict[str, str] = {}
    chosen = None if columns is None else set(columns)
    different = list({id(file.schema): file for file in files}.values())  # most files share their schema
    for file in different:
        for field in file.schema:
            if chosen is not None and field.name not in chosen:
                continue
            if field.name in joined:
                joined[field.name] = _joined(*joined[field.name], field, file)
                continue
            other = joined.get(spellings.setdefault(field.name.casefold(), field.name))
            if other is not None and other[1] is not file:
                raise DataError(
                    f"{file.path}: column {field.name!r} is {other[0].name!r} in {other[1].path}; "
                    f"give both one name, or {_TWO_JOBS}"
                )
            joined[field.name] = field, file
    names = [(file, set(file.schema.names)) for file in different]
    for field, origin in joined.values():
        lacking = next((file for file, existing in names if field.name not in existing), None)
        if lacking is not None and not field.nullable:
            raise DataError(
                f"{lacking.path}: column {field.name!r} is missing, and in {origin.path} it is required; {_TWO_JOBS}"
            )
    return pa.schema([field for field, _ in joined.values()])


_TWO_JOBS = "read them in two jobs, or choose the columns that they share with --columns"


def _joined(field: pa.Field, origin: FileSchema, other: pa.Field, file: FileSchema) -> tuple[pa.Field, FileSchema]:
    kind = wider(field.type, other.type)
    if kind is None:
        raise DataError(
            f"{file.path}: column {field.name!r} is {other.type}, and {field.type} in {origin.path}; "
            f"these two cannot be joined without a loss; {_TWO_JOBS}"
        )
    return field.with_type(kind).with_nullable(field.nullable or other.nullable), origin


@dataclass(frozen=True)
class WrittenAs:
    """Settings of pyarrow's writer that keep every Parquet type that it can express."""

    schema: pa.Schema
    """Types to cast the table to."""
    options: dict[str, Any]
    """Options of ``pq.ParquetWriter``."""
    metadata: dict[bytes, bytes]
    """Key-values to add to the footer at the end."""

    def table(self, table: pa.Table) -> pa.Table:
        """Return the table in the schema's types."""
        columns = [_in_type(column, field.type) for column, field in zip(table.columns, self.schema, strict=True)]
        return pa.table(columns, schema=self.schema)


def written_as(schema: pa.Schema, kinds: Kinds, metadata: dict[bytes, bytes], *, with_arrow_schema: bool) -> WrittenAs:
    """Choose the writer's types and options.

    Args:
        schema: Schema of the output.
        kinds: Kinds of the input.
        metadata: Key-values of the output's footer.
        with_arrow_schema: Whether the input's footer contains an Arrow schema. Some readers then choose other types.
    """
    fields = [
        _as_geometry(field) if kinds.get(field.name, [""])[0].startswith(_GEOMETRIES) else field for field in schema
    ]
    times = [kind for name in schema.names for kind in kinds.get(name, ()) if kind.startswith("Time(")]
    adjusted = bool(times) and all("isAdjustedToUTC=true" in kind for kind in times)
    options = {"write_time_adjusted_to_utc": adjusted, "store_schema": with_arrow_schema}
    if with_arrow_schema:  # pyarrow then reads the key-values from there alone
        return WrittenAs(pa.schema(fields, metadata=metadata), options, {})
    return WrittenAs(pa.schema(fields), options, metadata)


def _in_type(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    if not isinstance(kind, _Wkb):
        return column.cast(kind)
    return pa.chunked_array([pa.ExtensionArray.from_storage(kind, chunk) for chunk in column.chunks], type=kind)


def types_lost_in_reading(schema: pa.Schema, kinds: Kinds, metadata: Mapping[bytes, bytes]) -> dict[str, str]:
    """Return the columns that pyarrow reads as another type: column -> ``date64[ms] becomes date32[day]``.

    Args:
        schema: Schema in which pyarrow reads the file.
        kinds: Kinds of the same file. INT96 columns are excluded; ``read_dates`` handles them.
        metadata: Metadata of the file's footer, which may contain an Arrow schema.
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
    """Return the columns whose Parquet type the output cannot keep: column -> ``GEOMETRY becomes BYTE_ARRAY``.

    Args:
        schema: Schema of the output, without the columns that it adds.
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
    """Return the kinds of a file's columns.

    Names may contain dots, so the order of the leaves decides to which column each belongs.

    Raises: ValueError: the file's two schemas do not have the same leaves.
    """
    schema = parquet.schema
    leaves = [_kind_of_leaf(schema.column(index)) for index in range(len(schema))]
    rest, printed = iter(leaves), str(schema)
    kinds = {field.name: tuple(_kinds(field, rest, printed)) for field in parquet.schema_arrow}
    if next(rest, None) is not None:
        raise ValueError(f"its {len(leaves)} columns in Parquet are more than pyarrow reads")
    return kinds


def _kind_of_leaf(leaf: Any) -> str:
    kind = _FLAGS.sub("", str(leaf.logical_type))
    return str(leaf.physical_type).lower() if kind == "None" else _PLAIN.get(kind, kind)


def _kinds(field: pa.Field, leaves: Iterator[str], printed: str) -> Iterator[str]:
    kind = plain_type(field.type)
    parts = [kind.field(index) for index in range(kind.num_fields)]
    if pa.types.is_struct(kind) and _is_variant(field.name, [part.name for part in parts], printed):
        yield _VARIANT
    for part in parts:
        yield from _kinds(part, leaves, printed)
    if not parts and not pa.types.is_struct(kind):
        leaf = next(leaves, None)
        if leaf is None:
            raise ValueError("its columns in Parquet are fewer than pyarrow reads")
        yield leaf


def _is_variant(name: str, parts: Sequence[str], printed: str) -> bool:
    """Return whether the printed schema calls the group a VARIANT. pyarrow exposes it nowhere else."""
    return {"metadata", "value"} <= {*parts} and re.search(
        rf" group field_id=-?\d+ {re.escape(name)} \({_VARIANT}\(", printed
    ) is not None


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
