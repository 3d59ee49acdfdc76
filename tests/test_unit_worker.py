"""One unit: unchanged rows, answers equal to the adapter's own, and a receipt for every failure."""

from __future__ import annotations

import datetime as dt
import json
import re
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from decimal import Decimal
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from builders import calibration, load_encoder, save_overflowing_encoder, toy_texts
from bulk import LABELS, Bulk, files_below, save_bulk_adapter, start, write_table

from pipeline.adapter.files import load_adapter
from pipeline.bulk.output import ATTEMPTS, FOOTER_KEY, PLAN, read_receipt
from pipeline.bulk.records import Receipt
from pipeline.bulk.worker import UnitWorker
from pipeline.bulk_input.blocks import block_rows
from pipeline.bulk_input.units import Unit
from pipeline.errors import AdapterError, DataError, InputError
from pipeline.inference.reference import find_adapters
from pipeline.parquet.schema import _Wkb
from pipeline.store.run_folder import TaskFolder

Folders = Callable[[str], Path]
TEXTS, _ = toy_texts(60)


@pytest.fixture(scope="module")
def encoder(encoder_folder: Folders) -> Path:
    return encoder_folder("bert")


@pytest.fixture(scope="module")
def adapter(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bulk_adapter(tmp_path_factory.mktemp("adapters") / "T", encoder)


@pytest.fixture
def start_bulk(adapter: Path, encoder: Path, tmp_path: Path) -> Callable[..., Bulk]:
    """Return a function that plans a job over a table in ``in/a.parquet``, or over the files in ``in``."""

    def begin(
        table: pa.Table | dict[str, Any] | None = None,
        *,
        write: dict[str, Any] | None = None,
        out: str = "out",
        **options: Any,
    ) -> Bulk:
        if table is not None:
            write_table(tmp_path / "in" / "a.parquet", table, **(write or {}))
        return start(tmp_path / "in", tmp_path / out, [adapter], encoder, **options)

    return begin


def rows_of(bulk: Bulk) -> pa.Table:
    return pa.concat_tables([pq.read_table(Path(bulk.output.root) / unit.output) for unit in bulk.source.units])


def read(bulk: Bulk, name: str) -> pa.Table:
    """Read the single file of the output, after labelling if needed."""
    assert all(receipt.failure is None for receipt in bulk.label())
    return pq.read_table(Path(bulk.output.root) / name)


def labelled(bulk: Bulk) -> pa.Table:
    receipts = bulk.label()
    assert [receipt.failure for receipt in receipts] == [None] * len(receipts)
    return rows_of(bulk)


def probabilities(adapter: Path, encoder: Path, texts: list[str]) -> np.ndarray:
    """Answers of the adapter as it was trained: float32, not merged, one text at a time."""
    loaded = load_encoder(encoder)
    kernel = load_adapter(TaskFolder(adapter), loaded)
    logits = [torch.from_numpy(kernel.logits_of_vectors(loaded.embed(loaded.tokenise([text])))) for text in texts]
    return torch.softmax(torch.cat(logits) / calibration().temperature, dim=1).numpy()


# Answers


def test_labels_and_scores_are_the_adapters_own_in_the_order_of_the_rows(
    start_bulk: Callable[..., Bulk], adapter: Path, encoder: Path
) -> None:
    table = labelled(start_bulk({"id": list(range(60)), "text": TEXTS}, write={"row_group_size": 9}, rows_per_unit=20))
    expected = probabilities(adapter, encoder, TEXTS)
    top = np.sort(expected, axis=1)
    clear = top[:, -1] - top[:, -2] > 0.05
    assert table.column("id").to_pylist() == list(range(60))
    assert table.column("text").to_pylist() == TEXTS
    given, best = np.array(table.column("T_label").to_pylist()), np.array(LABELS)[expected.argmax(axis=1)]
    assert clear.sum() > 30
    assert len(set(best[clear])) > 1
    assert (given[clear] == best[clear]).all()
    differences = np.abs(table.column("T_score").to_numpy() - expected.max(axis=1))
    assert differences.mean() < 0.01  # bfloat16 where the CPU has it
    assert differences.max() < 0.04
    assert table.column("T_reason").null_count == 60


def test_null_and_empty_texts_have_no_label_and_no_score_and_the_reason(start_bulk: Callable[..., Bulk]) -> None:
    bulk = start_bulk({"text": ["sea ship", None, "", " \n\t\u00a0", "soup"]}, top_k=2)
    (receipt,) = bulk.label()
    table = rows_of(bulk)
    reasons = [None, "text is null", "text is empty", "text is empty", None]
    assert table.column("T_reason").to_pylist() == reasons
    for column in ("T_label", "T_score", "T_top_k"):
        assert [value is None for value in table.column(column).to_pylist()] == [
            reason is not None for reason in reasons
        ]
    assert table.column("truncated").to_pylist() == [False] * 5
    assert (receipt.rows, receipt.null_labels, receipt.reasons) == (
        5,
        {"T": 3},
        {"text is null": 1, "text is empty": 2},
    )
    assert sum(receipt.labels["T"].values()) == 2


@pytest.mark.parametrize("top_k", [1, 3])
def test_a_unit_of_only_nulls_is_labelled_null(top_k: int, start_bulk: Callable[..., Bulk]) -> None:
    bulk = start_bulk({"text": pa.array([None] * 5, pa.string()), "id": range(5)}, top_k=top_k)
    (receipt,) = bulk.label()
    assert (receipt.failure, receipt.rows, receipt.null_labels, receipt.labels) == (None, 5, {"T": 5}, {"T": {}})
    assert rows_of(bulk).column("id").to_pylist() == list(range(5))


def test_equal_texts_are_computed_once_and_answered_alike(
    start_bulk: Callable[..., Bulk], monkeypatch: pytest.MonkeyPatch
) -> None:
    bulk = start_bulk({"text": [*TEXTS[:3], *TEXTS[:3], None, TEXTS[0], " "] * 3000})  # more than one block
    worker = UnitWorker(bulk.spec)
    computed: list[str] = []
    tokenise = worker.classifier.tokenise
    monkeypatch.setattr(worker.classifier, "tokenise", lambda texts, **_: computed.extend(texts) or tokenise(texts))
    receipt = worker.label(bulk.state.todo[0])
    answers = set(
        zip(*(rows_of(bulk).column(name).to_pylist() for name in ("text", "T_label", "T_score")), strict=True)
    )
    assert computed == TEXTS[:3]
    assert receipt.duplicates == 7 * 3000 - 3
    assert len(answers) == 5


def test_similar_texts_are_not_treated_as_equal(
    start_bulk: Callable[..., Bulk], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["ship", "Ship", "ship ", " ship", *(f"ship {number}" for number in range(3000))]
    bulk = start_bulk({"text": texts})
    worker = UnitWorker(bulk.spec)
    computed: list[str] = []
    tokenise = worker.classifier.tokenise
    monkeypatch.setattr(worker.classifier, "tokenise", lambda texts, **_: computed.extend(texts) or tokenise(texts))
    assert worker.label(bulk.state.todo[0]).duplicates == 0
    assert computed == texts


@pytest.mark.parametrize(("column", "repeated"), [("payload", False), ("pay.load", False), ("payload", True)])
def test_wide_rows_are_read_a_few_at_a_time(
    column: str, repeated: bool, start_bulk: Callable[..., Bulk], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.bulk_input.blocks._BLOCK_BYTES", 2**20)
    random = np.random.default_rng(0)
    texts = [f"{text} {number}" for number, text in enumerate(TEXTS[:50])]
    wide = [random.bytes(2**17)] * 50 if repeated else [random.bytes(2**17) for _ in texts]
    bulk = start_bulk({"text": texts, column: wide}, write={"use_dictionary": repeated})
    worker = UnitWorker(bulk.spec)
    blocks: list[int] = []
    tokenise = worker.classifier.tokenise
    monkeypatch.setattr(worker.classifier, "tokenise", lambda texts, **_: blocks.append(len(texts)) or tokenise(texts))
    worker.label(bulk.state.todo[0])
    assert max(blocks) <= 8
    assert sum(blocks) == 50
    assert rows_of(bulk).column("text").to_pylist() == texts


def test_a_label_below_the_threshold_is_null_and_keeps_its_score(start_bulk: Callable[..., Bulk]) -> None:
    free = labelled(start_bulk({"text": TEXTS}, out="free"))
    scores = free.column("T_score").to_numpy()
    middle = round(float(np.median(scores)), 3)
    bulk = start_bulk({"text": TEXTS}, min_score=middle)
    (receipt,) = bulk.label()
    strict = rows_of(bulk)
    low = scores < np.float32(middle)
    assert 0 < low.sum() < 60
    assert strict.column("T_score").equals(free.column("T_score"))
    assert strict.column("T_reason").to_pylist() == [f"score below {middle:g}" if is_low else None for is_low in low]
    assert strict.column("T_label").to_pylist() == [
        None if is_low else label for is_low, label in zip(low, free.column("T_label").to_pylist(), strict=True)
    ]
    assert (receipt.null_labels, receipt.reasons) == ({"T": low.sum()}, {f"score below {middle:g}": low.sum()})


def test_rows_that_grow_wide_after_narrow_ones_are_read_a_few_at_a_time(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    write_table(tmp_path / "a.parquet", {"text": [*["x"] * 64, *(random.bytes(2**20).hex() for _ in range(40))]})
    with pq.ParquetFile(tmp_path / "a.parquet") as parquet:
        unit = Unit(
            number=0,
            path=str(tmp_path / "a.parquet"),
            output="a-00000.parquet",
            row_groups=(0,),
            first_row=0,
            num_rows=104,
            first_row_of_file=0,
        )
        assert block_rows(parquet, unit, ["text"]) < 40


@pytest.mark.parametrize("options", [{}, {"min_score": 0.0}, {"min_score": 0.9}, {"top_k": 3}])
def test_a_score_that_is_nan_gives_no_label(options: dict[str, Any], tmp_path: Path) -> None:
    encoder = save_overflowing_encoder(tmp_path / "encoder", "storm")
    adapter = save_bulk_adapter(tmp_path / "T", encoder)
    texts = ["a storm near the harbour", "soup with pepper", None, "storm", ""]
    write_table(tmp_path / "in" / "a.parquet", {"text": texts})
    bulk = start(tmp_path / "in", tmp_path / "out", [adapter], encoder, **options)
    (receipt,) = bulk.label()
    table = rows_of(bulk).to_pydict()
    labels, reasons = table["T_label"], table["T_reason"]
    assert [labels[0], labels[3]] == [None, None]
    assert reasons[0] == reasons[3] == "score is not a number"
    assert [table["T_score"][0], table["T_score"][3]] == [None, None]
    assert (reasons[2], reasons[4]) == ("text is null", "text is empty")
    assert receipt.reasons["score is not a number"] == 2
    assert (labels[1] is None) == (options.get("min_score") == 0.9)
    if "top_k" in options:
        assert [top is None for top in table["T_top_k"]] == [True, False, True, True, True]


def test_a_score_equal_to_the_threshold_keeps_its_label(start_bulk: Callable[..., Bulk]) -> None:
    free = labelled(start_bulk({"text": TEXTS}, out="free"))
    score = float(np.sort(free.column("T_score").to_numpy())[30])
    labels = labelled(start_bulk({"text": TEXTS}, min_score=score)).column("T_label")
    assert labels.null_count == (free.column("T_score").to_numpy() < score).sum() < 60


def test_the_best_labels_are_listed_best_first(start_bulk: Callable[..., Bulk]) -> None:
    table = labelled(start_bulk({"text": TEXTS}, top_k=2))
    for label, score, top in zip(
        *(table.column(f"T_{part}").to_pylist() for part in ("label", "score", "top_k")), strict=True
    ):
        assert top[0] == {"label": label, "score": score}
        assert len(top) == 2
        assert top[0]["score"] >= top[1]["score"]
        assert top[0]["label"] != top[1]["label"]


def test_all_labels_can_be_listed_and_no_more_than_any_adapter_has(
    adapter: Path, encoder: Path, tmp_path: Path
) -> None:
    other = save_bulk_adapter(tmp_path / "Other", encoder, labels=("yes", "no"), seed=7, calibrated=False)
    path = write_table(tmp_path / "a.parquet", {"text": TEXTS[:4]})
    table = labelled(start(path, tmp_path / "out", [adapter, other], encoder, top_k=len(LABELS)))
    for column, labels in {"T_top_k": LABELS, "Other_top_k": ("yes", "no")}.items():
        for top in table.column(column).to_pylist():
            assert sum(entry["score"] for entry in top) == pytest.approx(1, abs=1e-5)
            assert sorted(entry["label"] for entry in top) == sorted(labels)
    with pytest.raises(InputError, match=f"--top-k 9: there are only {len(LABELS)} labels"):
        start(path, tmp_path / "refused", [adapter, other], encoder, top_k=9)


def test_texts_cut_at_the_encoders_length_are_marked(start_bulk: Callable[..., Bulk]) -> None:
    bulk = start_bulk({"text": ["sea " * 23, "sea " * 22, None, "", "sea"]})  # with [CLS] and [SEP] of 24
    (receipt,) = bulk.label()
    assert rows_of(bulk).column("truncated").to_pylist() == [True, False, False, False, False]
    assert receipt.truncated == 1


def test_a_text_of_ten_megabytes_costs_as_much_as_its_beginning(start_bulk: Callable[..., Bulk]) -> None:
    bulk = start_bulk({"text": ["sea ship " * 1_200_000, "sea ship " * 20]})
    started = time.monotonic()
    labels = labelled(bulk)
    assert time.monotonic() - started < 10
    assert labels.column("T_label")[0] == labels.column("T_label")[1]
    assert labels.column("truncated").to_pylist() == [True, True]


def test_two_adapters_in_one_pass_answer_like_each_alone(adapter: Path, encoder: Path, tmp_path: Path) -> None:
    other = save_bulk_adapter(tmp_path / "Other", encoder, labels=("yes", "no"), seed=7, calibrated=False)
    path = write_table(tmp_path / "a.parquet", {"text": [*TEXTS, None]})
    both = labelled(start(path, tmp_path / "both", [adapter, other], encoder))
    for folder in (adapter, other):
        alone = labelled(start(path, tmp_path / f"only-{folder.name}", [folder], encoder))
        assert both.select(alone.column_names).equals(alone)
    assert both.column_names == [
        "text",
        "T_label",
        "T_score",
        "T_reason",
        "Other_label",
        "Other_score",
        "Other_reason",
        "truncated",
    ]


# Rows


ALL_TYPES = pa.table(
    {
        "text": pa.array(["sea", None, "soup", "sea"]).dictionary_encode(),
        "int": pa.array([1, None, 3, 4], pa.int16()),
        "float": pa.array([0.5, float("nan"), None, -0.0]),
        "moment": pa.array(
            [datetime(2026, 1, 2, tzinfo=UTC), None, None, datetime(1969, 1, 1, tzinfo=UTC)], pa.timestamp("us", "UTC")
        ),
        "nanos": pa.array([1, 2, None, 4], pa.timestamp("ns")),
        "list": pa.array([[1, 2], None, [], [None]], pa.large_list(pa.int32())),
        "struct": pa.array([{"a": 1, "b": ["x"]}, None, {"a": None, "b": []}, {"a": 2, "b": None}]),
        "map": pa.array([[("k", 1)], None, [], [("l", None)]], pa.map_(pa.string(), pa.int64())),
        "category": pa.array(["x", "y", None, "x"]).dictionary_encode(),
        "decimal": pa.array([Decimal("1.25"), None, Decimal("-3.00"), Decimal("0.01")], pa.decimal128(10, 2)),
        "bytes": pa.array([b"\x00\xff", None, b"", b"x"]),
        "large": pa.array(["a", None, "", "b"], pa.large_string()),
        "nothing": pa.nulls(4),
        "dotted.name": pa.array([True, None, False, True]),
    }
)


def test_every_type_of_column_survives(start_bulk: Callable[..., Bulk]) -> None:
    bulk = start_bulk(ALL_TYPES, write={"row_group_size": 2})
    table = labelled(bulk)
    there = pq.read_table(bulk.source.files[0].path)
    assert table.select(there.column_names).schema.equals(there.schema)
    for name in there.column_names:
        assert str(table.column(name).to_pylist()) == str(ALL_TYPES.column(name).to_pylist()), name


def test_dictionaries_that_differ_from_row_group_to_row_group_survive(
    tmp_path: Path, start_bulk: Callable[..., Bulk]
) -> None:
    schema = pa.schema(
        [("text", pa.dictionary(pa.int32(), pa.string())), ("kind", pa.dictionary(pa.int32(), pa.string()))]
    )
    words = [["sea", "soup", "sea"], ["tree", "sea", None], ["oven", "oven", "tree"]]
    parts = [
        pa.table(
            {"text": pa.array(some).dictionary_encode(), "kind": pa.array(some).dictionary_encode()}, schema=schema
        )
        for some in words
    ]
    table = labelled(start_bulk(pa.concat_tables(parts), write={"row_group_size": 3}))
    assert (
        table.column("text").to_pylist()
        == table.column("kind").to_pylist()
        == [word for some in words for word in some]
    )
    assert table.schema.field("kind").type == schema.field("kind").type


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())])
def test_text_of_any_text_type_gets_the_same_answers(kind: pa.DataType, start_bulk: Callable[..., Bulk]) -> None:
    texts = pa.array([*TEXTS[:9], None, ""], pa.string())
    plain = labelled(start_bulk({"text": texts}, out="plain"))
    other = labelled(start_bulk({"text": texts.cast(kind)}))
    assert other.select(["T_label", "T_score", "T_reason"]).equals(plain.select(["T_label", "T_score", "T_reason"]))


def test_each_columns_compression_is_kept_and_new_columns_have_the_texts(start_bulk: Callable[..., Bulk]) -> None:
    columns = pa.table(
        {"text": TEXTS[:4], "a": range(4), "a.b": range(4), "list": [[1], [2], [], None], "plain": range(4)}
    )
    codecs = {"text": "zstd", "a": "gzip", "a.b": "brotli", "list.list.element": "snappy", "plain": "none"}
    bulk = start_bulk(columns, write={"compression": codecs}, top_k=2)
    labelled(bulk)
    group = pq.read_metadata(Path(bulk.output.root) / "a-00000.parquet").row_group(0)
    found = {group.column(i).path_in_schema: group.column(i).compression for i in range(group.num_columns)}
    old = {"text": "ZSTD", "a": "GZIP", "a.b": "BROTLI", "list.list.element": "SNAPPY", "plain": "UNCOMPRESSED"}
    new = {name: "ZSTD" for name in found if name.startswith("T_") or name == "truncated"}
    assert len(new) == 6
    assert found == old | new


@pytest.mark.parametrize("columns", [None, ("value",)])
def test_pandas_reads_what_pandas_wrote(
    columns: tuple[str, ...] | None, tmp_path: Path, adapter: Path, encoder: Path
) -> None:
    index = pd.MultiIndex.from_arrays([list("abcd"), [3, 1, 4, 1]], names=["key", "number"])
    frames = {
        "range": pd.DataFrame({"text": TEXTS[:4], "value": [1.5, None, 2, 3]}),
        "named": pd.DataFrame({"text": TEXTS[:4], "value": pd.Categorical(["x", "y", None, "x"])}, index=index),
    }
    for name, frame in frames.items():
        frame.to_parquet(tmp_path / f"{name}.parquet")
        bulk = start(
            tmp_path / f"{name}.parquet", tmp_path / name, [adapter], encoder, columns=columns, rows_per_unit=3
        )
        labelled(bulk)
        read = pd.concat(
            [pd.read_parquet(tmp_path / name / unit.output) for unit in bulk.source.units], ignore_index=name == "range"
        )
        expected = frame if columns is None else frame[list(columns)]
        if columns is not None:
            expected = expected.reset_index(drop=True)
            read = read.reset_index(drop=True)
        pd.testing.assert_frame_equal(read[list(expected.columns)], expected, check_categorical=False)


def test_dates_beyond_nanoseconds_are_kept_in_every_file_of_the_job_and_the_change_is_named(
    start_bulk: Callable[..., Bulk], tmp_path: Path
) -> None:
    far = [datetime(1, 1, 1), datetime(9999, 12, 31, 23, 59, 59), None]
    for name, days in (("a", [datetime(2024, 1, 1, 12, 30)] * 3), ("b", far)):
        table = pa.table({"text": TEXTS[:3], "day": pa.array(days, pa.timestamp("us"))})
        write_table(tmp_path / "in" / f"{name}.parquet", table, use_deprecated_int96_timestamps=True)
    bulk = start_bulk()
    days = [read(bulk, f"{name}-00000.parquet").column("day") for name in "ab"]
    assert [column.type for column in days] == [pa.timestamp("us")] * 2
    assert days[1].to_pylist() == far
    assert bulk.source.changes == ("day: int96 becomes Timestamp(isAdjustedToUTC=false, timeUnit=microseconds)",)


def test_if_both_do_not_fit_microseconds_are_kept_and_the_loss_is_named(
    start_bulk: Callable[..., Bulk], tmp_path: Path
) -> None:
    for name, unit, value in (("fine", "ns", 1_704_067_200_000_000_001), ("far", "s", 253_402_300_799)):
        table = pa.table({"text": TEXTS[:1], "day": pa.array([value], pa.timestamp(unit))})
        write_table(tmp_path / "in" / f"{name}.parquet", table, use_deprecated_int96_timestamps=True)
    bulk = start_bulk()
    assert read(bulk, "far-00000.parquet").column("day").to_pylist() == [datetime(9999, 12, 31, 23, 59, 59)]
    assert bulk.source.changes[-1] == "INT96 columns: nanoseconds are cut to microseconds"


def test_files_that_differ_without_a_loss_are_read_together(start_bulk: Callable[..., Bulk], tmp_path: Path) -> None:
    tables = {
        "a": pa.table(
            {"n": pa.array([1], pa.int32()), "text": [TEXTS[0]], "kind": pa.array(["x"]).dictionary_encode()}
        ),
        "b": pa.table(
            {"text": pa.array([TEXTS[1]], pa.large_string()), "n": pa.array([2**40]), "kind": ["y"], "late": [True]}
        ),
        "c": pa.table({"text": pa.nulls(1), "n": pa.nulls(1), "kind": pa.nulls(1)}),
        "d": pa.table({"kind": ["z"], "text": pa.array([TEXTS[0]], pa.string_view()), "n": pa.array([4], pa.int8())}),
    }
    for name, table in tables.items():
        write_table(tmp_path / "in" / f"{name}.parquet", table)
    bulk = start_bulk()
    found = pa.concat_tables(
        [read(bulk, f"{name}-00000.parquet").select(["n", "text", "kind", "late", "T_reason"]) for name in tables]
    )
    assert found.to_pydict() == {
        "n": [1, 2**40, None, 4],
        "text": [TEXTS[0], TEXTS[1], None, TEXTS[0]],
        "kind": ["x", "y", None, "z"],
        "late": [None, True, None, None],
        "T_reason": [None, None, "text is null", None],
    }


def test_a_text_column_of_json_or_of_bytes_is_read_and_stays_what_it_is(start_bulk: Callable[..., Bulk]) -> None:
    expected = labelled(start_bulk({"text": TEXTS[:3]}, out="plain")).column("T_label")
    for out, texts in (
        ("json", pa.ExtensionArray.from_storage(pa.json_(), pa.array(TEXTS[:3]))),
        ("bytes", pa.array([text.encode() for text in TEXTS[:3]])),
    ):
        table = labelled(start_bulk(pa.table({"text": texts}), out=out))
        assert table.column("T_label").equals(expected)
        assert table.column("text").type == texts.type


def test_bytes_that_are_not_text_are_refused_before_work_starts(start_bulk: Callable[..., Bulk]) -> None:
    with pytest.raises(DataError, match="column 'text' is binary, and its first values are not UTF-8 text"):
        start_bulk({"text": [b"\x89PNG\xff", None, b"\xff\xfe"]})


def test_a_sample_of_views_equals_that_of_plain_columns(start_bulk: Callable[..., Bulk]) -> None:
    texts, ids = pa.array((TEXTS * 20)[:1000]), pa.array([[str(i)] for i in range(1000)])
    plain = labelled(start_bulk(pa.table({"text": texts, "id": ids}), out="plain", sample=0.3))
    views = pa.table({"text": texts.cast(pa.string_view()), "id": ids.cast(pa.list_(pa.string_view()))})
    found = labelled(start_bulk(views, out="views", sample=0.3))
    assert found.column("text").type == pa.string_view()
    assert found.to_pydict() == plain.to_pydict()
    assert 200 < len(found) < 400


def test_a_time_that_is_adjusted_to_utc_stays_so_and_among_others_the_change_is_named(
    start_bulk: Callable[..., Bulk], tmp_path: Path
) -> None:
    times = pa.array([1, 2], pa.time64("us"))
    adjusted = start_bulk(pa.table({"text": TEXTS[:2], "at": times}), write={"write_time_adjusted_to_utc": True})
    labelled(adjusted)
    schema = pq.ParquetFile(Path(adjusted.output.root) / "a-00000.parquet").schema
    assert "isAdjustedToUTC=true" in str(schema.column(1).logical_type)
    assert adjusted.source.changes == ()


def test_a_geometry_stays_a_geometry(start_bulk: Callable[..., Bulk]) -> None:
    places = pa.ExtensionArray.from_storage(_Wkb(b'{"crs": "srid:5070"}'), pa.array([b"\x01", None]))
    bulk = start_bulk(pa.table({"text": TEXTS[:2], "place": places}))
    assert labelled(bulk).column("place").to_pylist() == [b"\x01", None]
    described = str(pq.ParquetFile(Path(bulk.output.root) / "a-00000.parquet").schema)
    assert "place (Geometry(crs=srid:5070))" in described
    assert bulk.source.changes == ()


def test_only_chosen_columns_are_kept_even_none(start_bulk: Callable[..., Bulk]) -> None:
    table = {"text": TEXTS[:5], "id": range(5)}
    assert labelled(start_bulk(table, out="id", columns=("id",))).column_names == [
        "id",
        "T_label",
        "T_score",
        "T_reason",
        "truncated",
    ]
    none = labelled(start_bulk(table, out="none", columns=()))
    assert none.column_names == ["T_label", "T_score", "T_reason", "truncated"]
    assert len(none) == 5


def test_slices_of_a_row_group_and_a_limit_lose_no_row_and_repeat_none(start_bulk: Callable[..., Bulk]) -> None:
    table = {"text": (TEXTS * 700)[:40_000], "id": range(40_000)}
    bulk = start_bulk(table, write={"row_group_size": 40_000}, rows_per_unit=17_000, limit=39_990)
    assert [unit.num_rows for unit in bulk.source.units] == [17_000, 17_000, 5_990]
    assert labelled(bulk).column("id").to_pylist() == list(range(39_990))


def test_a_sample_is_the_same_in_every_run_and_about_its_share(start_bulk: Callable[..., Bulk]) -> None:
    table = {"text": (TEXTS * 200)[:12_000], "id": range(12_000)}
    first, again = (labelled(start_bulk(table, out=out, sample=0.1, rows_per_unit=4_000)) for out in ("first", "again"))
    ids = first.column("id").to_pylist()
    assert first.equals(again)
    assert ids == sorted(ids)
    assert 1_050 < len(ids) < 1_350
    assert len({id % 4_000 for id in ids}) > 1_000, "each unit has its own draw"


def test_a_sample_that_draws_no_row_of_a_unit_is_an_empty_file(start_bulk: Callable[..., Bulk]) -> None:
    bulk = start_bulk({"text": TEXTS[:3]}, sample=1e-9, top_k=2)
    (receipt,) = bulk.label()
    assert (receipt.failure, receipt.rows) == (None, 0)
    assert len(rows_of(bulk)) == 0


# The footer


def facts(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(pq.read_metadata(path).metadata[FOOTER_KEY])
    return found


def test_the_footer_names_the_job_and_the_input_of_the_file(
    start_bulk: Callable[..., Bulk], adapter: Path, tmp_path: Path
) -> None:
    bulk = start_bulk({"text": TEXTS[:4]}, rows_per_unit=3, min_score=0.25)
    receipts = bulk.label()
    (found,) = find_adapters([str(adapter)], offline=True)
    said = facts(tmp_path / "out" / "a-00001.parquet")
    assert said["adapters"] == [
        {
            "name": "T",
            "sha256": found.sha256,
            "encoder_revision": found.encoder.revision,
            "labels_sha256": found.labels_sha256,
            "described_sha256": found.described_sha256,
            "threshold": 0.25,
        }
    ]
    assert (said["lorafleet_version"], said["input_file"], said["first_row"], said["job"]) == (
        version("lorafleet"),
        str(tmp_path / "in" / "a.parquet"),
        3,
        bulk.job.fingerprint,
    )
    assert read_receipt(bulk.output, bulk.source.units[1]) == Receipt.model_validate(
        {**receipts[1].model_dump(), "seconds": 0.0, "version": ""}
    )


def test_the_output_of_one_job_can_be_the_input_of_another(
    start_bulk: Callable[..., Bulk], encoder: Path, tmp_path: Path
) -> None:
    labelled(start_bulk({"text": TEXTS[:4]}))
    other = save_bulk_adapter(tmp_path / "Other", encoder, seed=3)
    bulk = start(tmp_path / "out", tmp_path / "second", [other], encoder, columns=("text", "T_label"))
    assert labelled(bulk).column_names == ["text", "T_label", "Other_label", "Other_score", "Other_reason", "truncated"]
    path = tmp_path / "second" / "a-00000-00000.parquet"
    assert facts(path)["adapters"][0]["name"] == "Other"


def test_labelling_a_unit_twice_gives_equal_bytes(adapter: Path, encoder: Path, tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.parquet", {"text": [*TEXTS, None, "", *TEXTS[:5]]})
    for out in ("one", "two"):
        labelled(start(path, tmp_path / out, [adapter], encoder, top_k=2, min_score=0.5))
    assert (tmp_path / "one" / "a-00000.parquet").read_bytes() == (tmp_path / "two" / "a-00000.parquet").read_bytes()


def test_an_existing_unit_is_not_labelled_again(start_bulk: Callable[..., Bulk], tmp_path: Path) -> None:
    bulk = start_bulk({"text": TEXTS[:4]})
    (first,) = bulk.label()
    written = (tmp_path / "out" / "a-00000.parquet").stat().st_mtime_ns
    (again,) = bulk.label()
    assert again.rows == first.rows == 4
    assert again.labels == first.labels
    assert (tmp_path / "out" / "a-00000.parquet").stat().st_mtime_ns == written


# Faults


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damage_pages(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[8 : len(content) // 2] = b"\xff" * (len(content) // 2 - 8)
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (cut_in_half, "had [0-9,]+ bytes when the job was planned, and has"),
        (damage_pages, "."),
        (lambda path: path.unlink(), "had [0-9,]+ bytes when the job was planned, and is gone"),
        (lambda path: write_table(path, {"text": TEXTS[:3]}), "had [0-9,]+ bytes when the job was planned, and has"),
        (lambda path: write_table(path, {"body": TEXTS}), "has changed since the job was planned"),
    ],
    ids=["cut", "damaged", "gone", "shorter", "other columns of the same size"],
)
def test_a_file_that_breaks_after_planning_is_a_failure_and_leaves_nothing(
    change: Callable[[Path], None], reason: str, start_bulk: Callable[..., Bulk], tmp_path: Path
) -> None:
    bulk = start_bulk({"text": TEXTS})
    write_table(tmp_path / "in" / "b.parquet", {"text": TEXTS[:2]})
    bulk = start(tmp_path / "in", tmp_path / "two", bulk.spec.refs, Path(bulk.spec.encoder or ""))
    change(tmp_path / "in" / "a.parquet")
    broken, good = bulk.label()
    assert broken.failure is not None
    assert re.search(reason, broken.failure)
    assert (broken.fatal, broken.rows, good.failure, good.rows) == (False, 0, None, 2)
    assert files_below(tmp_path / "two") == [PLAN, "b-00000.parquet"]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.binary_view()])
def test_a_text_that_is_not_utf8_has_no_label_and_a_reason_and_the_others_have_theirs(
    kind: pa.DataType, start_bulk: Callable[..., Bulk]
) -> None:
    good = labelled(start_bulk({"text": [TEXTS[0], TEXTS[1]]}, out="good"))
    content = [TEXTS[0].encode(), b"caf\xe9", None, b"", TEXTS[1].encode()]
    loose = pa.array(content, pa.binary())
    bad = pa.Array.from_buffers(pa.string(), len(loose), loose.buffers()) if "string" in str(kind) else loose
    table = labelled(
        start_bulk(
            pa.table({"text": bad.cast(kind) if kind != pa.string_view() else bad.cast(pa.large_string()).cast(kind)})
        )
    )
    assert table.column("T_reason").to_pylist() == [None, "text is not UTF-8", "text is null", "text is empty", None]
    assert table.column("T_label").to_pylist() == [
        good["T_label"][0].as_py(),
        None,
        None,
        None,
        good["T_label"][1].as_py(),
    ]
    assert table.column("text").cast(pa.large_binary()).to_pylist() == content


@pytest.mark.parametrize("num_values", [0, 4])
@pytest.mark.parametrize("columns", [None, ()])
def test_a_column_with_fewer_rows_than_the_footer_promises_is_a_failure(
    num_values: int, columns: tuple[str, ...] | None, start_bulk: Callable[..., Bulk], tmp_path: Path
) -> None:
    path = write_table(
        tmp_path / "in" / "a.parquet",
        {"text": TEXTS[:8]},
        use_dictionary=False,
        compression="none",
        write_statistics=False,
    )
    content = path.read_bytes()
    eight_values = b"\x2c\x15\x10"  # in the header of the only page
    assert content.count(eight_values) == 1
    path.write_bytes(content.replace(eight_values, b"\x2c\x15" + bytes([2 * num_values])))
    (receipt,) = start_bulk(columns=columns).label()
    assert receipt.failure == f"its footer promises 8 rows in row groups (0,), and its columns have {num_values}"
    assert files_below(tmp_path / "out") == [PLAN]


def test_a_unit_that_killed_three_workers_is_left_alone(start_bulk: Callable[..., Bulk], tmp_path: Path) -> None:
    bulk = start_bulk({"text": TEXTS}, rows_per_unit=30)
    for attempt in "abc":
        bulk.output.write(f"{ATTEMPTS}/00000-{attempt}", b"")
    for attempt in "ab":
        bulk.output.write(f"{ATTEMPTS}/00001-{attempt}", b"")
    killer, other = bulk.label()
    assert killer.failure == "killed the worker 3 times"
    assert other.failure is None
    assert files_below(tmp_path / "out") == [
        *(f"{ATTEMPTS}/{name}" for name in ("00000-a", "00000-b", "00000-c", "00001-a", "00001-b")),
        PLAN,
        "a-00001.parquet",
    ]


def test_an_adapter_that_was_retrained_since_planning_is_refused(
    start_bulk: Callable[..., Bulk], encoder: Path, tmp_path: Path
) -> None:
    folder = save_bulk_adapter(tmp_path / "Mine", encoder)
    path = write_table(tmp_path / "a.parquet", {"text": TEXTS})
    bulk = start(path, tmp_path / "out", [folder], encoder)
    save_bulk_adapter(folder, encoder, seed=9)
    with pytest.raises(AdapterError, match="adapter Mine: has changed since the job was planned"):
        UnitWorker(bulk.spec)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no right to mount a small disk: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_fatal_and_leaves_nothing_half_written(
    small_disk: Path, adapter: Path, encoder: Path, tmp_path: Path
) -> None:
    noise = np.random.default_rng(0).bytes(400_000)
    path = write_table(tmp_path / "a.parquet", {"text": ["sea", "soup"], "noise": [b"little", noise]}, row_group_size=1)
    bulk = start(path, small_disk / "out", [adapter], encoder, rows_per_unit=1)
    small, large = bulk.label()
    assert (small.failure, small.fatal) == (None, False)
    assert "No space left" in (large.failure or "")
    assert large.fatal
    assert files_below(small_disk / "out") == [PLAN, "a-00000.parquet"]


def test_an_output_too_large_for_its_file_system_fails_alone(start_bulk: Callable[..., Bulk], tmp_path: Path) -> None:
    noise = np.random.default_rng(0).bytes(400_000)
    bulk = start_bulk(
        {"text": ["sea", "soup"], "noise": [noise, b"little"]}, write={"row_group_size": 1}, rows_per_unit=1
    )
    kept = resource.getrlimit(resource.RLIMIT_FSIZE)
    worker = UnitWorker(bulk.spec)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, kept[1]))
    try:
        large, small = (worker.label(unit) for unit in bulk.state.todo)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, kept)
    assert "File too large" in (large.failure or "")
    assert (large.fatal, small.failure) == (False, None)
    assert files_below(tmp_path / "out") == [PLAN, "a-00001.parquet"]


@pytest.mark.parametrize("is_nested", [False, True])
@pytest.mark.parametrize("name", ["at (UTC)", "at(UTC)", "at (x) y", "at.", "at {", 'at "', "at\n"])
def test_dates_and_times_are_kept_whatever_their_columns_are_called(
    name: str, is_nested: bool, start_bulk: Callable[..., Bulk]
) -> None:
    dates = pa.array([dt.datetime(9999, 12, 31), dt.datetime(1, 1, 1)], pa.timestamp("us"))
    columns = {name: dates, f"{name} t": pa.array([1, 2], pa.time64("us"))}
    table = pa.table(columns)
    if is_nested:
        table = pa.table({name: table.to_struct_array().combine_chunks()})
    write = {"use_deprecated_int96_timestamps": True, "write_time_adjusted_to_utc": True}
    bulk = start_bulk(table.append_column("text", pa.array(TEXTS[:2])), write=write)
    found = labelled(bulk)
    assert found.select(table.column_names).to_pylist() == table.to_pylist()
    assert len(bulk.source.changes) == 1
    assert "int96" in bulk.source.changes[0]
    written = pq.ParquetFile(Path(bulk.output.root) / "a-00000.parquet").schema
    assert "Time(isAdjustedToUTC=true, timeUnit=microseconds)" in {
        str(written.column(i).logical_type) for i in range(len(written))
    }


def test_a_file_with_the_longest_possible_name_is_labelled(start_bulk: Callable[..., Bulk], tmp_path: Path) -> None:
    names = [f"{'é' * 123}x.parquet", f"{'é' * 123}y.parquet", f"{'ü' * 123}x.parquet"]
    for name in names:
        write_table(tmp_path / "in" / name, {"text": TEXTS[:2]})
    bulk = start_bulk()
    assert labelled(bulk).num_rows == 6
    assert len({unit.output for unit in bulk.source.units}) == 3


def test_an_unparsable_footer_key_is_reported_and_dropped(start_bulk: Callable[..., Bulk]) -> None:
    bulk = start_bulk(pa.table({"text": TEXTS[:2]}).replace_schema_metadata({"pandas": "[" * 100_000, "owner": "me"}))
    assert labelled(bulk).schema.metadata[b"owner"] == b"me"
    assert bulk.source.changes == ("footer key pandas: cannot be parsed, and is dropped",)


@pytest.mark.parametrize("name", ["lr=0.1", "run#1", "a:b", "x@y"])
def test_an_adapter_whose_name_cannot_be_passed_on_must_be_named(
    name: str, adapter: Path, encoder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(adapter, tmp_path / name)
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({key: value for key, value in meta.items() if key != "task"}))
    write_table(tmp_path / "in" / "a.parquet", {"text": TEXTS[:2]})
    with pytest.raises(AdapterError, match="name it: --adapter NAME="):
        start(tmp_path / "in", tmp_path / "out", [folder], encoder)
    assert start(tmp_path / "in", tmp_path / "out", [f"N={folder}"], encoder).run().rows_out == 2


def test_maps_and_lists_of_one_size_are_joined(start_bulk: Callable[..., Bulk], tmp_path: Path) -> None:
    for file, kind in (("a", pa.int32()), ("b", pa.int64())):
        values = [[("k", 1)], []], [[1, 2], [3, 4]]
        columns = zip(("map", "pair"), values, (pa.map_(pa.string(), kind), pa.list_(kind, 2)), strict=True)
        write_table(
            tmp_path / "in" / f"{file}.parquet", {"text": TEXTS[:2], **{name: pa.array(v, t) for name, v, t in columns}}
        )
    found = labelled(start_bulk())
    assert found.column("map").to_pylist() == [[("k", 1)], []] * 2
    assert found.column("pair").to_pylist() == [[1, 2], [3, 4]] * 2
