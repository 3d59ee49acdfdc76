"""Tables with a log: only live files are read, and unsupported features are refused by name."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from bulk import write_table
from deltalake import DeltaTable, write_deltalake
from pyiceberg.catalog.memory import InMemoryCatalog

from pipeline.bulk_input.units import plan_input
from pipeline.errors import DataError, InputError
from pipeline.labelled_files.sources import find_sources
from pipeline.parquet.table_formats import live_files
from pipeline.storage.listing import find_files


def rows_of(pattern: Path | str) -> int:
    options: dict[str, Any] = {"columns": None, "new_columns": ["T_label"], "rows_per_unit": 100, "limit": None}
    return plan_input(str(pattern), text_column="text", **options).num_rows


def refused(pattern: Path | str) -> str:
    with pytest.raises(InputError) as error:
        rows_of(pattern)
    return str(error.value)


@pytest.fixture
def delta(tmp_path: Path) -> Path:
    """A Delta table, partitioned by day, with 3 rows in its live files."""
    root = tmp_path / "delta"
    write_deltalake(
        str(root),
        pa.table({"text": ["a", "b", "c d"], "n": [1, 2, 3], "day": ["mon", "tue", "a/b"]}),
        partition_by=["day"],
    )
    DeltaTable(str(root)).update(updates={"n": "n + 1"}, predicate="day = 'mon'")
    DeltaTable(str(root)).delete("day = 'tue'")
    write_deltalake(str(root), pa.table({"text": ["e"], "n": [9], "day": ["wed"]}), mode="append")
    return root


@pytest.fixture
def iceberg(tmp_path: Path) -> Path:
    """A table of 3 rows, one of them deleted."""
    catalog = InMemoryCatalog("memory", warehouse=(tmp_path / "lake").as_uri())
    catalog.create_namespace("ns")
    table = catalog.create_table("ns.table", schema=pa.schema([("text", pa.string()), ("n", pa.int64())]))
    table.append(pa.table({"text": ["a", "b", "c"], "n": [1, 2, 3]}))
    table.append(pa.table({"text": ["d"], "n": [4]}))
    table.delete("n = 2")
    return tmp_path / "lake" / "ns" / "table"


def test_only_the_live_files_of_a_delta_table_are_read(delta: Path) -> None:
    found = live_files(str(delta), find_files(str(delta)))
    assert rows_of(delta) == len(found.files) == 3
    assert found.skipped["of older versions of the Delta table"] == 2


def test_only_the_live_files_of_an_iceberg_table_are_read(iceberg: Path) -> None:
    assert rows_of(iceberg) == 3


@pytest.mark.parametrize(
    "pattern", ["day=wed", "day=wed/*.parquet", "*/*.parquet", "**/*.parquet", "day=wed/{file}", "link/day=wed"]
)
def test_part_of_a_table_is_refused_with_the_tables_folder(pattern: str, delta: Path) -> None:
    (delta / "link").symlink_to(delta)
    file = next((delta / "day=wed").glob("*.parquet")).name
    assert f"is in the Delta table {delta}, whose log says which files are live" in refused(
        delta / pattern.format(file=file)
    )


@pytest.mark.parametrize("pattern", ["*/*/*.parquet", "**/*.parquet", "delta/*/*.parquet", "d*", "l*/*"])
def test_a_wildcard_at_or_above_a_tables_folder_reads_none_of_its_deleted_rows(pattern: str, delta: Path) -> None:
    (delta.parent / "links").mkdir()
    (delta.parent / "links" / "one").symlink_to(delta / "day=wed")
    assert re.search(r"(holds|is in) the Delta table \S*delta", refused(delta.parent / pattern))


LOGS = ("_delta_log/0.json", ".hoodie/hoodie.properties", "_spark_metadata/0", "metadata/v1.metadata.json")


@pytest.mark.parametrize("log", LOGS)
@pytest.mark.parametrize("pattern", ["", "t", "t/k=1", "t/k=1/*.parquet", "*/*/*.parquet", "**/*", "t/k=1/a.parquet"])
def test_training_on_the_files_of_a_table_is_refused(log: str, pattern: str, tmp_path: Path) -> None:
    write_table(tmp_path / "t" / "k=1" / "a.parquet", {"text": ["x"], "label": ["y"]})
    (tmp_path / "t" / log).parent.mkdir()
    (tmp_path / "t" / log).write_text("{}")
    with pytest.raises(
        DataError, match=rf"has files of the \S.* table {tmp_path / 't'}, whose files also hold deleted rows"
    ):
        find_sources(str(tmp_path / pattern))


def test_a_folder_above_a_table_is_refused(delta: Path) -> None:
    write_table(delta.parent / "more.parquet", {"text": ["x"]})
    assert "holds the Delta table delta; classify each table in a job of its own" in refused(delta.parent)


@pytest.mark.parametrize(
    ("log", "kind"), [(".hoodie/hoodie.properties", "Hudi"), ("_spark_metadata/0", "Spark Structured Streaming")]
)
def test_a_table_of_another_format_is_refused_by_name(log: str, kind: str, tmp_path: Path) -> None:
    write_table(tmp_path / "t" / "a.parquet", {"text": ["x"]})
    (tmp_path / "t" / log).parent.mkdir()
    (tmp_path / "t" / log).write_text("v1")
    assert f"is a {kind} table" in refused(tmp_path / "t")


def test_a_moved_iceberg_table_is_refused_with_its_recorded_location(iceberg: Path, tmp_path: Path) -> None:
    shutil.copytree(iceberg, tmp_path / "copy")
    assert f"its metadata gives its location as {iceberg.as_uri()}" in refused(tmp_path / "copy")


def test_damaged_logs_and_later_versions_are_reported(delta: Path, iceberg: Path) -> None:
    newest = max((delta / "_delta_log").glob("*.json"))
    newest.write_text(json.dumps({"protocol": {"minReaderVersion": 99, "minWriterVersion": 99}}))
    assert "its Delta log cannot be read: " in refused(delta)
    max((iceberg / "metadata").glob("*.metadata.json")).write_text("{")
    assert "its Iceberg log cannot be read: " in refused(iceberg)


def test_a_missing_live_file_is_named(delta: Path) -> None:
    gone = next((delta / "day=wed").glob("*.parquet"))
    gone.unlink()
    assert f"{gone} belongs to the Delta table and is missing" in refused(delta)


def test_a_delta_table_whose_columns_have_other_names_in_its_files_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "mapped"
    write_deltalake(str(root), pa.table({"text": ["a"]}))
    log = root / "_delta_log" / "00000000000000000000.json"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    for line in lines:
        if "metaData" in line:
            line["metaData"]["configuration"] = {"delta.columnMapping.mode": "name"}
    log.write_text("\n".join(map(json.dumps, lines)))
    assert "column mapping" in refused(root)


def test_deletion_vectors_are_refused(delta: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = pa.table({"filepath": ["x"], "selection_vector": [[True, False]]}).to_reader()
    monkeypatch.setattr(
        DeltaTable, "deletion_vectors", lambda self: vectors
    )  # deltalake reads them, and cannot write them
    assert "has deletion vectors" in refused(delta)


def test_columns_that_lie_in_the_files_of_a_delta_table_and_are_none_of_it_are_left_out(delta: Path) -> None:
    live = next((delta / "day=wed").glob("*.parquet"))
    write_table(live, {"text": ["e"], "n": [9], "_change_type": ["insert"]})
    options: dict[str, Any] = {"columns": None, "new_columns": ["T_label"], "rows_per_unit": 100, "limit": None}
    assert plan_input(str(delta), text_column="text", **options).schema.names == ["text", "n"]


def test_an_iceberg_file_with_older_columns_is_refused(iceberg: Path) -> None:
    for path in (iceberg / "data").glob("*.parquet"):  # not every one is live
        write_table(path, {"body": ["x"]})
    assert "its columns are no longer those of the Iceberg table" in refused(iceberg)


def test_without_the_formats_library_the_extra_is_named(
    delta: Path, iceberg: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "deltalake", None)
    monkeypatch.setitem(sys.modules, "pyiceberg.table", None)
    assert "pip install 'lorafleet[deltalake]'" in refused(delta)
    assert "pip install 'lorafleet[pyiceberg]'" in refused(iceberg)
