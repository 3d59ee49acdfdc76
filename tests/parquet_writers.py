"""Parquet files of many kinds, each written by one of pyarrow, pandas, Polars, DuckDB and fastparquet."""

from __future__ import annotations

import datetime as dt
import decimal
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import fastparquet
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

TEXTS = ["the sea is calm", "a warm kitchen", None, "", "roses and weeds", "the tide comes in"]
ROWS = len(TEXTS)
_DAY = dt.datetime(2024, 2, 29, 12, 30, 15, 123456)


def make_files(folder: Path) -> dict[str, Path]:
    """Write all files. Each is named after its content."""
    files: dict[str, Path] = {}
    for writer, kinds in {
        "pyarrow": _pyarrow(),
        "pandas": _pandas(),
        "polars": _polars(),
        "duckdb": _duckdb(),
        "fastparquet": _fastparquet(),
    }.items():
        for kind, write in kinds.items():
            path = folder / f"{writer}-{kind}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path)
            files[path.stem] = path
    return files


Write = Callable[[Path], Any]


def _pyarrow() -> dict[str, Write]:
    def table(values: Any, **options: Any) -> Write:
        column = values if isinstance(values, pa.Array | pa.ChunkedArray) else pa.array(values)
        return lambda path: pq.write_table(pa.table({"text": TEXTS, "x": column}), path, **options)

    times = pa.array([_DAY, None, *[_DAY] * (ROWS - 2)])
    strings = pa.array(["a", "b", None, "a", "", "c"])
    structs = [
        {"a": 1, "b": ["x", None]},
        None,
        {"a": None, "b": []},
        {"a": 2, "b": None},
        {"a": 3, "b": ["y"]},
        {"a": 4, "b": []},
    ]
    json_column = pa.ExtensionArray.from_storage(pa.json_(), pa.array(['{"a": 1}'] * ROWS))
    uuids = pa.ExtensionArray.from_storage(
        pa.uuid(), pa.array([uuid.UUID(int=i).bytes for i in range(ROWS)], pa.binary(16))
    )
    nested_maps = pa.array([[("a", 1)], [], None, [("b", None)], [], []], pa.map_(pa.string(), pa.int8()))
    of_kind: dict[str, Write] = {
        **{
            str(kind): table(pa.array(range(ROWS), kind))
            for kind in (pa.int8(), pa.uint8(), pa.uint32(), pa.uint64(), pa.float64())
        },
        "float16": table(pa.array(np.arange(ROWS, dtype=np.float16))),
        "null": table(pa.nulls(ROWS)),
        "bool": table([True, None, False, True, False, None]),
        "binary": table([b"\xff\x00", None, b"", b"a", b"b", b"c"]),
        "fixed-binary": table(pa.array([b"ab"] * ROWS, pa.binary(2))),
        "string-view": table(strings.cast(pa.string_view())),
        "large-string": table(strings.cast(pa.large_string())),
        "dictionary": table(strings.dictionary_encode()),
        "ordered-dictionary": table(
            pa.DictionaryArray.from_arrays([0, 1, None, 0, 1, 1], ["low", "high"], ordered=True)
        ),
        "decimal-small": table(
            pa.array([decimal.Decimal("1.25")] * ROWS, pa.decimal128(7, 2)), store_decimal_as_integer=True
        ),
        "decimal-large": table(pa.array([decimal.Decimal("1e40")] * ROWS, pa.decimal256(50, 2))),
        "date": table([dt.date(1, 1, 1), None, dt.date(9999, 12, 31), *[dt.date(2024, 1, 1)] * (ROWS - 3)]),
        "date64": table(pa.array([dt.date(2024, 1, 1)] * ROWS, pa.date64())),
        "time-utc": table(pa.array([dt.time(1, 2, 3, 4)] * ROWS, pa.time64("us")), write_time_adjusted_to_utc=True),
        "time": table(pa.array([dt.time(1, 2, 3)] * ROWS, pa.time32("ms"))),
        "duration": table(pa.array([dt.timedelta(days=1)] * ROWS, pa.duration("us"))),
        **{f"timestamp-{unit}": table(times.cast(pa.timestamp(unit), safe=False)) for unit in ("s", "ms", "us", "ns")},
        "timestamp-zone": table(times.cast(pa.timestamp("us", "Europe/Berlin"))),
        "timestamp-far": table([dt.datetime(1, 1, 1), dt.datetime(9999, 12, 31), *[_DAY] * (ROWS - 2)]),
        "int96": table(times.cast(pa.timestamp("ns")), use_deprecated_int96_timestamps=True),
        "int96-far": table(
            [dt.datetime(1, 1, 1), dt.datetime(9999, 12, 31), *[_DAY] * (ROWS - 2)],
            use_deprecated_int96_timestamps=True,
        ),
        "lists": table([[1, None], [], None, [2], [3], []]),
        "old-lists": table([[1, None], [], None, [2], [3], []], use_compliant_nested_type=False),
        "structs": table(structs),
        "maps": table(nested_maps),
        "json": table(json_column),
        "uuid": table(uuids),
        "first-version": table(range(ROWS), version="1.0", store_schema=False),
        "pages-2": table(range(ROWS), data_page_version="2.0", compression="zstd", write_page_checksum=True),
        "delta-encoded": table(
            strings, use_dictionary=False, column_encoding={"text": "DELTA_BYTE_ARRAY", "x": "DELTA_LENGTH_BYTE_ARRAY"}
        ),
    }
    dotted = pa.table({"text": TEXTS, "a.b": range(ROWS), "a": range(ROWS), "ü ([{": range(ROWS), "": range(ROWS)})
    keyed = dotted.replace_schema_metadata(
        {"owner": "me", "geo": '{"version": "1.1.0", "columns": {}, "primary_column": "a"}'}
    )
    wide = {f"column {i}": range(ROWS) for i in range(500)}
    return of_kind | {
        "names": lambda path: pq.write_table(dotted, path),
        "metadata": lambda path: pq.write_table(keyed, path, store_schema=False),
        "wide": lambda path: pq.write_table(pa.table({"text": TEXTS, **wide}), path),
        "required": lambda path: pq.write_table(
            pa.table(
                [pa.array(TEXTS), pa.array(range(ROWS))],
                schema=pa.schema([("text", pa.string()), pa.field("x", pa.int64(), False)]),
            ),
            path,
        ),
    }


def _pandas() -> dict[str, Write]:
    plain = {"text": TEXTS, "x": range(ROWS)}
    days = pd.date_range("2024-01-01", periods=ROWS, freq="D")

    def frame(values: Any, **options: Any) -> Write:
        return lambda path: pd.DataFrame(values, **options).to_parquet(path)

    return {
        "plain": frame(plain),
        "index": frame(plain, index=pd.Index(list("abcdef"), name="key")),
        "index-without-name": frame(plain, index=[3, 1, 4, 1, 5, 9]),
        "day-index": frame(plain, index=days),
        "multi-index": frame(plain, index=pd.MultiIndex.from_product([["a", "b"], [1, 2, 3]], names=["one", None])),
        "range-index": frame(plain, index=pd.RangeIndex(10, 22, 2)),
        "nullable": frame(
            plain | {"y": pd.array([1, None, 3, 4, 5, 6], "Int32"), "z": pd.array([True, None] * 3, "boolean")}
        ),
        "categories": frame(plain | {"y": pd.Categorical(["a", "b", None, "a", "b", "a"], ordered=True)}),
        "times": frame(
            plain | {"y": days, "z": days.tz_localize("Asia/Tokyo"), "d": pd.to_timedelta(range(ROWS), unit="h")}
        ),
        "integer-columns": lambda path: (
            pd.DataFrame({0: range(ROWS), "text": TEXTS}).rename(columns={"text": 1}).to_parquet(path)
        ),
        "day-columns": lambda path: pd.DataFrame([TEXTS, TEXTS], index=pd.Index(days[:2], name="day")).T.to_parquet(
            path
        ),
        "multi-columns": lambda path: pd.DataFrame({("a", "text"): TEXTS, ("a", "n"): range(ROWS)}).to_parquet(path),
        "objects": frame(plain | {"y": [[1], None, [2, 3], [], [4], [5]], "z": [b"a", None, b"b", b"", b"c", b"d"]}),
        "fastparquet": lambda path: pd.DataFrame(plain).to_parquet(path, engine="fastparquet"),
    }


def _polars() -> dict[str, Write]:
    def frame(values: Any, kind: Any = None, **options: Any) -> Write:
        return lambda path: pl.DataFrame(
            {"text": TEXTS, "x": pl.Series(values, dtype=kind, strict=False)}
        ).write_parquet(path, **options)

    return {
        "plain": frame(range(ROWS)),
        "old-pages": frame(range(ROWS), compression="snappy", use_pyarrow=True),
        "small-groups": frame(range(ROWS), row_group_size=2),
        "categorical": frame(["a", "b", None, "a", "b", "c"], pl.Categorical),
        "enum": frame(["a", "b", None, "a", "b", "a"], pl.Enum(["a", "b"])),
        "decimal": frame([decimal.Decimal("1.5")] * ROWS, pl.Decimal(12, 3)),
        "int128": frame([2**100] * ROWS, pl.Int128),
        "duration": frame([dt.timedelta(hours=1)] * ROWS, pl.Duration("ms")),
        "time": frame([dt.time(1, 2, 3)] * ROWS, pl.Time),
        "datetime-ns": frame([_DAY] * ROWS, pl.Datetime("ns")),
        "datetime-zone": frame([_DAY] * ROWS, pl.Datetime("us", "UTC")),
        "list": frame([[1, None], [], None, [2], [3], [4]], pl.List(pl.Int16)),
        "array": frame([[1, 2]] * ROWS, pl.Array(pl.Int64, 2)),
        "struct": frame([{"a": 1, "b": "x"}] * ROWS),
        "binary": frame([b"\xff", None, b"", b"a", b"b", b"c"], pl.Binary),
        "null": frame([None] * ROWS, pl.Null),
    }


def _duckdb() -> dict[str, Write]:
    connection = duckdb.connect()
    connection.sql("CREATE TABLE texts (i INTEGER, text VARCHAR)")
    connection.executemany("INSERT INTO texts VALUES (?, ?)", list(enumerate(TEXTS)))

    def query(expression: str, options: str = "") -> Write:
        def write(path: Path) -> None:
            connection.sql(
                f"COPY (SELECT text, {expression} AS x FROM texts ORDER BY i) TO '{path}' (FORMAT parquet{options})"
            )

        return write

    return {
        "integer": query("i"),
        "version-2": query("i", ", PARQUET_VERSION v2, COMPRESSION zstd, ROW_GROUP_SIZE 2048"),
        "metadata": query("i", ", KV_METADATA {owner: 'me'}"),
        "hugeint": query("i::HUGEINT"),
        "unsigned": query("i::UTINYINT"),
        "uuid": query("uuid()"),
        "interval": query("INTERVAL (i) DAY"),
        "time": query("TIME '01:02:03'"),
        "time-zone": query("'01:02:03+02'::TIMETZ"),
        "timestamp-zone": query("'2024-01-01 00:00:00+00'::TIMESTAMPTZ"),
        "timestamp-ns": query("'2024-01-01 00:00:00.123456789'::TIMESTAMP_NS"),
        "timestamp-s": query("'2024-01-01'::TIMESTAMP_S"),
        "far": query("'9999-12-31'::TIMESTAMP"),
        "enum": query("CASE WHEN i % 2 = 0 THEN 'a' ELSE 'b' END::ENUM('a', 'b')"),
        "list": query("[i, NULL]"),
        "map": query("MAP {'a': i}"),
        "struct": query("{'a': i, 'b': text}"),
        "decimal": query("i::DECIMAL(18, 3)"),
        "blob": query("'\\xAA'::BLOB"),
        "bit": query("'101'::BIT"),
        "json": query("""'{"a": 1}'::JSON"""),
        "variant": query("i::VARIANT"),
    }


def _fastparquet() -> dict[str, Write]:
    frame = pd.DataFrame({"text": [text or "" for text in TEXTS], "x": range(ROWS)})

    def write(more: dict[str, Any] | None = None, **options: Any) -> Write:
        return lambda path: fastparquet.write(str(path), frame.assign(**(more or {})), **options)

    days = pd.date_range("2024-01-01", periods=ROWS, freq="D").as_unit("ns")
    return {
        "plain": write(),
        "int96": write({"y": days}, times="int96"),
        "times": write({"y": days}),
        "bytes": write({"y": [b"a", b"\xff", b"", b"c", b"d", b"e"]}, object_encoding={"text": "utf8", "y": "bytes"}),
        "json": write({"y": [{"a": 1}] * ROWS}, object_encoding={"text": "utf8", "y": "json"}),
        "text-as-bytes": write({"text": [(text or "").encode() for text in TEXTS]}),
        "categories": write({"y": pd.Categorical(list("ababab"))}),
        "groups": write(row_group_offsets=2, compression="GZIP"),
        "index": write(write_index=True),
    }
