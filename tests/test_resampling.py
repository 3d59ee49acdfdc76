"""Weighted metrics against scipy and scikit-learn on repeated rows, and the intervals and tests made from them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    f1_score,
    roc_auc_score,
    silhouette_samples,
    v_measure_score,
)

from pipeline.vector_scores import pair_metrics
from pipeline.vector_scores.cluster_metrics import silhouettes, v_measure
from pipeline.vector_scores.resampling import FEWEST_GROUPS, Statistic, resample, text_groups

THRESHOLDS = np.array([0.3, 0.5])
Rival = Callable[[np.ndarray, np.ndarray, float], float]
RIVALS: dict[str, Rival] = {
    "spearman": lambda gold, found, _: stats.spearmanr(gold, found)[0],
    "pearson": lambda gold, found, _: stats.pearsonr(gold, found)[0],
    "average_precision": lambda gold, found, _: average_precision_score(gold, found),
    "auc": lambda gold, found, _: roc_auc_score(gold, found),
    "margin": lambda gold, found, _: found[gold == 1].mean() - found[gold == 0].mean(),
    "cohens_d": lambda gold, found, _: (found[gold == 1].mean() - found[gold == 0].mean()) / pooled(gold, found),
    "f1": lambda gold, found, threshold: f1_score(gold, found >= threshold, zero_division=0.0),
    "accuracy": lambda gold, found, threshold: accuracy_score(gold, found >= threshold),
}


def pooled(gold: np.ndarray, found: np.ndarray) -> float:
    """Standard deviation within a label, with the divisor that makes the variance unbiased."""
    squares = [((part - part.mean()) ** 2).sum() for part in (found[gold == 1], found[gold == 0])]
    return float(np.sqrt(sum(squares) / (len(gold) - 2)))


def similarities(num_pairs: int, *, digits: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Scores 0..1 in steps, and two series of similarities that go with them. Few digits make many ties."""
    random = np.random.default_rng(seed)
    gold = random.integers(0, 6, num_pairs) / 5
    return gold, np.round(0.5 * gold + 0.5 * random.random((2, num_pairs)), digits)


def metric_of(name: str, gold: np.ndarray, series: np.ndarray) -> Statistic:
    more = {"thresholds": THRESHOLDS[: len(series)]} if name in ("f1", "accuracy") else {}
    return lambda weights: getattr(pair_metrics, name)(weights, gold=gold, series=series, **more)


# --- metrics ---


@pytest.mark.parametrize("digits", [1, 8])
@pytest.mark.parametrize("name", RIVALS)
def test_a_metric_with_whole_weights_is_that_of_repeated_rows(name: str, digits: int) -> None:
    gold, series = similarities(120, digits=digits)
    if name not in ("spearman", "pearson"):
        gold = (gold > 0.5).astype(float)
    weights = np.random.default_rng(1).integers(0, 4, (120, 5)).astype(float)
    weights[:, 0] = 1
    found = metric_of(name, gold, series)(weights)
    assert found.shape == (2, 5)
    for sample in range(5):
        rows = np.repeat(np.arange(120), weights[:, sample].astype(int))
        for number in range(2):
            expected = RIVALS[name](gold[rows], series[number, rows], THRESHOLDS[number])
            assert found[number, sample] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", ["spearman", "pearson"])
def test_equal_similarities_correlate_with_nothing_and_equal_scores_define_no_correlation(name: str) -> None:
    gold, varied, flat = np.arange(5.0), np.array([[1.0, 3, 2, 5, 4]]), np.full((1, 5), 0.7)
    weights = np.ones((5, 1))
    assert metric_of(name, gold, flat)(weights)[0, 0] == 0
    assert np.isnan(metric_of(name, np.full(5, 0.2), varied)(weights)[0, 0])
    partly, without_last = np.array([[0.7, 0.7, 0.7, 0.7, 0.9]]), np.arange(250.0).reshape(5, 50) % 7 + 1
    without_last[-1] = 0
    assert (metric_of(name, gold, partly)(without_last) == 0).all()
    assert metric_of(name, gold, gold[np.newaxis])(weights)[0, 0] == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize("label", [0.0, 1.0])
@pytest.mark.parametrize("name", ["average_precision", "auc", "margin", "cohens_d"])
def test_one_label_defines_no_comparison_of_labels(name: str, label: float) -> None:
    gold = np.array([0.0, 0.0, 1.0, 1.0])
    weights = (gold == label).astype(float)[:, np.newaxis]
    assert np.isnan(metric_of(name, gold, np.array([[0.1, 0.2, 0.3, 0.4]]))(weights)[0, 0])


def test_equal_similarities_within_each_label_define_no_cohens_d() -> None:
    gold, flat = np.array([0.0, 0.0, 1.0, 1.0]), np.array([[0.1, 0.1, 0.3, 0.3]])
    assert np.isnan(metric_of("cohens_d", gold, flat)(np.ones((4, 1)))[0, 0])


def test_with_labels_spearman_is_a_rescaled_auc() -> None:
    gold, series = similarities(400, digits=8)
    gold, weights = (gold > 0.5).astype(float), np.ones((400, 1))
    share = gold.mean()
    expected = (2 * metric_of("auc", gold, series)(weights) - 1) * np.sqrt(3 * share * (1 - share))
    assert metric_of("spearman", gold, series)(weights) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("metric", ["f1", "accuracy"])
def test_the_best_threshold_is_the_best_of_all_thresholds(metric: str) -> None:
    for seed in range(8):
        gold, series = similarities(30, digits=1 + seed % 2, seed=seed)
        labels = (gold > 0.3 + 0.1 * (seed % 5)).astype(float)
        found = pair_metrics.best_threshold(labels, series[0], metric=metric)  # type: ignore[arg-type]
        assert found is not None
        candidates = [RIVALS[metric](labels, series[0], cut) for cut in (*series[0], 2.0)]
        assert found.value == pytest.approx(max(candidates), abs=1e-12)
        assert RIVALS[metric](labels, series[0], found.threshold) == pytest.approx(found.value, abs=1e-12)


def test_one_label_has_no_best_threshold() -> None:
    assert pair_metrics.best_threshold(np.ones(3), np.array([0.1, 0.2, 0.3]), metric="f1") is None


def test_v_measure_is_that_of_repeated_texts_averaged_over_the_clusterings() -> None:
    random = np.random.default_rng(0)
    labels, clusters = random.integers(0, 4, 60), random.integers(0, 3, (2, 3, 60))
    clusters[0] = (labels + clusters[0]) % 4
    times, weights = random.integers(0, 3, (3, 60)), random.integers(0, 3, (60, 4)).astype(float)
    found = v_measure(weights, labels=labels, clusters=clusters, times_drawn=times)
    for series in range(2):
        for sample in range(4):
            rows = [np.repeat(np.arange(60), drawn * weights[:, sample].astype(int)) for drawn in times]
            expected = [v_measure_score(labels[r], clusters[series, n, r]) for n, r in enumerate(rows)]
            assert found[series, sample] == pytest.approx(np.mean(expected), abs=1e-12)


def test_one_label_defines_no_v_measure_and_one_cluster_is_worth_nothing() -> None:
    weights, once = np.ones((4, 1)), np.ones((1, 4), dtype=int)
    same = np.zeros((1, 1, 4), dtype=int)
    assert np.isnan(v_measure(weights, labels=np.zeros(4, dtype=int), clusters=same, times_drawn=once)[0, 0])
    assert v_measure(weights, labels=np.array([0, 0, 1, 1]), clusters=same, times_drawn=once)[0, 0] == 0


def test_a_clustering_that_drew_none_of_the_texts_does_not_count() -> None:
    weights, labels = np.ones((4, 1)), np.array([0, 0, 1, 1])
    clusters = np.array([[[0, 0, 1, 1], [0, 1, 0, 1]]])
    found = v_measure(weights, labels=labels, clusters=clusters, times_drawn=np.array([[1, 1, 1, 1], [0, 0, 0, 0]]))
    assert found[0, 0] == pytest.approx(1)
    assert np.isnan(v_measure(weights, labels=labels, clusters=clusters, times_drawn=np.zeros((2, 4), dtype=int))).all()


def test_silhouettes_are_those_of_scikit_learn() -> None:
    random = np.random.default_rng(0)
    labels = np.concatenate([random.integers(0, 5, 80), [7]])  # 7 has one text
    vectors = (np.eye(6)[np.minimum(labels, 5)] + 0.4 * random.standard_normal((81, 6))).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    expected = silhouette_samples(vectors.astype(np.float64), labels, metric="cosine")
    assert silhouettes(vectors, labels) == pytest.approx(expected, abs=1e-6)
    assert silhouettes(vectors, labels)[-1] == 0


# --- groups and samples ---


def test_pairs_that_share_a_text_over_other_pairs_are_one_group() -> None:
    groups = text_groups([["a", "c", "x", "b", "y"], ["b", "d", "x", "c", "z"]])
    assert groups[0] == groups[1] == groups[3]
    assert len({groups[0], groups[2], groups[4]}) == 3


def test_a_sample_has_all_pairs_of_a_group_equally_often_and_as_many_groups_as_there_are() -> None:
    groups = np.array([3, 3, 5, *range(10, 30)])
    seen: list[np.ndarray] = []

    def watch(weights: np.ndarray) -> np.ndarray:
        seen.append(weights)
        return weights[:1]

    resample({"first": watch}, groups, draws=50, seed=0)
    weights = np.concatenate(seen[1:], axis=1)
    assert weights.shape == (23, 50)
    assert (weights[0] == weights[1]).all()
    assert (weights[1:].sum(axis=0) == 22).all()
    assert weights[0].std() > 0


def test_all_metrics_see_the_same_samples_and_a_seed_gives_the_same_interval_again() -> None:
    gold, series = similarities(80, digits=8)
    both = {name: metric_of(name, gold, series) for name in ("spearman", "pearson")}
    alone = resample({"pearson": both["pearson"]}, np.arange(80), draws=200, seed=3)["pearson"]
    assert (resample(both, np.arange(80), draws=200, seed=3)["pearson"].drawn == alone.drawn).all()
    assert (resample(both, np.arange(80), draws=200, seed=4)["pearson"].drawn != alone.drawn).any()


def test_the_interval_of_single_pairs_is_that_of_rows_drawn_one_by_one() -> None:
    gold, series = similarities(150, digits=8)
    random, drawn = np.random.default_rng(1), []
    for _ in range(2000):
        rows = random.integers(0, 150, 150)
        drawn.append(stats.spearmanr(gold[rows], series[0, rows])[0])
    found = resample({"spearman": metric_of("spearman", gold, series)}, np.arange(150), draws=4000, seed=0)
    estimate = found["spearman"].estimate(0)
    assert estimate.value == pytest.approx(stats.spearmanr(gold, series[0])[0], abs=1e-12)
    assert (estimate.low, estimate.high) == pytest.approx(tuple(np.quantile(drawn, (0.025, 0.975))), abs=0.012)


def test_samples_that_do_not_define_a_metric_are_left_out() -> None:
    gold = np.zeros(12)
    gold[0] = 1
    found = resample(
        {"ap": metric_of("average_precision", gold, np.linspace(1, 0, 12)[np.newaxis])},
        np.arange(12),
        draws=300,
        seed=0,
    )["ap"]
    assert 0 < np.isnan(found.drawn).sum() < 300  # samples without the only positive pair
    assert found.is_defined
    assert found.estimate(0).low is None  # all other samples agree
    assert found.gain(0, over=0).low == 0


def test_few_groups_give_no_interval_and_no_significance() -> None:
    gold, series = similarities(60, digits=8)
    groups = np.arange(60) % (FEWEST_GROUPS - 1)
    found = resample({"spearman": metric_of("spearman", gold, series)}, groups, draws=100, seed=0)["spearman"]
    assert (found.estimate(0).low, found.estimate(0).high) == (None, None)
    gain = found.gain(1, over=0)
    assert (gain.low, gain.high, gain.p_value) == (None, None, 1.0)
    assert gain.gain == pytest.approx(found.values[1] - found.values[0])


# --- laws over many data sets ---


def repeated_texts(random: np.random.Generator, *, num_texts: int, pairs_of_text: int) -> tuple[np.ndarray, np.ndarray]:
    """One value per pair, of which a large part belongs to the text that its group shares, and the groups."""
    groups = np.repeat(np.arange(num_texts), pairs_of_text)
    return random.standard_normal(num_texts)[groups] + 0.5 * random.standard_normal(len(groups)), groups


def test_the_interval_covers_the_truth_with_repeated_texts_and_that_of_single_pairs_does_not() -> None:
    random, covered, naive = np.random.default_rng(0), [], []
    for seed in range(200):
        values, groups = repeated_texts(random, num_texts=40, pairs_of_text=6)
        metric: dict[str, Statistic] = {
            "mean": lambda weights, values=values: pair_metrics.mean(weights, series=values[np.newaxis])
        }
        for found, by in ((covered, groups), (naive, np.arange(len(values)))):
            estimate = resample(metric, by, draws=300, seed=seed)["mean"].estimate(0)
            assert estimate.low is not None and estimate.high is not None
            found.append(estimate.low <= 0 <= estimate.high)
    assert np.mean(covered) > 0.89
    assert np.mean(naive) < 0.70


def test_two_equally_good_encoders_differ_significantly_about_one_time_in_twenty() -> None:
    random, p_values = np.random.default_rng(0), []
    for seed in range(300):
        shared, groups = repeated_texts(random, num_texts=60, pairs_of_text=3)
        gold = shared + random.standard_normal(len(shared))
        noise = np.stack([repeated_texts(random, num_texts=60, pairs_of_text=3)[0] for _ in range(2)])
        metric = {"spearman": metric_of("spearman", gold, shared + noise)}
        p_values.append(resample(metric, groups, draws=200, seed=seed)["spearman"].gain(1, over=0).p_value)
    assert 0.02 <= np.mean(np.array(p_values) < 0.05) <= 0.09
    assert min(p_values) > 0


def test_a_real_gain_is_significant_and_its_interval_is_narrower_than_unpaired() -> None:
    random = np.random.default_rng(0)
    gold = random.standard_normal(200)
    shared = gold + random.standard_normal(200)
    series = np.stack([shared, shared + 0.3 * gold])
    found = resample({"spearman": metric_of("spearman", gold, series)}, np.arange(200), draws=1000, seed=0)["spearman"]
    gain = found.gain(1, over=0)
    assert gain.low is not None and gain.high is not None
    assert 0 < gain.low < gain.gain < gain.high
    assert gain.p_value == pytest.approx(2 / 1001)
    ends = [found.estimate(number) for number in (0, 1)]
    assert all(end.low is not None and end.high is not None for end in ends)
    assert gain.high - gain.low < 0.5 * max(end.high - end.low for end in ends)  # type: ignore[operator]
