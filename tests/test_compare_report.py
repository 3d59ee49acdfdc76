"""What the report of a comparison shows: groups of pairs, errors, figures, and texts of strangers."""

from __future__ import annotations

import importlib.util
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics.cluster import contingency_matrix
from test_compare import values_of_config, write_labelled_pairs

from pipeline.compare.groupings import pair_groupings, text_map
from pipeline.compare.preflight import preflight_comparison
from pipeline.compare.report.page import answer, write_page
from pipeline.compare.report.pair_errors import PairErrors
from pipeline.compare.scores import score_arms
from pipeline.compare.statistics import Series
from pipeline.config import ComparisonConfig, EvaluateConfig
from pipeline.encoder.runtime import exact_runtime
from pipeline.errors import ConfigError
from pipeline.pairs.data import PairData, PairSplit
from pipeline.records import MtebTask
from pipeline.vector_scores import cluster_metrics

LONG = "x" * 500
MARKUP = "<script>alert(1)</script>"


def unit(vectors: Any) -> Any:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def test_purity_is_that_of_the_contingency_table() -> None:
    random = np.random.default_rng(0)
    labels, clusters, times = (random.integers(high, size=60) for high in (3, 5, 4))
    table = contingency_matrix(np.repeat(labels, times), np.repeat(clusters, times))
    found = cluster_metrics.purity(times[:, np.newaxis].astype(float), labels=labels, clusters=clusters[np.newaxis])
    assert found[0, 0] == pytest.approx(table.max(axis=0).sum() / table.sum())
    alone = cluster_metrics.purity(np.ones((60, 1)), labels=np.zeros(60, dtype=int), clusters=clusters[np.newaxis])
    assert np.isnan(alone).all()


def test_groups_of_pairs_are_the_same_each_time_and_separate_what_is_apart() -> None:
    random = np.random.default_rng(0)
    centres = unit(random.normal(size=(2, 32)))
    members = np.repeat([0, 1], 40)
    first, second = (unit(centres[members] + 0.05 * random.normal(size=(80, 32))) for _ in range(2))
    once, again = (pair_groupings(first, second, method="t-sne") for _ in range(2))
    assert {name: array.tolist() for name, array in once.items()} == {n: a.tolist() for n, a in again.items()}
    for clusters in (once["clusters"][0], once["map_clusters"]):
        assert all(len(set(members[clusters == number])) == 1 for number in set(clusters) - {-1})
    assert once["map_points"].shape == (80, 2)


@pytest.mark.parametrize("count", [1, 2, 19])
def test_few_pairs_have_clusters_but_no_map(count: int) -> None:
    vectors = unit(np.random.default_rng(0).normal(size=(count, 8)))
    assert set(pair_groupings(vectors, vectors, method="t-sne")) == {"clusters"}
    assert text_map(vectors, method="t-sne") == {}
    equal = np.repeat(vectors[:1], 24, axis=0)
    assert pair_groupings(equal, equal, method="t-sne").keys() == {"clusters"}
    assert text_map(equal, method="t-sne") == {}


@pytest.fixture
def data() -> PairData:
    """Twenty labelled pairs of two kinds, one with texts of a stranger."""
    columns = [[MARKUP, LONG, *(f"one {n}" for n in range(18))], [f"other {n}" for n in range(20)]]
    labels = np.array([0.0, 1.0] * 10)
    test = PairSplit(tuple(columns), labels, {MARKUP: ["a"] * 9 + ["<b>"] * 11})
    empty = PairSplit(([], []), np.empty(0), {})
    task = MtebTask.model_construct(name="Toys", objective="text-matching", prefixes=None, slices=(MARKUP,))
    nowhere = np.zeros(20, dtype=np.bool_)
    return PairData(task, "labels", empty, empty, test, [], nowhere, nowhere, (0.0, 1.0), "f", "t", ())


def series_of(data: PairData, arm: str, wrong: list[int], *, seed: int = 0, **arrays: Any) -> Series:
    """Similarities that are right by 0.8 and 0.2, but for some pairs."""
    assert data.test.scores is not None
    similarity = np.where(data.test.scores == 1, 0.8, 0.2)
    similarity[wrong] = 1 - similarity[wrong]
    validation = {"validation_similarity": np.array([[0.2, 0.8]]), "validation_gold": np.array([0.0, 1.0])}
    return Series(arm, seed, {"similarity": similarity[np.newaxis], **validation, **arrays})


def test_errors_are_counted_by_slice_and_listed(data: PairData) -> None:
    arms = [("frozen", [2, 3]), ("full", [0]), ("lora", [0, 1])]
    errors = PairErrors(data, [series_of(data, arm, wrong, seed=seed) for arm, wrong in arms for seed in (0, 1)])
    assert not errors.is_optimistic
    (of_full,) = [count for count in errors.counts() if (count.arm, count.slice_value) == ("full", "a")]
    assert (of_full.num_negative, of_full.false_positives, of_full.false_negatives) == (5, 1, 0)
    pairs = errors.pairs()
    assert [(pair.row, pair.wrong_arms) for pair in pairs] == [(0, ("full", "lora")), (1, ("lora",))]
    assert pairs[0].similarity == pytest.approx({"frozen": 0.2, "full": 0.8, "lora": 0.8})


def test_without_validation_the_threshold_is_marked_optimistic(data: PairData) -> None:
    one = series_of(data, "frozen", [])
    bare = Series("frozen", 0, {"similarity": one.arrays["similarity"]})
    assert PairErrors(data, [bare]).is_optimistic
    assert PairErrors(data, [bare]).pairs() == []
    scores = score_arms(data, [bare], config=EvaluateConfig(bootstrap_draws=100), seed=0)
    marked = {value.metric for value in scores.values if value.optimistic}
    assert marked == {"f1_best_threshold", "false_positives_best_threshold"}
    assert "f1" not in {value.metric for value in scores.values}


class _Balance(HTMLParser):
    """Checks that every element is closed, and that nothing is loaded or run."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        assert tag not in ("script", "img", "link", "iframe", "b")
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_cuts_and_escapes_texts_of_strangers(data: PairData, tmp_path: Path) -> None:
    arms = ("frozen", "full", "lora")
    series = [series_of(data, arm, [] if arm == "frozen" else [0, 1]) for arm in arms]
    scores = score_arms(data, series, config=EvaluateConfig(bootstrap_draws=100), seed=0)
    cost = {"bytes_per_task": 1e6, "seconds_per_training": 3.0, "train_seconds": 9.0, "peak_memory_bytes": 1e9}
    cost |= {"parameters": 7, "texts_per_second_merged": 5.0, "texts_per_second_unmerged": None}
    by_arm = {arm: {v.metric: v.model_dump() for v in scores.values if v.arm == arm} for arm in arms}
    differences: dict[str, Any] = {arm: {"frozen": {}, "full": {}} for arm in arms}
    for found in scores.differences:
        differences[found.arm][found.over][found.metric] = found.model_dump()
    summary = {
        "task": MARKUP,
        "main_metric": "average_precision",
        "seeds": [0],
        "arms": by_arm,
        "differences": differences,
        "parts": {},
        "trials": {"full": [{"learning_rate": 1e-3, "score": 0.5}, {"learning_rate": 1e-1, "score": None}]},
        "costs": dict.fromkeys(arms, cost),
        "forgetting": {},
        "notes": [MARKUP],
        "failures": [],
    }
    path = tmp_path / "page.html"
    write_page(path, summary, data=data, series=series, errors=PairErrors(data, series), method="t-sne")
    page = path.read_text(encoding="utf-8")
    reader = _Balance()
    reader.feed(page)
    assert not reader.open
    assert LONG not in page and "x" * 70 in page
    assert not re.search(r'(src|href)="(?!#)', page)
    assert answer(summary)[1] == "lora is within noise of full fine-tuning: +0.000 (+0.000 to +0.000), 100.0 % of it."
    assert len(answer(summary)) == 3


@pytest.mark.skipif(importlib.util.find_spec("umap") is not None, reason="UMAP is installed here")
def test_a_map_by_umap_is_refused_before_training_where_it_is_not_installed(
    encoder_folder: Any, tmp_path: Path
) -> None:
    write_labelled_pairs(tmp_path / "train.parquet", 60, seed=1)
    write_labelled_pairs(tmp_path / "test.parquet", 50, seed=2)
    values = values_of_config(tmp_path, encoder_folder("bert"), arms=["frozen", "linear"], seeds=[0], map="umap")
    config, runtime = ComparisonConfig.model_validate(values), exact_runtime(threads=1, use_gpu=False)
    with pytest.raises(ConfigError, match=r"umap is not installed here; pip install 'lorafleet\[umap\]'"):
        preflight_comparison(config, runtime, run_id="one", store=str(tmp_path))
