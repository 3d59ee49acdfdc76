"""Metrics of a classifier and their intervals, against scikit-learn and against resampling the texts one by one."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from pipeline.evaluation.metrics import METRICS, Counts, measure, metric, title_of

RIVALS = {
    "accuracy": accuracy_score,
    "macro_f1": lambda labels, predictions: f1_score(labels, predictions, average="macro", zero_division=0.0),
    "matthews": matthews_corrcoef,
}


def sample(num_classes: int, num_texts: int, *, right: float = 0.7, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    labels = random.integers(0, num_classes, num_texts)
    guesses = random.integers(0, num_classes, num_texts)
    return labels, np.where(random.random(num_texts) < right, labels, guesses)


def test_each_metric_has_a_rival() -> None:
    assert METRICS.keys() == RIVALS.keys()


@pytest.mark.parametrize("name", RIVALS)
@pytest.mark.parametrize(("num_classes", "num_texts"), [(2, 1), (2, 50), (3, 7), (77, 500), (150, 2000)])
def test_a_metric_is_what_scikit_learn_computes(name: str, num_classes: int, num_texts: int) -> None:
    for seed in range(5):
        labels, predictions = sample(num_classes, num_texts, seed=seed)
        found = measure(labels, predictions, num_classes=num_classes, draws=10, seed=0)[name]
        assert found.value == pytest.approx(RIVALS[name](labels, predictions), abs=1e-12)


@pytest.mark.parametrize(("prediction", "matthews"), [([0, 0, 0, 0], 0.0), ([0, 1, 0, 1], 1.0), ([1, 0, 1, 0], -1.0)])
def test_matthews_correlation_of_one_class_of_all_right_and_of_all_wrong(
    prediction: list[int], matthews: float
) -> None:
    labels = np.array([0, 1, 0, 1])
    found = measure(labels, np.array(prediction), num_classes=2, draws=100, seed=0)["matthews"]
    assert found.value == matthews
    assert found.low is not None and found.high is not None
    assert -1 <= found.low <= matthews <= found.high <= 1


@pytest.mark.parametrize("name", RIVALS)
def test_an_interval_is_that_of_texts_drawn_one_by_one(name: str) -> None:
    labels, predictions = sample(5, 200)
    random, drawn = np.random.default_rng(1), []
    for _ in range(2000):
        rows = random.integers(0, len(labels), len(labels))
        drawn.append(RIVALS[name](labels[rows], predictions[rows]))
    found = measure(labels, predictions, num_classes=5, draws=4000, seed=0)[name]
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(drawn, (0.025, 0.975))), abs=0.012)


def test_the_same_seed_gives_the_same_interval_and_another_seed_another() -> None:
    labels, predictions = sample(3, 100)
    one, again, other = (measure(labels, predictions, num_classes=3, draws=300, seed=seed) for seed in (0, 0, 1))
    assert one == again
    assert one["matthews"].value == other["matthews"].value
    assert one["matthews"].low != other["matthews"].low


def test_a_new_metric_is_one_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.evaluation.metrics.METRICS", METRICS.copy())

    @metric("share of the first class")
    def first(counts: Counts) -> np.ndarray:
        return counts.labels[..., 0] / counts.num_texts

    labels, predictions = sample(3, 100)
    found = measure(labels, predictions, num_classes=3, draws=100, seed=0)["first"]
    assert found.value == (labels == 0).mean()
    assert title_of("first") == "share of the first class"
    assert title_of("gone_since") == "gone since"
