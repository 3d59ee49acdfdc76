"""Files of five Parquet writers: three readers see unchanged columns in the output, or the change is reported."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import parquet_writers
import polars as pl
import pyarrow.parquet as pq
import pytest
from bulk import save_bulk_adapter, start

from pipeline.errors import InputError

ADDED = {"T_label", "T_score", "T_reason", "truncated"}
TEXT_COLUMNS = {
    "pandas-integer-columns": "1",
    "pandas-day-columns": "2024-01-01 00:00:00",
    "pandas-multi-columns": "('a', 'text')",
}
REFUSED = {"polars-int128": "Integers with more than 64 bits not implemented"}
CHANGED = {
    "pyarrow-int96": {"x"},
    "pyarrow-date64": {"x"},
    "pyarrow-timestamp-s": {"x"},
    "pyarrow-int96-far": {"x"},
    "duckdb-hugeint": set(),
    "duckdb-interval": {"x"},
    "duckdb-enum": set(),
    "duckdb-variant": {"x"},
    "fastparquet-int96": {"y"},
    "pandas-integer-columns": {"labels of the columns in pandas"},
    "pandas-day-columns": {"labels of the columns in pandas"},
    "pandas-multi-columns": {"labels of the columns in pandas"},
}
"""File -> its columns whose type the output cannot keep."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return parquet_writers.make_files(tmp_path_factory.mktemp("writers"))


@pytest.fixture(scope="module")
def adapter(encoder_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bulk_adapter(tmp_path_factory.mktemp("adapters") / "T", encoder_folder("bert"))


def as_pandas(path: Path) -> dict[str, Any]:
    frame = pd.read_parquet(path)
    return {
        str(name): (str(frame.dtypes.iloc[i]), frame.iloc[:, i].tolist()) for i, name in enumerate(frame.columns)
    } | {"index": frame.index[: parquet_writers.ROWS].tolist()}


def as_polars(path: Path) -> dict[str, Any]:
    return {series.name: (str(series.dtype), series.to_list()) for series in pl.read_parquet(path)}


def as_duckdb(path: Path) -> dict[str, Any]:
    relation = duckdb.sql(f"SELECT * FROM read_parquet('{path}')")
    rows = relation.fetchall()
    return {
        name: (str(kind), [row[i] for row in rows])
        for i, (name, kind) in enumerate(zip(relation.columns, relation.types, strict=True))
    }


def same(one: Any, two: Any) -> bool:
    if isinstance(one, float) and isinstance(two, float) and math.isnan(one) and math.isnan(two):
        return True
    if isinstance(one, list | tuple) and isinstance(two, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    if isinstance(one, dict) and isinstance(two, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if hasattr(one, "tolist") and hasattr(two, "tolist"):
        return same(one.tolist(), two.tolist())
    return bool((one is two) or (pd.api.types.is_scalar(one) and pd.isna(one) and pd.isna(two)) or one == two)


def test_every_file_of_every_writer_keeps_its_columns_for_every_reader_or_is_named(
    files: dict[str, Path], adapter: Path, encoder_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    faults = []
    for name, path in files.items():
        text_column = TEXT_COLUMNS.get(name, "text")
        try:
            bulk = start(path, tmp_path / name, [adapter], encoder_folder("bert"), text_column=text_column)
        except InputError as error:
            if REFUSED.get(name, "never") not in str(error):
                faults.append(f"{name}: refused: {error}")
            continue
        summary = bulk.run()
        warned = {change.partition(": ")[0] for change in summary.changed_types}
        if warned != CHANGED.get(name, set()):
            faults.append(f"{name}: says {summary.changed_types}")
        (unit,) = bulk.source.units
        output = tmp_path / name / unit.output
        faults += [f"{name}: {fault}" for fault in differences(path, output, warned)]
    assert not faults, "\n".join(faults)


def differences(before: Path, after: Path, warned: set[str]) -> list[str]:
    faults = []
    for read in (as_pandas, as_polars, as_duckdb):
        try:
            expected = read(before)
        except (Exception, pl.exceptions.PanicException):  # noqa: BLE001 - the reader cannot read what the writer wrote
            continue
        found = read(after)
        missing = expected.keys() - found.keys()
        extra = found.keys() - expected.keys() - ADDED
        if missing or extra:
            faults.append(f"{read.__name__}: columns {missing} are missing, {extra} are new")
        faults += [
            f"{read.__name__}: {column}: {str(expected[column])[:80]} became {str(found[column])[:80]}"
            for column in expected.keys() & found.keys() - warned
            if not same(expected[column], found[column])
        ]
    kept = pq.read_metadata(before).metadata or {}
    lost = {key for key in kept if key not in (pq.read_metadata(after).metadata or {})}
    return faults + ([f"footer lost {lost}"] if lost else [])
