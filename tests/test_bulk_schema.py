"""One schema for many files: lossless joins, refused differences, and footer entries for pandas and Spark."""

from __future__ import annotations

import json
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import DataError
from pipeline.parquet.metadata import keys_left_out, output_metadata, pandas_labels
from pipeline.parquet.schema import FileSchema, join_schemas, kinds_by_column
from pipeline.parquet.widening import wider

STRING, LARGE = pa.string(), pa.large_string()


@pytest.mark.parametrize(
    ("one", "two", "both"),
    [
        (pa.int32(), pa.int64(), pa.int64()),
        (pa.uint8(), pa.uint32(), pa.uint32()),
        (pa.uint32(), pa.int8(), pa.int64()),
        (pa.uint64(), pa.int64(), None),
        (pa.int64(), pa.float64(), None),
        (pa.int64(), pa.bool_(), None),
        (pa.float16(), pa.float64(), pa.float64()),
        (STRING, LARGE, LARGE),
        (STRING, pa.string_view(), LARGE),
        (STRING, pa.binary(), None),
        (pa.binary(), pa.large_binary(), pa.large_binary()),
        (pa.binary(2), pa.binary(3), None),
        (pa.null(), pa.list_(pa.int8()), pa.list_(pa.int8())),
        (pa.dictionary(pa.int8(), STRING), pa.dictionary(pa.int16(), STRING), pa.dictionary(pa.int32(), STRING)),
        (pa.dictionary(pa.int8(), STRING), LARGE, LARGE),
        (pa.dictionary(pa.int8(), STRING, ordered=True), pa.dictionary(pa.int16(), STRING, ordered=True), None),
        (pa.decimal128(5, 2), pa.decimal128(9, 4), pa.decimal128(9, 4)),
        (pa.decimal128(38, 0), pa.decimal128(38, 10), pa.decimal256(48, 10)),
        (pa.decimal256(76, 0), pa.decimal256(76, 10), None),
        (pa.time32("s"), pa.time64("ns"), pa.time64("ns")),
        (pa.timestamp("ms"), pa.timestamp("us"), pa.timestamp("us")),
        (pa.timestamp("us"), pa.timestamp("ns"), None),
        (pa.timestamp("us"), pa.timestamp("us", "UTC"), None),
        (pa.duration("s"), pa.duration("ms"), pa.duration("ms")),
        (pa.date32(), pa.timestamp("us"), None),
        (pa.list_(pa.int32()), pa.large_list(pa.int64()), pa.large_list(pa.int64())),
        (pa.list_(pa.int32()), pa.list_(pa.float32()), None),
        (
            pa.struct({"a": pa.int8(), "b": STRING}),
            pa.struct({"a": pa.int16(), "b": STRING}),
            pa.struct({"a": pa.int16(), "b": STRING}),
        ),
        (pa.struct({"a": pa.int8()}), pa.struct({"b": pa.int8()}), None),
        (pa.uuid(), pa.binary(16), None),
        (pa.map_(STRING, pa.int32()), pa.map_(LARGE, pa.int64()), pa.map_(LARGE, pa.int64())),
        (pa.map_(STRING, pa.int32()), pa.map_(STRING, STRING), None),
        (pa.list_(pa.int32(), 2), pa.list_(pa.int64(), 2), pa.list_(pa.int64(), 2)),
        (pa.list_(pa.int32(), 2), pa.list_(pa.int32(), 3), pa.list_(pa.int32())),
        (pa.list_(pa.int32(), 2), pa.large_list(pa.int8()), pa.large_list(pa.int32())),
    ],
)
def test_two_types_are_joined_if_no_value_is_lost(one: pa.DataType, two: pa.DataType, both: pa.DataType | None) -> None:
    assert wider(one, two) == both
    assert wider(two, one) == both


def test_files_are_joined_in_the_order_of_the_first_and_what_one_lacks_may_be_null() -> None:
    first = pa.schema([("b", pa.int32()), pa.field("a", STRING, nullable=False)])
    second = pa.schema([("c", pa.bool_()), ("a", STRING), ("b", pa.int64())])
    joined = join_schemas([FileSchema("1", first), FileSchema("2", second)], None)
    assert joined == pa.schema([("b", pa.int64()), ("a", STRING), ("c", pa.bool_())])
    assert join_schemas([FileSchema("1", first), FileSchema("2", second)], ["a"]).names == ["a"]


@pytest.mark.parametrize(
    ("other", "fault"),
    [
        (pa.schema([("a", pa.float32())]), r"2: column 'a' is float, and int64 in 1;"),
        (pa.schema([("A", pa.int64())]), r"2: column 'A' is 'a' in 1;"),
        (pa.schema([("b", pa.int64())]), r"2: column 'a' is missing, and in 1 it is required;"),
    ],
)
def test_a_loss_is_named_with_both_files(other: pa.Schema, fault: str) -> None:
    files = [FileSchema("1", pa.schema([pa.field("a", pa.int64(), nullable=False)])), FileSchema("2", other)]
    with pytest.raises(DataError, match=fault):
        join_schemas(files, None)


def test_names_of_one_file_that_differ_only_in_case_are_two_columns() -> None:
    schema = pa.schema([("a", pa.int64()), ("A", pa.int64())])
    assert join_schemas([FileSchema("1", schema), FileSchema("2", schema)], None).names == ["a", "A"]


ADDED = [pa.field("T_label", STRING), pa.field("T_score", pa.float32()), pa.field("truncated", pa.bool_())]
TOP = pa.field("T_top_k", pa.list_(pa.struct([("label", STRING), ("score", pa.float32())])))


def test_the_entry_of_spark_lists_kept_and_new_columns_only() -> None:
    fields = [{"name": name, "type": "string", "nullable": True, "metadata": {}} for name in ("text", "left out")]
    key = b"org.apache.spark.sql.parquet.row.metadata"
    metadata = {
        key: json.dumps({"type": "struct", "fields": fields}).encode(),
        b"owner": b"me",
        b"ours": b"old",
        b"ARROW:schema": b"x",
    }
    found = output_metadata(metadata, kept=["text"], added=[*ADDED, TOP], leave_out=b"ours")
    assert found.keys() == {key, b"owner"}
    spark = json.loads(found[key])
    assert [(field["name"], field["type"]) for field in spark["fields"][:4]] == [
        ("text", "string"),
        ("T_label", "string"),
        ("T_score", "float"),
        ("truncated", "boolean"),
    ]
    assert spark["fields"][4]["type"]["elementType"]["fields"][1]["type"] == "float"


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"columns": 3}', b'{"fields": [{}]}', b"\xff", b"[" * 100_000])
def test_unreadable_entries_of_pandas_and_spark_are_dropped(content: bytes) -> None:
    metadata = {b"pandas": content, b"org.apache.spark.sql.parquet.row.metadata": content, b"owner": b"me"}
    assert output_metadata(metadata, kept=["text"], added=ADDED, leave_out=b"ours") == {b"owner": b"me"}
    assert keys_left_out(metadata, ["text"]) == ["pandas", "org.apache.spark.sql.parquet.row.metadata"]
    assert pandas_labels(metadata) == ""


def test_half_a_character_in_a_footer_stays_as_it_is() -> None:
    pandas = json.dumps({"columns": [{"name": "\ud800", "field_name": "\ud800"}], "column_indexes": []}).encode()
    found = output_metadata({b"pandas": pandas}, kept=["text"], added=[], leave_out=b"ours")
    assert json.loads(found[b"pandas"]) == json.loads(pandas)
    assert keys_left_out({b"pandas": pandas}, ["text"]) == []


NAMES = [
    "ts (UTC)",
    "ts(UTC)",
    "a (b (c))",
    "ts (x) y",
    "a.b",
    "a;",
    "x {",
    "}",
    "\"q'",
    "n\n  optional int32 field_id=-1 m;",
    " ",
    "",
    "é",
    "(",
    "x (int96)",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_kind_is_known_whatever_the_columns_name(name: str, tmp_path: Path) -> None:
    times = pa.array([1], pa.timestamp("ns"))
    nested = pa.StructArray.from_arrays([pa.array([[1]]), times], [name, f"{name}."])
    table = pa.table([pa.array(["x"]), nested, times], [name, f"{name} ", f"{name}s"])
    pq.write_table(table, tmp_path / "a.parquet", use_deprecated_int96_timestamps=True)
    found = kinds_by_column(pq.ParquetFile(tmp_path / "a.parquet"))
    assert found == {name: ("String",), f"{name} ": ("int64", "int96"), f"{name}s": ("int96",)}


@pytest.mark.parametrize("name", ["v", "v (x) {", 'a"b'])
def test_a_variant_is_known_whatever_its_name(name: str, tmp_path: Path) -> None:
    quoted = name.replace('"', '""')
    duckdb.sql(
        f"""COPY (SELECT 'x' AS text, 1::VARIANT AS "{quoted}") TO '{tmp_path / "a.parquet"}' (FORMAT parquet)"""
    )
    assert kinds_by_column(pq.ParquetFile(tmp_path / "a.parquet"))[name][0] == "Variant"
