"""Footers: facts that a plan reads, and files whose footer crashes every reader."""

from __future__ import annotations

import base64
import datetime as dt
import gzip
import os
import signal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.parquet.encryption as pe
import pytest
from bulk import write_table

from pipeline.parquet import footers
from pipeline.parquet.footers import Dates, Footer, read_dates, read_footers


class LocalKeys(pe.KmsClient):
    """Encryption keys in plain text."""

    def __init__(self, _config: pe.KmsConnectionConfig) -> None:
        super().__init__()

    def wrap_key(self, key_bytes: bytes, _master_key: str) -> bytes:
        return base64.b64encode(key_bytes)

    def unwrap_key(self, wrapped_key: bytes, _master_key: str) -> bytes:
        return base64.b64decode(wrapped_key)


def write_encrypted(path: Path, *, plaintext_footer: bool) -> Path:
    """Write a file with one encrypted column. With a plain footer, pyarrow crashes on that column."""
    table = pa.table({"text": ["a", "b"], "secret": [1, 2]})
    config = pe.EncryptionConfiguration(
        footer_key="footer", column_keys={"key": ["secret"]}, plaintext_footer=plaintext_footer
    )
    properties = pe.CryptoFactory(LocalKeys).file_encryption_properties(pe.KmsConnectionConfig(), config)
    with pq.ParquetWriter(path, table.schema, encryption_properties=properties) as writer:
        writer.write_table(table)
    return path


def reasons(*paths: Path) -> list[str]:
    return [found for found in read_footers([str(path) for path in paths]) if isinstance(found, str)]


def test_a_footer_that_crashes_its_reader_costs_one_file(tmp_path: Path) -> None:
    good = [str(write_table(tmp_path / f"{i}.parquet", {"text": ["a"] * i})) for i in range(1, 21)]
    bad = [str(write_encrypted(tmp_path / f"bad-{i}.parquet", plaintext_footer=True)) for i in range(2)]
    found = read_footers([*good[:10], bad[0], *good[10:], bad[1]])
    rows = [footer.num_rows for footer in found if isinstance(footer, Footer)]
    assert rows == list(range(1, 21))
    assert [index for index, footer in enumerate(found) if isinstance(footer, str)] == [10, 21]
    assert found[10] == found[21]
    assert "ends the process by SIGABRT: Cannot decrypt ColumnMetadata" in str(found[10])


def test_an_unknown_codec_crashes_only_the_process_that_reads_footers(tmp_path: Path) -> None:
    good = write_table(tmp_path / "good.parquet", {"text": ["a"]}, compression="SNAPPY")
    content = good.read_bytes()
    codec = b"\x04text\x15"  # the path of the column, and behind it the number of its codec, doubled
    assert content.count(codec + b"\x02") == 1
    (tmp_path / "bad.parquet").write_bytes(content.replace(codec + b"\x02", codec + b"\x28"))
    bad, other = read_footers([str(tmp_path / "bad.parquet"), str(good)])
    assert "ends the process by SIGABRT" in str(bad)
    assert isinstance(other, Footer)


def test_a_key_nested_too_deep_costs_no_file(tmp_path: Path) -> None:
    for key in ("pandas", "org.apache.spark.sql.parquet.row.metadata"):
        table = pa.table({"text": ["a"]}).replace_schema_metadata({key: "[" * 100_000})
        (footer,) = read_footers([str(write_table(tmp_path / "a.parquet", table))])
        assert isinstance(footer, Footer)
        assert footer.left_out == [key]


def test_the_process_is_started_again_after_it_exits(tmp_path: Path) -> None:
    path = str(write_table(tmp_path / "a.parquet", {"text": ["a"]}))
    for _ in range(2):
        assert isinstance(read_footers([path])[0], Footer)
        process = footers._Reader.shared()._process
        assert process is not None
        os.kill(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty (0 bytes)"),
        (b"id,text\n1,a\n", "not a Parquet file: it does not begin with PAR1"),
        (b"PAR1" + b"x" * 100, "not a whole Parquet file: it begins as one, and its end is missing (104 bytes)"),
        (gzip.compress(b"PAR1" * 9), "it is compressed with gzip as a whole; decompress it first"),
        (b"PAR1" + b"\xff" * 40 + b"\x20\x00\x00\x00PAR1", "its footer cannot be read: "),
        (b"PAR1" + b"x" * 40 + b"\xff\xff\xff\x7fPAR1", "its footer cannot be read: "),
    ],
    ids=["empty", "text", "cut", "gzip", "garbage", "footer larger than the file"],
)
def test_an_unreadable_file_gives_the_reason(content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(content)
    (found,) = reasons(tmp_path / "a.parquet")
    assert found.startswith(reason)


def test_a_whole_file_that_pyarrow_cannot_read_is_not_called_broken(tmp_path: Path) -> None:
    import polars as pl

    pl.DataFrame({"text": ["a"], "n": pl.Series([2**100], dtype=pl.Int128)}).write_parquet(tmp_path / "a.parquet")
    encrypted = write_encrypted(tmp_path / "b.parquet", plaintext_footer=False)
    assert reasons(tmp_path / "a.parquet", encrypted) == [
        "pyarrow cannot read it: Integers with more than 64 bits not implemented",
        "its footer is encrypted",
    ]


def test_a_footer_with_two_different_row_counts_is_refused(tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.parquet", {"text": ["a"] * 8})
    content = bytearray(path.read_bytes())
    start = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    footer = bytes(content[start:-8]).replace(
        b"\x16\x10\x19", b"\x16\x12\x19", 1
    )  # the file's own number: 9 in place of 8
    content[start:-8] = footer
    path.write_bytes(content)
    assert reasons(path) == ["its footer cannot be read: its footer promises 9 rows, but 8 in its row groups"]


def int96(path: Path, *values: dt.datetime | int | None) -> str:
    units = [
        value
        if isinstance(value, int)
        else None
        if value is None
        else round((value - dt.datetime(1970, 1, 1)).total_seconds())
        for value in values
    ]
    seconds = pa.array(units, pa.int64())
    far = any(value is not None and abs(value) > 9 * 10**9 for value in units)
    column = (
        seconds.cast(pa.timestamp("s"))
        if far
        else pa.array([None if v is None else v * 10**9 for v in units], pa.timestamp("ns"))
    )
    pair = pa.FixedSizeListArray.from_arrays(pa.concat_arrays([column, column]), 2)
    table = pa.table({"at": column, "in": pa.StructArray.from_arrays([column], ["at"]), "pair": pair})
    pq.write_table(table, path, use_deprecated_int96_timestamps=True)
    return str(path)


def test_dates_outside_the_range_of_nanoseconds_are_found_everywhere(tmp_path: Path) -> None:
    near = int96(tmp_path / "near.parquet", dt.datetime(1677, 9, 22), None, dt.datetime(2262, 4, 11))
    far = int96(tmp_path / "far.parquet", dt.datetime(2024, 1, 1), dt.datetime(9999, 12, 31))
    fine = tmp_path / "fine.parquet"
    pq.write_table(pa.table({"at": pa.array([1, 2], pa.timestamp("ns"))}), fine, use_deprecated_int96_timestamps=True)
    assert read_dates([near, far], ["at"]) == [Dates(False, False), Dates(True, False)]
    assert read_dates([far], ["in"]) == read_dates([far], ["pair"]) == [Dates(True, False)]
    assert read_dates([str(fine)], ["at"]) == [Dates(False, True)]
