"""Planning: choice of files and columns, division into units, and refusals before work starts."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bulk import write_table

from pipeline.bulk_input.units import BulkInput, plan_input
from pipeline.errors import DataError, InputError
from pipeline.parquet.widening import text_type


def texts(num_rows: int, **more: Any) -> dict[str, Any]:
    return {"id": list(range(num_rows)), "text": [f"text {i}" for i in range(num_rows)], **more}


def plan(
    pattern: Path | str,
    *,
    text_column: str = "text",
    columns: Sequence[str] | None = None,
    new_columns: Sequence[str] = ("a_label", "truncated"),
    rows_per_unit: int = 100,
    limit: int | None = None,
) -> BulkInput:
    return plan_input(
        str(pattern),
        text_column=text_column,
        columns=columns,
        new_columns=new_columns,
        rows_per_unit=rows_per_unit,
        limit=limit,
    )


def outputs(planned: BulkInput) -> list[str]:
    return [unit.output for unit in planned.units]


def ranges(planned: BulkInput) -> list[tuple[tuple[int, ...], int, int, int]]:
    return [(unit.row_groups, unit.first_row, unit.num_rows, unit.first_row_of_file) for unit in planned.units]


# Files


def test_a_file_is_one_unit_with_all_its_columns(tmp_path: Path) -> None:
    path = write_table(tmp_path / "in.parquet", texts(7))
    planned = plan(path)
    (unit,) = planned.units
    assert (unit.number, unit.path, unit.output, planned.schema.names) == (
        0,
        str(path),
        "in-00000.parquet",
        ["id", "text"],
    )
    assert ranges(planned) == [((0,), 0, 7, 0)]
    assert [(file.path, file.size, file.num_rows) for file in planned.files] == [(str(path), path.stat().st_size, 7)]
    assert planned.num_rows == 7


def test_output_names_depend_on_the_file_alone_and_never_collide(tmp_path: Path) -> None:
    for name in ("x/p.parquet", "y/p.parquet", "b.parquet"):
        write_table(tmp_path / name, texts(4), row_group_size=2)
    planned = plan(tmp_path, rows_per_unit=2)
    names = outputs(planned)
    assert names[:2] == ["b-00000.parquet", "b-00001.parquet"]
    assert len(set(names)) == 6
    assert all(re.fullmatch(r"p-[0-9a-f]{8}-0000[01]\.parquet", name) for name in names[2:])
    assert [unit.number for unit in planned.units] == [0, 1, 2, 3, 4, 5]
    write_table(tmp_path / "a.parquet", texts(4))
    assert outputs(plan(tmp_path, rows_per_unit=2))[2:] == names


def test_partition_folders_are_kept_and_others_are_not(tmp_path: Path) -> None:
    for name in ("year=2023/month=1/a.parquet", "year=2024/raw/month=2/a.parquet"):
        write_table(tmp_path / "in" / name, texts(2))
    assert outputs(plan(tmp_path / "in")) == ["year=2023/month=1/a-00000.parquet", "year=2024/month=2/a-00000.parquet"]
    assert outputs(plan(tmp_path / "in" / "year=*" / "**" / "*.parquet")) == outputs(plan(tmp_path / "in"))
    assert outputs(plan(tmp_path / "in" / "year=2023")) == ["month=1/a-00000.parquet"]


def test_folders_above_the_input_are_not_partitions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_table(tmp_path / "user=anna" / "in" / "a.parquet", texts(2))
    monkeypatch.chdir(tmp_path / "user=anna")
    for pattern in ("in", "in/a.parquet", "in/*.parquet", tmp_path / "user=anna" / "in"):
        assert outputs(plan(pattern)) == ["a-00000.parquet"]


def test_a_glob_gives_what_it_matches(tmp_path: Path) -> None:
    for name in ("a-1.parquet", "a-2.parquet", "b-1.parquet"):
        write_table(tmp_path / name, texts(2))
    assert outputs(plan(tmp_path / "a-*.parquet")) == ["a-1-00000.parquet", "a-2-00000.parquet"]


# Units


def test_row_groups_are_put_together_up_to_the_rows_of_a_unit(tmp_path: Path) -> None:
    path = write_table(tmp_path / "in.parquet", texts(28), row_group_size=4)
    assert ranges(plan(path, rows_per_unit=10)) == [
        ((0, 1), 0, 8, 0),
        ((2, 3), 0, 8, 8),
        ((4, 5), 0, 8, 16),
        ((6,), 0, 4, 24),
    ]
    assert ranges(plan(path, rows_per_unit=12)) == [((0, 1, 2), 0, 12, 0), ((3, 4, 5), 0, 12, 12), ((6,), 0, 4, 24)]


def test_a_larger_row_group_is_sliced_between_the_smaller_ones(tmp_path: Path) -> None:
    path = tmp_path / "in.parquet"
    schema = pa.table(texts(1)).schema
    with pq.ParquetWriter(path, schema) as writer:
        for rows in (3, 11, 0, 2):
            writer.write_table(pa.table(texts(rows), schema=schema))
    assert ranges(plan(path, rows_per_unit=5)) == [
        ((0,), 0, 3, 0),
        ((1,), 0, 5, 3),
        ((1,), 5, 5, 8),
        ((1,), 10, 1, 13),
        ((3,), 0, 2, 14),
    ]


@pytest.mark.parametrize("rows_per_unit", [1, 3, 7, 50])
def test_every_row_is_in_one_unit(rows_per_unit: int, tmp_path: Path) -> None:
    for index, (rows, group) in enumerate([(20, 6), (1, 1), (13, 13), (9, 2)]):
        write_table(tmp_path / f"{index}.parquet", texts(rows), row_group_size=group)
    planned = plan(tmp_path, rows_per_unit=rows_per_unit)
    for file in planned.files:
        units = [unit for unit in planned.units if unit.path == file.path]
        assert [
            row for unit in units for row in range(unit.first_row_of_file, unit.first_row_of_file + unit.num_rows)
        ] == list(range(file.num_rows or 0))
    assert max(unit.num_rows for unit in planned.units) <= rows_per_unit
    assert len(set(outputs(planned))) == len(planned.units)


def test_a_limit_cuts_inside_a_unit_and_leaves_later_files_alone(tmp_path: Path) -> None:
    for name in "abc":
        write_table(tmp_path / f"{name}.parquet", texts(10), row_group_size=4)
    planned = plan(tmp_path, rows_per_unit=4, limit=13)
    assert [(Path(unit.path).name, unit.num_rows) for unit in planned.units] == [
        ("a.parquet", 4),
        ("a.parquet", 4),
        ("a.parquet", 2),
        ("b.parquet", 3),
    ]
    assert planned.num_rows == 13
    assert plan(tmp_path, limit=1000).num_rows == 30


# Columns


def test_a_missing_column_is_reported_with_the_existing_ones(tmp_path: Path) -> None:
    path = write_table(tmp_path / "in.parquet", texts(2))
    with pytest.raises(DataError, match=r"in\.parquet: no column 'body'; its columns are id, text; see --text-column"):
        plan(path, text_column="body")
    with pytest.raises(DataError, match=r"no column 'day'; its columns are id, text"):
        plan(path, columns=["id", "day"])


@pytest.mark.parametrize(
    "kind", [pa.int64(), pa.binary(2), pa.list_(pa.string()), pa.dictionary(pa.int8(), pa.int64())]
)
def test_a_text_column_of_another_type_is_refused_with_the_type(kind: pa.DataType, tmp_path: Path) -> None:
    path = write_table(tmp_path / "in.parquet", pa.table({"text": pa.array([None, None], kind)}))
    with pytest.raises(DataError, match=r"column 'text' is .*, not text; choose another --text-column"):
        plan(path)


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]
)
def test_every_type_of_text_is_accepted(kind: pa.DataType, tmp_path: Path) -> None:
    assert text_type(kind)
    path = write_table(tmp_path / "in.parquet", pa.table({"text": pa.array(["a", "b"], pa.string()).cast(kind)}))
    assert plan(path).num_rows == 2


def test_chosen_columns_keep_the_order_of_the_input(tmp_path: Path) -> None:
    path = write_table(tmp_path / "in.parquet", texts(2, day=[1, 2]))
    assert plan(path, columns=["day", "id"]).schema.names == ["id", "day"]
    assert plan(path, columns=[]).schema.names == []


def test_a_column_that_the_output_adds_is_refused_unless_it_is_dropped(tmp_path: Path) -> None:
    path = write_table(tmp_path / "in.parquet", texts(2, a_label=["x", "y"], truncated=[True, False]))
    with pytest.raises(DataError, match=r"it has a_label, truncated already.*NAME=REF.*--columns"):
        plan(path)
    assert plan(path, columns=["id"]).schema.names == ["id"]


def test_a_column_name_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array([1]), pa.array([2])], names=["text", "id", "id"])
    write_table(tmp_path / "b.parquet", table)
    write_table(tmp_path / "a.parquet", texts(1))
    with pytest.raises(DataError, match=r"b\.parquet: id is the name of more than one column"):
        plan(tmp_path)


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (pa.table({"id": ["1"], "text": ["a"]}), r"column 'id' is string, and int64 in \S+/a\.parquet"),
        (pa.table({"id": [1.0], "text": ["a"]}), r"column 'id' is double, and int64 in \S+/a\.parquet"),
        (pa.table({"ID": [1], "text": ["a"]}), r"column 'ID' is 'id' in \S+/a\.parquet"),
    ],
)
def test_files_that_cannot_be_read_together_without_a_loss_are_named_until_the_shared_columns_are_chosen(
    other: pa.Table, difference: str, tmp_path: Path
) -> None:
    write_table(tmp_path / "a.parquet", texts(2))
    write_table(tmp_path / "b.parquet", other)
    with pytest.raises(DataError, match=rf"b\.parquet: {difference}.*--columns"):
        plan(tmp_path)
    assert plan(tmp_path, columns=["text"]).num_rows == 3


def test_columns_in_another_order_are_the_same_schema(tmp_path: Path) -> None:
    write_table(tmp_path / "a.parquet", texts(2))
    write_table(tmp_path / "b.parquet", pa.table(texts(2)).select(["text", "id"]))
    assert plan(tmp_path).schema.names == ["id", "text"]


def test_a_column_that_is_required_in_one_file_and_missing_in_another_is_refused(tmp_path: Path) -> None:
    required = pa.schema([pa.field("id", pa.int64(), nullable=False), ("text", pa.string())])
    write_table(tmp_path / "a.parquet", pa.table(texts(2), schema=required))
    write_table(tmp_path / "b.parquet", {"text": ["a"]})
    with pytest.raises(DataError, match=r"b\.parquet: column 'id' is missing, and in \S+/a\.parquet it is required"):
        plan(tmp_path)


@pytest.mark.parametrize("name", ["A_label", "a_LABEL", "Truncated"])
def test_a_name_that_differs_only_in_case_from_one_that_the_output_adds_is_refused(name: str, tmp_path: Path) -> None:
    write_table(tmp_path / "k=1" / "in.parquet", texts(2, **{name: [1, 2]}))
    with pytest.raises(DataError, match=f"it has {name} already"):
        plan(tmp_path)
    write_table(tmp_path / "other" / f"{name}=1" / "in.parquet", texts(2))
    with pytest.raises(DataError, match=f"its partition folders are called {name}"):
        plan(tmp_path / "other")


def test_two_adapters_whose_columns_differ_only_in_case_are_refused(tmp_path: Path) -> None:
    path = write_table(tmp_path / "in.parquet", texts(2))
    with pytest.raises(DataError, match="Bank_label and bank_label"):
        plan(path, new_columns=("Bank_label", "bank_label", "truncated"))


def test_thousands_of_columns_are_planned_in_seconds(tmp_path: Path) -> None:
    wide = {f"column number {i}": [i] for i in range(8_000)}
    for name in "ab":
        write_table(tmp_path / f"{name}.parquet", {"text": ["a"], **wide})
    started = time.process_time()
    assert len(plan(tmp_path).schema) == 8_001
    assert time.process_time() - started < 5


# Bad files


def test_files_that_cannot_be_read_are_failures_and_the_others_are_planned(tmp_path: Path) -> None:
    whole = write_table(tmp_path / "d.parquet", texts(50)).read_bytes()
    (tmp_path / "a.parquet").write_bytes(b"")
    (tmp_path / "b.parquet").write_bytes(b"no parquet at all")
    (tmp_path / "c.parquet").write_bytes(whole[: len(whole) // 2])
    planned = plan(tmp_path)
    assert outputs(planned) == ["d-00000.parquet"]
    assert [(Path(f.path).name, f.unit, f.num_rows) for f in planned.failures] == [
        (f"{name}.parquet", None, None) for name in "abc"
    ]
    assert [failure.reason.partition(" (")[0] for failure in planned.failures] == [
        "the file is empty",
        "not a Parquet file: it does not begin with PAR1",
        "not a whole Parquet file: it begins as one, and its end is missing",
    ]
    assert [file.num_rows for file in planned.files] == [None, None, None, 50]


def test_a_file_that_its_store_refuses_is_a_failure(tmp_path: Path) -> None:
    write_table(tmp_path / "a.parquet", texts(2))
    (tmp_path / "b.parquet").symlink_to("/proc/self/mem")  # it opens, and cannot be read
    planned = plan(tmp_path)
    assert outputs(planned) == ["a-00000.parquet"]
    assert [failure.path for failure in planned.failures] == [str(tmp_path / "b.parquet")]
    assert "cannot be read" in planned.failures[0].reason


def test_an_input_without_a_readable_file_is_refused(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.parquet").write_bytes(b"")
    with pytest.raises(
        DataError, match=r"none of its 2 files can be read; \S+/a\.parquet: the file is empty \(0 bytes\)"
    ):
        plan(tmp_path)


def test_an_input_without_rows_is_refused_and_a_file_without_rows_is_not(tmp_path: Path) -> None:
    write_table(tmp_path / "a.parquet", pa.table(texts(1)).slice(0, 0))
    with pytest.raises(DataError, match="no rows in its 1 file; there is nothing to do"):
        plan(tmp_path)
    write_table(tmp_path / "b.parquet", texts(3))
    assert outputs(plan(tmp_path)) == ["b-00000.parquet"]


def test_no_file_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file or folder"):
        plan(tmp_path / "*.parquet")
