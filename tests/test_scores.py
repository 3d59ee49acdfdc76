"""Laws and textbook values of pipeline/evaluation/scores.py."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import f1_score

from pipeline.data.splits import overlap
from pipeline.errors import LorafleetError
from pipeline.evaluation import calibration, scores, significance
from pipeline.evaluation.scores import score_of_draws, score_predictions
from pipeline.records import Comparison

LABELS = np.array([0, 0, 0, 1, 1, 2])
PREDICTIONS = np.array([0, 0, 1, 1, 2, 2])


def sample_labels(logits: np.ndarray, *, temperature: float, seed: int) -> np.ndarray:
    """Labels drawn from ``softmax(logits / temperature)``, by the Gumbel-max trick."""
    noise = np.random.default_rng(seed).gumbel(size=logits.shape)
    return (logits / temperature + noise).argmax(axis=1)


def planted(*, temperature: float, num_texts: int = 20_000) -> tuple[np.ndarray, np.ndarray]:
    logits = np.random.default_rng(5).normal(scale=3.0, size=(num_texts, 5))
    return logits, sample_labels(logits, temperature=temperature, seed=6)


# --- scores and their intervals ---


def test_accuracy_and_macro_f1_agree_with_a_hand_computed_example() -> None:
    score = score_predictions(LABELS, PREDICTIONS, num_classes=3, bootstrap_draws=100, seed=0)
    assert score.accuracy == pytest.approx(4 / 6)
    # F1 = 2TP / (2TP + FP + FN): 4/5, 2/4, 2/3.
    assert score.macro_f1 == pytest.approx((4 / 5 + 2 / 4 + 2 / 3) / 3)


def test_macro_f1_leaves_out_a_class_that_neither_occurs_nor_is_predicted() -> None:
    few = score_predictions(LABELS, PREDICTIONS, num_classes=3, bootstrap_draws=100, seed=0)
    many = score_predictions(LABELS, PREDICTIONS, num_classes=77, bootstrap_draws=100, seed=0)
    assert many == few


def test_macro_f1_counts_a_class_that_is_only_predicted_as_zero() -> None:
    score = score_predictions(np.array([0, 0]), np.array([0, 1]), num_classes=2, bootstrap_draws=100, seed=0)
    assert score.macro_f1 == pytest.approx((2 / 3 + 0) / 2)


def test_renaming_the_classes_changes_no_score() -> None:
    new_name = np.array([2, 0, 1])
    renamed = score_predictions(new_name[LABELS], new_name[PREDICTIONS], num_classes=3, bootstrap_draws=200, seed=1)
    score = score_predictions(LABELS, PREDICTIONS, num_classes=3, bootstrap_draws=200, seed=1)
    assert renamed.macro_f1 == pytest.approx(score.macro_f1)
    assert (renamed.accuracy, renamed.low, renamed.high) == (score.accuracy, score.low, score.high)


def test_average_precision_is_that_of_class_one() -> None:
    labels, certainty = np.array([1, 0, 1, 0]), np.array([0.9, 0.8, 0.7, 0.1])
    score = score_predictions(labels, labels, num_classes=2, positive_scores=certainty, bootstrap_draws=100, seed=0)
    # Precision where recall rises: 1/1 at the first text, 2/3 at the third.
    assert score.average_precision == pytest.approx((1 + 2 / 3) / 2)


@pytest.mark.parametrize(
    ("labels", "num_classes", "certainty"),
    [
        ([0, 1, 1], 3, [0.1, 0.5, 0.9]),
        ([0, 1, 1], 2, None),
        ([1, 1, 1], 2, [0.1, 0.5, 0.9]),
        ([0, 0, 0], 2, [0.1, 0.5, 0.9]),
    ],
    ids=["three classes", "no scores", "only class 1", "only class 0"],
)
def test_average_precision_is_none_where_it_means_nothing(
    labels: list[int], num_classes: int, certainty: list[float] | None
) -> None:
    positive_scores = None if certainty is None else np.array(certainty)
    ids = np.array(labels)
    score = score_predictions(
        ids, ids, num_classes=num_classes, positive_scores=positive_scores, bootstrap_draws=100, seed=0
    )
    assert score.average_precision is None


def test_bootstrap_interval_holds_the_true_accuracy_about_95_times_in_100() -> None:
    rng = np.random.default_rng(3)
    labels = np.zeros(400, dtype=np.int64)
    hits = 0
    for seed in range(300):
        predictions = (rng.random(400) > 0.8).astype(np.int64)
        score = score_predictions(labels, predictions, num_classes=2, bootstrap_draws=500, seed=seed)
        assert score.low <= score.accuracy <= score.high
        hits += score.low <= 0.8 <= score.high
    assert 0.91 <= hits / 300 <= 0.985


def test_bootstrap_interval_agrees_with_resampling_the_texts_one_by_one() -> None:
    right = np.arange(200) < 150
    score = score_predictions(np.ones(200, dtype=int), right.astype(int), num_classes=2, bootstrap_draws=20_000, seed=4)
    rng = np.random.default_rng(9)
    resampled = [right[rng.integers(200, size=200)].mean() for _ in range(20_000)]
    low, high = np.quantile(resampled, [0.025, 0.975])
    assert (score.low, score.high) == (pytest.approx(low, abs=0.0051), pytest.approx(high, abs=0.0051))


def test_the_same_seed_gives_the_same_interval_and_another_seed_another() -> None:
    labels, predictions = np.zeros(1000, dtype=int), (np.arange(1000) % 3 == 0).astype(int)

    def interval(seed: int) -> tuple[float, float]:
        score = score_predictions(labels, predictions, num_classes=2, bootstrap_draws=100, seed=seed)
        return score.low, score.high

    assert interval(7) == interval(7)
    assert len({interval(seed) for seed in range(5)}) > 1


@pytest.mark.parametrize("num_texts", [1, 8, 1000])
def test_an_accuracy_of_one_or_zero_does_not_claim_certainty(num_texts: int) -> None:
    labels = np.zeros(num_texts, dtype=int)
    perfect = score_predictions(labels, labels, num_classes=2, bootstrap_draws=100, seed=0)
    hopeless = score_predictions(labels, labels + 1, num_classes=2, bootstrap_draws=100, seed=0)
    # Clopper and Pearson 1934: at n of n right the lower end solves p^n = 0.025.
    assert (perfect.low, perfect.high) == (pytest.approx(0.025 ** (1 / num_texts)), 1.0)
    assert (hopeless.low, hopeless.high) == (0.0, pytest.approx(1 - 0.025 ** (1 / num_texts)))


def test_draws_are_averaged_with_a_t_interval() -> None:
    score = score_of_draws([0.5, 0.6, 0.7], [0.4, 0.5, 0.6], [0.8, 0.9, 0.7])
    # Mean 0.6, standard error 0.1 / sqrt(3), t(0.975, 2 degrees of freedom) = 4.303.
    assert (score.accuracy, score.macro_f1, score.average_precision) == pytest.approx((0.6, 0.5, 0.8))
    assert (score.low, score.high) == pytest.approx(
        (0.6 - 4.3027 * 0.1 / math.sqrt(3), 0.6 + 4.3027 * 0.1 / math.sqrt(3)), abs=1e-5
    )


def test_interval_of_draws_agrees_with_scipy() -> None:
    draws = np.random.default_rng(0).uniform(0.4, 0.5, size=10)
    score = score_of_draws(list(draws), list(draws), None)
    assert (score.low, score.high) == pytest.approx(stats.t.interval(0.95, 9, loc=draws.mean(), scale=stats.sem(draws)))
    assert score.average_precision is None


def test_interval_of_draws_stays_within_zero_and_one() -> None:
    assert score_of_draws([0.9, 1.0], [1.0, 1.0], None).high == 1.0
    assert score_of_draws([0.0, 0.1], [0.0, 0.0], None).low == 0.0


def test_equal_draws_have_an_interval_of_one_point_and_a_single_draw_has_none() -> None:
    equal, single = score_of_draws([0.75] * 4, [0.75] * 4, None), score_of_draws([0.75], [0.75], None)
    assert (equal.low, equal.high) == (0.75, 0.75)
    assert (single.low, single.high) == (0.0, 1.0)


def test_excluded_texts_do_not_count() -> None:
    nobody, everybody = np.zeros(6, dtype=bool), np.ones(6, dtype=bool)
    assert scores.accuracy_without(LABELS, PREDICTIONS, nobody) == pytest.approx(4 / 6)
    assert scores.accuracy_without(LABELS, PREDICTIONS, LABELS == 0) == pytest.approx(2 / 3)
    assert scores.accuracy_without(LABELS, PREDICTIONS, everybody) is None


# --- tests of several predictions ---


def test_mcnemar_counts_only_texts_that_one_of_the_two_gets_right() -> None:
    labels = np.zeros(20, dtype=int)
    first, second = np.zeros(20, dtype=int), np.zeros(20, dtype=int)
    second[:8] = 1  # only the first is right
    first[8:10] = 1  # only the second is right
    first[10:13] = second[10:13] = 2  # both are wrong
    comparison = significance.mcnemar(labels, first, second)
    assert (comparison.only_head, comparison.only_probe) == (8, 2)
    # Two tails of ten fair coins: 2 * (1 + 10 + 45) / 1024.
    assert comparison.p_value == pytest.approx(112 / 1024)


def test_mcnemar_does_not_mind_which_prediction_comes_first() -> None:
    rng = np.random.default_rng(1)
    labels, first, second = (rng.integers(3, size=300) for _ in range(3))
    forward, backward = significance.mcnemar(labels, first, second), significance.mcnemar(labels, second, first)
    assert forward.p_value == pytest.approx(backward.p_value)
    assert (forward.only_head, forward.only_probe) == (backward.only_probe, backward.only_head)


def test_mcnemar_of_equal_predictions_or_equal_merit_is_one() -> None:
    assert significance.mcnemar(LABELS, PREDICTIONS, PREDICTIONS).p_value == 1.0
    for half in range(1, 60):
        labels = np.zeros(2 * half, dtype=int)
        first = (np.arange(2 * half) < half).astype(int)
        assert significance.mcnemar(labels, first, 1 - first).p_value == pytest.approx(1.0)


def macro_f1_of(labels: np.ndarray, predictions: np.ndarray) -> float:
    return float(f1_score(labels, predictions, average="macro", zero_division=0.0))


def by_macro_f1(labels: np.ndarray, first: np.ndarray, second: np.ndarray, *, num_classes: int = 4) -> Comparison:
    return significance.compare_paired(labels, first, second, num_classes=num_classes, main_metric="macro_f1", seed=0)


def test_the_test_of_macro_f1_is_the_share_of_all_swaps_that_differ_as_much() -> None:
    labels = np.array([0, 0, 0, 0, 1, 1, 1, 2, 2, 0, 0])
    first = np.array([0, 0, 1, 0, 1, 1, 1, 2, 2, 0, 1])
    second = np.array([0, 0, 0, 0, 0, 1, 0, 0, 2, 1, 1])
    found, differences = by_macro_f1(labels, first, second), []
    for swaps in itertools.product([False, True], repeat=len(labels)):
        one, other = np.where(swaps, second, first), np.where(swaps, first, second)
        differences.append(macro_f1_of(labels, one) - macro_f1_of(labels, other))
    assert found.gain == pytest.approx(differences[0])
    expected = float(np.mean(np.abs(differences) >= abs(differences[0]) - 1e-9))
    assert found.main_p_value == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / 2000))


def test_the_test_of_macro_f1_turns_with_the_order_and_sees_no_difference_between_equals() -> None:
    rng = np.random.default_rng(1)
    labels, first, second = (rng.integers(4, size=300) for _ in range(3))
    forward, backward = by_macro_f1(labels, first, second), by_macro_f1(labels, second, first)
    assert forward.gain == pytest.approx(-backward.gain)
    assert forward.main_p_value == backward.main_p_value
    assert (by_macro_f1(labels, first, first).gain, by_macro_f1(labels, first, first).main_p_value) == (0.0, 1.0)


def test_a_true_difference_is_found_and_none_is_found_where_there_is_none_in_19_of_20_tests() -> None:
    rng, false_alarms = np.random.default_rng(2), 0

    def predictions(labels: np.ndarray, share_right: float) -> np.ndarray:
        return np.where(rng.random(len(labels)) < share_right, labels, rng.integers(4, size=len(labels)))

    for _ in range(200):
        labels = rng.choice(4, size=200, p=[0.66, 0.2, 0.1, 0.04])
        false_alarms += by_macro_f1(labels, predictions(labels, 0.7), predictions(labels, 0.7)).main_p_value < 0.05
    assert false_alarms / 200 < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 200)
    labels = rng.choice(4, size=1000, p=[0.66, 0.2, 0.1, 0.04])
    assert by_macro_f1(labels, predictions(labels, 0.8), predictions(labels, 0.6)).main_p_value == pytest.approx(
        1 / 2001
    )


def test_on_an_unbalanced_set_accuracy_and_macro_f1_can_judge_in_opposite_ways() -> None:
    """The first always answers the frequent class. The second finds the rare ones, and loses some frequent ones."""
    labels = np.repeat([0, 1, 2, 3], [660, 140, 120, 80])
    lazy = np.zeros(1000, dtype=int)
    keen = labels.copy()
    keen[:400] = 1
    by_accuracy = significance.compare_paired(labels, keen, lazy, num_classes=4, main_metric="accuracy", seed=0)
    assert by_accuracy == significance.mcnemar(labels, keen, lazy)
    assert by_accuracy.gain < 0
    assert by_accuracy.main_p_value == by_accuracy.p_value < 0.05
    found = by_macro_f1(labels, keen, lazy)
    assert found.gain > 0.3
    assert found.main_p_value < 0.05
    assert found.p_value == by_accuracy.p_value, "what it means does not change with the main metric"


def test_holm_agrees_with_a_hand_computed_example() -> None:
    # Sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1 = 0.02, 0.03, 0.06, 0.04; the last may not fall below 0.06.
    assert significance.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_holm_never_lowers_a_p_value_and_keeps_their_order() -> None:
    rng = np.random.default_rng(2)
    for _ in range(50):
        p_values = list(rng.random(8) ** 3)
        corrected = significance.holm(p_values)
        pairs = sorted((before, after) for before, after in zip(p_values, corrected, strict=True) if after is not None)
        assert len(pairs) == 8
        assert all(before <= after <= 1 for before, after in pairs)
        assert all(a[1] <= b[1] for a, b in itertools.pairwise(pairs))


def test_holm_does_not_count_what_was_not_tested() -> None:
    assert significance.holm([0.02, None, 0.5, None]) == [pytest.approx(0.04), None, pytest.approx(0.5), None]
    assert significance.holm([None, None]) == [None, None]
    assert significance.holm([]) == []
    assert significance.holm([0.3]) == [0.3]


def test_holm_gives_equal_p_values_equal_corrections_and_stops_at_one() -> None:
    assert significance.holm([0.2, 0.2, 0.2]) == pytest.approx([0.6, 0.6, 0.6])
    assert significance.holm([0.6, 0.9]) == [1.0, 1.0]


# --- calibration ---


def test_softmax_of_huge_logits_is_finite_and_ignores_a_common_shift() -> None:
    logits = np.array([[1e4, 1e4 - math.log(3)], [-1e4, -1e4]])
    assert calibration.softmax(logits) == pytest.approx(np.array([[0.75, 0.25], [0.5, 0.5]]))
    assert calibration.softmax(logits + 123.0) == pytest.approx(calibration.softmax(logits))


def test_a_diverged_head_is_reported_with_what_to_do() -> None:
    logits = np.array([[0.0, 1.0], [np.nan, 1.0], [0.0, np.inf]])
    with pytest.raises(LorafleetError, match=r"2 of 3 texts .* lower train\.learning_rate"):
        calibration.calibrate(None, None, logits, np.array([0, 1, 1]))


def test_calibration_error_agrees_with_a_hand_computed_example() -> None:
    probabilities = np.array([[0.9, 0.1], [0.92, 0.08], [0.4, 0.6], [0.45, 0.55]])
    labels = np.array([0, 1, 1, 1])
    # With ten bins: (0.8, 0.9] one text, right; (0.9, 1] one text, wrong; (0.5, 0.6] two texts, right.
    assert calibration.calibration_error(probabilities, labels, bins=10) == pytest.approx((0.1 + 0.92 + 2 * 0.425) / 4)
    # With a single bin it is the gap of the two means.
    assert calibration.calibration_error(probabilities, labels, bins=1) == pytest.approx(
        abs(0.75 - (0.9 + 0.92 + 0.6 + 0.55) / 4)
    )


def test_certainty_has_no_error_when_right_and_the_whole_error_when_wrong() -> None:
    certain = np.eye(3)
    assert calibration.calibration_error(certain, np.array([0, 1, 2])) == 0.0
    assert calibration.calibration_error(certain, np.array([1, 2, 0])) == 1.0


def test_probabilities_that_made_the_labels_are_calibrated() -> None:
    logits, labels = planted(temperature=1.0)
    assert calibration.calibration_error(calibration.softmax(logits), labels) < 0.01
    assert calibration.calibration_error(calibration.softmax(3 * logits), labels) > 0.05


def test_reliability_bins_hold_every_text_once_and_are_never_empty() -> None:
    logits, labels = planted(temperature=1.0, num_texts=1000)
    probabilities = calibration.softmax(logits)
    bins = calibration.reliability(probabilities, labels)
    assert all(b.num_texts > 0 for b in bins)
    assert sum(b.num_texts for b in bins) == 1000
    assert sum(b.num_texts * b.accuracy for b in bins) / 1000 == pytest.approx(
        (probabilities.argmax(axis=1) == labels).mean()
    )
    assert sum(b.num_texts * b.confidence for b in bins) / 1000 == pytest.approx(probabilities.max(axis=1).mean())
    assert [b.confidence for b in bins] == sorted(b.confidence for b in bins)
    # No text of five classes is less confident than 0.2 = 3/15.
    assert len(bins) <= 12


def test_a_confidence_on_an_edge_belongs_to_the_bin_below() -> None:
    bins = calibration.reliability(np.array([[0.5, 0.5], [0.51, 0.49], [1.0, 0.0]]), np.array([0, 0, 0]), bins=2)
    assert [b.num_texts for b in bins] == [1, 2]


def test_a_float32_probability_a_rounding_error_above_one_counts_as_one() -> None:
    probabilities = np.array([[1.0000001, 0.0]], dtype=np.float32)
    assert probabilities.max() > 1
    assert [b.confidence for b in calibration.reliability(probabilities, np.array([0]))] == [1.0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_temperature_recovers_a_planted_value(temperature: float) -> None:
    logits, labels = planted(temperature=temperature)
    assert calibration.fit_temperature(logits, labels) == pytest.approx(temperature, rel=0.05)


def test_temperature_grows_with_the_logits() -> None:
    logits, labels = planted(temperature=1.0, num_texts=500)
    assert calibration.fit_temperature(4 * logits, labels) == pytest.approx(
        4 * calibration.fit_temperature(logits, labels), rel=1e-3
    )


def test_at_the_fitted_temperature_the_expected_logit_is_the_true_one() -> None:
    # The derivative of the loss by 1/temperature is the difference of these two means.
    logits, labels = planted(temperature=1.7, num_texts=500)
    expected = (calibration.softmax(logits / calibration.fit_temperature(logits, labels)) * logits).sum(axis=1).mean()
    assert expected == pytest.approx(logits[np.arange(500), labels].mean(), abs=1e-3)


def test_temperature_stays_in_its_range_and_is_one_where_nothing_is_wrong() -> None:
    always_wrong = np.array([[9.0, 0.0], [0.0, 9.0]])
    assert calibration.fit_temperature(always_wrong, np.array([1, 0])) == pytest.approx(20.0, rel=1e-3)
    assert calibration.fit_temperature(always_wrong, np.array([0, 1])) == 1.0


def test_coverage_falls_with_the_threshold_and_is_none_where_no_text_is_left() -> None:
    probabilities = np.array([[0.5, 0.5], [0.65, 0.35], [0.2, 0.8], [0.04, 0.96]])
    rows = calibration.coverage_table(probabilities, np.array([1, 0, 1, 1]))
    assert [row.threshold for row in rows] == [0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.975, 0.99]
    assert [row.num_texts for row in rows] == [4, 4, 4, 4, 3, 2, 2, 1, 1, 1, 0, 0]
    assert [row.coverage for row in rows] == [1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.5, 0.25, 0.25, 0.25, 0.0, 0.0]
    assert [row.accuracy for row in rows] == [0.75, 0.75, 0.75, 0.75, *[1.0] * 6, None, None]


def test_a_lower_end_is_what_the_binomial_test_does_not_refute_at_its_share_of_five_per_cent() -> None:
    logits, labels = planted(temperature=1.5, num_texts=900)
    rows = calibration.coverage_table(calibration.softmax(logits), labels)
    for row in rows:
        if not row.num_texts:
            assert row.low == 0
            continue
        assert row.accuracy is not None and row.low is not None
        right = round(row.accuracy * row.num_texts)
        refuted = stats.binomtest(right, row.num_texts, row.low, alternative="greater").pvalue
        assert refuted == pytest.approx(0.05 / len(rows), rel=1e-6)


def test_five_right_texts_support_no_high_accuracy_and_wrong_ones_none() -> None:
    probabilities = np.tile([0.999, 0.001], (5, 1))
    for labels, low in ((np.zeros(5, dtype=int), (0.05 / 12) ** (1 / 5)), (np.ones(5, dtype=int), 0.0)):
        assert calibration.coverage_table(probabilities, labels)[-1].low == pytest.approx(low)


def test_all_lower_ends_of_a_table_hold_together_in_19_of_20_tables() -> None:
    random, tables, broken, lowest = np.random.default_rng(0), 400, 0, 1.0

    def chance(confidence: Any) -> Any:
        """Probability of a correct label, for an overconfident head."""
        return confidence**1.5

    many = random.uniform(0.5, 1.0, size=1_000_000)
    true = [float(chance(many[many >= threshold]).mean()) for threshold in calibration.COVERAGE_THRESHOLDS]
    for _ in range(tables):
        confidence = random.uniform(0.5, 1.0, size=600)
        labels = np.where(random.random(600) < chance(confidence), 0, 1)
        rows = calibration.coverage_table(np.stack([confidence, 1 - confidence], axis=1), labels)
        broken += any((row.low or 0) > accuracy for row, accuracy in zip(rows, true, strict=True))
        lowest = min(lowest, rows[0].low or 0)
    assert broken / tables < 0.05
    assert lowest > true[0] - 0.15, "and they are not so low that they say nothing"


def test_calibration_repairs_an_overconfident_head() -> None:
    logits, labels = planted(temperature=3.0, num_texts=8000)
    result = calibration.calibrate(logits[:4000], labels[:4000], logits[4000:], labels[4000:])
    assert result.fitted_on == "validation"
    assert result.temperature == pytest.approx(3.0, rel=0.1)
    assert result.error_before > 0.1
    assert result.error_after < 0.03
    calibrated = calibration.softmax(logits / result.temperature)
    assert result.coverage == calibration.coverage_table(calibrated[:4000], labels[:4000])
    assert result.reliability == pytest.approx(calibration.reliability(calibrated[4000:], labels[4000:]))
    assert sum(b.num_texts for b in result.reliability) == 4000


def test_without_validation_the_temperature_is_one_and_coverage_is_that_of_test() -> None:
    logits, labels = planted(temperature=3.0, num_texts=300)
    result = calibration.calibrate(None, None, logits, labels)
    assert (result.temperature, result.fitted_on) == (1.0, "none")
    assert result.error_before == result.error_after
    assert result.coverage == calibration.coverage_table(calibration.softmax(logits), labels)


# --- confusions and overlap ---


def test_confusions_are_ranked_by_frequency_then_class() -> None:
    labels = np.array([0, 0, 0, 1, 1, 2, 2, 2, 2])
    predictions = np.array([0, 1, 2, 0, 0, 2, 1, 1, 0])
    found = [
        (c.label, c.predicted, c.num_texts, c.num_of_label)
        for c in scores.confusions(labels, predictions, ("a", "b", "c"))
    ]
    assert found == [("b", "a", 2, 2), ("c", "b", 2, 4), ("a", "b", 1, 3), ("a", "c", 1, 3), ("c", "a", 1, 4)]


def test_confusions_do_not_depend_on_the_order_of_the_texts_and_are_cut() -> None:
    rng = np.random.default_rng(0)
    labels, predictions, order = rng.integers(6, size=200), rng.integers(6, size=200), rng.permutation(200)
    names = tuple("abcdef")
    found = scores.confusions(labels, predictions, names)
    assert found == scores.confusions(labels[order], predictions[order], names)
    assert len(found) == 10
    assert found[:3] == scores.confusions(labels, predictions, names, most=3)


def test_nothing_is_confused_where_everything_is_right() -> None:
    assert scores.confusions(LABELS, LABELS, ("a", "b", "c")) == ()


def test_overlap_is_equality_of_the_whole_text() -> None:
    found = overlap(["good film", "bad film"], ["bad film", "Bad film", "bad film ", "film", "good film"])
    assert found.dtype == np.bool_
    assert found.tolist() == [True, False, False, False, True]
    assert overlap(["a"], []).shape == (0,)
