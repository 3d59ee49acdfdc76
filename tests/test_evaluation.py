"""Every column of the score table against a few lines of scikit-learn or mteb itself, and against what is published."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mteb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import CPU_FLOAT32, give_effect, toy_texts
from commands import write_task
from mteb.models import ModelMeta
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, f1_score

from pipeline.adapter.adapter import Adapter
from pipeline.adapter.files import load_adapter, save_adapter
from pipeline.config import (
    ALL_COLUMNS,
    AdapterConfig,
    DataConfig,
    EncoderConfig,
    EvaluateConfig,
    MtebTaskConfig,
    TrainConfig,
)
from pipeline.data.catalogue import plan_task
from pipeline.data.dataset import TaskData, load_data
from pipeline.encoder.encoder import Encoder, FloatArray
from pipeline.encoder.files import find_encoder
from pipeline.encoder.tokeniser import Tokens
from pipeline.evaluation.classification import AdapterEvaluation, Baselines, RowFacts, evaluate_adapter, evaluate_frozen
from pipeline.evaluation.few_shot import few_shot
from pipeline.evaluation.probe import _hold_out
from pipeline.evaluation.vectors import TextVectors, normalize
from pipeline.objectives.batches import LabelledTokens
from pipeline.objectives.objective import Classification
from pipeline.records import Column, ScoreRow, SelectedOn
from pipeline.store.run_folder import TaskFolder
from pipeline.training.train import Training, train_adapter

Folders = Callable[[str], Path]
MIRROR = Path(__file__).parents[2] / "shared" / "data" / "mteb"
needs_mirror = pytest.mark.skipif(not MIRROR.is_dir(), reason=f"no copies of the MTEB data sets in {MIRROR}")
PUBLISHED = {
    "AmazonCounterfactualClassification": 0.636418,
    "Banking77Classification": 0.800422,
    "MassiveIntentClassification": 0.669368,
    "MassiveScenarioClassification": 0.738097,
    "TweetSentimentExtractionClassification": 0.540436,
}
"""all-MiniLM-L6-v2 in embeddings-benchmark/results, main score on test (English subset)."""
SHA = "a" * 64


class WatchedEncoder(Encoder):
    """A real encoder that remembers the token ids of every text it embedded."""

    def embed(self, tokens: Tokens) -> FloatArray:
        ends = zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True)
        self.seen = [*getattr(self, "seen", []), *(tokens.ids[start:end].tobytes() for start, end in ends)]
        return super().embed(tokens)


class PlainEncoder:
    """The simplest encoder that mteb accepts. It keeps no text."""

    mteb_model_meta = ModelMeta.create_empty({"name": "plain/encoder", "revision": "1"})

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder

    def encode(self, inputs: Any, **_: Any) -> FloatArray:
        vectors = self.encoder.embed(self.encoder.tokenise([text for batch in inputs for text in batch["text"]]))
        return normalize(vectors) if self.encoder.normalize else vectors

    def similarity(self, one: Any, other: Any) -> Any:
        raise NotImplementedError

    similarity_pairwise = similarity


def load(folder: Path, *, num_classes: int = 3, **train: Any) -> TaskData:
    entry = write_task(folder, "Topics", num_classes=num_classes)
    task = plan_task(MtebTaskConfig(**entry), data=DataConfig(), default_epochs=2)
    return load_data(task, config=TrainConfig(**train), offline=True)


def watched(folder: Path) -> WatchedEncoder:
    config = EncoderConfig(name=str(folder), max_tokens=24)
    return WatchedEncoder(find_encoder(config, offline=True), config, CPU_FLOAT32)


def facts_of(data: TaskData, encoder: Encoder) -> RowFacts:
    return RowFacts("run", data, encoder, num_truncated=0, seed=0)


def frozen(data: TaskData, encoder: Encoder, *columns: Column) -> Baselines:
    config = EvaluateConfig(columns=columns or ALL_COLUMNS, bootstrap_draws=100)
    return evaluate_frozen(facts_of(data, encoder), config, tokens=encoder.tokenise(data.train_texts))


def adapted(data: TaskData, training: Training, baselines: Baselines, *columns: Column) -> AdapterEvaluation:
    config = EvaluateConfig(columns=columns or ALL_COLUMNS, bootstrap_draws=100)
    return evaluate_adapter(
        facts_of(data, training.adapter.encoder), config, training=training, adapter_sha256=SHA, baselines=baselines
    )


def as_trained(adapter: Adapter, *, selected_on: SelectedOn = "validation", learnt_selection: bool = False) -> Training:
    return Training(adapter, (), 1, selected_on, False, None, learnt_selection)


def by_column(rows: tuple[ScoreRow, ...]) -> dict[str, ScoreRow]:
    return {row.column: row for row in rows}


@pytest.fixture
def data(tmp_path: Path) -> TaskData:
    return load(tmp_path)


# --- the frozen encoder ---


def test_majority_is_the_share_of_trains_most_frequent_class(bert: Encoder, tmp_path: Path) -> None:
    data = load(tmp_path, num_classes=2)
    row = by_column(frozen(data, bert, "majority", "head").rows)["majority"]
    most = int(np.bincount(data.train_labels).argmax())
    assert row.accuracy == (data.test_labels == most).mean()
    assert row.macro_f1 == f1_score(data.test_labels, np.full(60, most), average="macro")
    assert row.average_precision is None


@pytest.mark.parametrize("num_classes", [2, 3])
def test_the_full_data_probe_is_scikit_learns_logistic_regression_with_c_chosen_on_validation(
    num_classes: int, bert: Encoder, tmp_path: Path
) -> None:
    data = load(tmp_path, num_classes=num_classes)
    vectors = [bert.embed(bert.tokenise(texts)) for texts in (data.train_texts, data.validation_texts, data.test_texts)]
    fits = {
        c: LogisticRegression(C=c, max_iter=5000).fit(vectors[0], data.train_labels) for c in EvaluateConfig().probe_c
    }
    best = max(fits, key=lambda c: (fits[c].score(vectors[1], data.validation_labels), -c))
    found = frozen(data, bert, "frozen_full_data", "head")
    row = by_column(found.rows)["frozen_full_data"]
    predictions = fits[best].predict(vectors[2])
    assert found.probe_c == best
    assert row.accuracy == (predictions == data.test_labels).mean()
    assert row.macro_f1 == pytest.approx(f1_score(data.test_labels, predictions, average="macro"))
    if num_classes == 2:
        certainty = fits[best].predict_proba(vectors[2])[:, 1]
        assert row.average_precision == pytest.approx(average_precision_score(data.test_labels, certainty), abs=0.01)
    else:
        assert row.average_precision is None


def test_the_head_starts_as_the_probe(bert: Encoder, data: TaskData) -> None:
    baselines = frozen(data, bert, "frozen_full_data", "head")
    start = baselines.head_start
    logits = bert.embed(bert.tokenise(data.test_texts)) @ start.weight.T + start.bias
    assert (logits.argmax(axis=1) == baselines.probe_predictions).all()


def test_few_shot_is_mtebs_own_score_of_the_encoder(bert: Encoder, data: TaskData) -> None:
    (result,) = mteb.evaluate(
        PlainEncoder(bert), data.mteb_task, cache=None, co2_tracker=False, show_progress_bar=False
    ).task_results
    row = by_column(frozen(data, bert, "frozen_few_shot", "head").rows)["frozen_few_shot"]
    (expected,) = result.scores["test"]
    assert row.accuracy == pytest.approx(expected["accuracy"], abs=1e-9)
    assert row.macro_f1 == pytest.approx(expected["f1"], abs=1e-9)


# --- the adapted encoder ---


def test_an_untrained_adapter_scores_as_the_frozen_encoder(bert: Encoder, data: TaskData) -> None:
    before = frozen(data, bert)
    after = adapted(data, as_trained(Adapter(bert, AdapterConfig(), data.label_names)), before)
    few_shot_before, few_shot_after = (
        by_column(before.rows)["frozen_few_shot"],
        by_column(after.rows)["adapted_few_shot"],
    )
    same = ("accuracy", "macro_f1", "low", "high")
    assert [getattr(few_shot_after, name) for name in same] == [getattr(few_shot_before, name) for name in same]


def test_the_heads_score_is_that_of_the_adapter_loaded_again(
    encoder_folder: Folders, bert: Encoder, data: TaskData, tmp_path: Path
) -> None:
    baselines = frozen(data, bert, "frozen_full_data", "head")
    train, validation = (
        LabelledTokens(bert.tokenise(texts), labels)
        for texts, labels in ((data.train_texts, data.train_labels), (data.validation_texts, data.validation_labels))
    )
    config = TrainConfig(learning_rate=0.01)
    objective = Classification(
        train, validation, label_names=data.label_names, config=config, head_start=baselines.head_start
    )
    training = train_adapter(objective, bert, adapter_config=AdapterConfig(), train_config=config, max_epochs=2)
    found = adapted(data, training, baselines, "frozen_full_data", "head")
    row = by_column(found.rows)["head"]
    save_adapter(training.adapter, TaskFolder(tmp_path / "saved"), meta={})
    fresh = watched(encoder_folder("bert"))
    loaded = load_adapter(TaskFolder(tmp_path / "saved"), fresh)
    predictions = loaded.logits_of_vectors(fresh.embed(fresh.tokenise(data.test_texts))).argmax(axis=1)
    right, probe_right = predictions == data.test_labels, baselines.probe_predictions == data.test_labels
    assert row.accuracy == right.mean()
    assert row.macro_f1 == f1_score(data.test_labels, predictions, average="macro")
    assert found.comparison is not None
    assert (found.comparison.only_head, found.comparison.only_probe) == (
        (right & ~probe_right).sum(),
        (probe_right & ~right).sum(),
    )
    assert (row.p_value, row.adapter_sha256, row.selected_on) == (found.comparison.p_value, SHA, "validation")


def test_each_text_is_embedded_once_per_state_of_the_encoder(encoder_folder: Folders, data: TaskData) -> None:
    encoder = watched(encoder_folder("bert"))
    every = {
        encoder.tokenise([text]).ids.tobytes() for text in (*data.train_texts, *data.validation_texts, *data.test_texts)
    }
    baselines = frozen(data, encoder)
    assert len(encoder.seen) == len(set(encoder.seen))
    assert set(encoder.seen) == every
    training = as_trained(give_effect(Adapter(encoder, AdapterConfig(), data.label_names)))
    encoder.seen = []
    adapted(data, training, baselines)
    assert len(encoder.seen) == len(set(encoder.seen))
    assert set(encoder.seen) <= every


def test_a_refit_leaves_nothing_to_fit_a_temperature_on(bert: Encoder, data: TaskData) -> None:
    baselines = frozen(data, bert, "head")
    adapter = give_effect(Adapter(bert, AdapterConfig(), data.label_names))
    assert adapted(data, as_trained(adapter), baselines, "head").calibration.fitted_on == "validation"
    refitted = adapted(data, as_trained(adapter, learnt_selection=True), baselines, "head").calibration
    assert (refitted.fitted_on, refitted.temperature, refitted.error_before) == ("none", 1.0, refitted.error_after)


def test_selection_on_test_is_marked_on_every_trained_row_and_on_no_other(bert: Encoder, tmp_path: Path) -> None:
    data = load(tmp_path, early_stopping_split="test")
    baselines = frozen(data, bert)
    found = adapted(
        data, as_trained(give_effect(Adapter(bert, AdapterConfig(), data.label_names)), selected_on="test"), baselines
    )
    assert {row.column: row.selected_on for row in found.rows} == {"head": "test", "adapted_few_shot": "test"}
    assert {row.selected_on for row in baselines.rows} == {None}
    assert found.calibration.fitted_on == "none"


def test_only_the_columns_that_are_asked_for_are_there(bert: Encoder, data: TaskData) -> None:
    baselines = frozen(data, bert, "majority", "head")
    found = adapted(
        data, as_trained(give_effect(Adapter(bert, AdapterConfig(), data.label_names))), baselines, "majority", "head"
    )
    assert [row.column for row in (*baselines.rows, *found.rows)] == ["majority", "head"]
    assert found.comparison is None


def test_accuracy_without_overlap_leaves_out_the_texts_of_train(bert: Encoder, tmp_path: Path) -> None:
    entry = write_task(tmp_path, "Topics")
    texts, labels = toy_texts(200)
    both = write_task(tmp_path / "both", "Topics")
    test = pq.read_table(entry["test"])
    topics = ["sea", "kitchen", "garden"]
    known = pa.table({"text": texts[:20], "label": [topics[label] for label in labels[:20]]})
    pq.write_table(pa.concat_tables([test, known]), both["test"])
    task = plan_task(MtebTaskConfig(**both), data=DataConfig(), default_epochs=2)
    data = load_data(task, config=TrainConfig(), offline=True)
    rows = by_column(frozen(data, bert, "majority", "frozen_full_data", "frozen_few_shot", "head").rows)
    most = int(np.bincount(data.train_labels).argmax())
    assert {row.num_overlap for row in rows.values()} == {int(data.test_in_train.sum())}
    assert data.num_overlap >= 20
    assert rows["majority"].accuracy_without_overlap == (data.test_labels[~data.test_in_train] == most).mean()
    assert rows["frozen_few_shot"].accuracy_without_overlap is None


# --- what is published ---


def frozen_few_shot(name: str) -> float:
    config = EncoderConfig(max_tokens=256)
    encoder = Encoder(find_encoder(config, offline=True), config, CPU_FLOAT32)
    task = plan_task(MtebTaskConfig(name=name), data=DataConfig(mirror=str(MIRROR)), default_epochs=1)
    data = load_data(task, config=TrainConfig(), offline=True)
    return few_shot(data.mteb_task, TextVectors(encoder))[0].accuracy


@needs_mirror
def test_minilm_has_its_published_score_on_amazon_counterfactual() -> None:
    name = "AmazonCounterfactualClassification"
    assert frozen_few_shot(name) == pytest.approx(PUBLISHED[name], abs=0.001)


@needs_mirror
@pytest.mark.faults
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", PUBLISHED)
def test_minilm_has_its_published_scores(name: str) -> None:
    found = frozen_few_shot(name)
    print(f"{name}: {found:.6f}, published {PUBLISHED[name]:.6f}")
    assert found == pytest.approx(PUBLISHED[name], abs=0.001)


@pytest.mark.parametrize("counts", [(30, 30, 1), (19, 1), (2, 2), (1, 2), (2,) * 10, (3,) * 14])
def test_a_class_never_leaves_what_the_probe_is_fitted_on(counts: tuple[int, ...]) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    features = np.arange(2 * len(labels), dtype=np.float32).reshape(-1, 2)
    for seed in range(40):
        (fitted, fitted_labels), (chosen, chosen_labels) = _hold_out(features, labels, seed=seed)
        assert set(fitted_labels) == set(labels)
        assert len(chosen_labels) > 0
        assert sorted([*fitted[:, 0], *chosen[:, 0]]) == sorted(features[:, 0])


def test_where_every_class_has_one_text_all_are_fitted_on_and_none_chooses() -> None:
    labels, features = np.arange(3), np.eye(3, dtype=np.float32)
    (fitted, fitted_labels), (chosen, chosen_labels) = _hold_out(features, labels, seed=0)
    assert (fitted.tolist(), fitted_labels.tolist()) == (features.tolist(), labels.tolist())
    assert (len(chosen), len(chosen_labels)) == (0, 0)


# --- the main metric ---


@pytest.mark.parametrize(
    ("of_mteb", "config", "expected"),
    [
        ("accuracy", "auto", "accuracy"),
        ("f1", "auto", "macro_f1"),
        ("accuracy", "macro_f1", "macro_f1"),
        ("f1", "accuracy", "accuracy"),
    ],
)
def test_the_head_is_judged_by_mtebs_main_score_or_by_what_the_config_says(
    of_mteb: str, config: Any, expected: str, bert: Encoder, data: TaskData
) -> None:
    data.mteb_task.metadata.main_score = of_mteb
    columns: tuple[Column, ...] = ("frozen_full_data", "head")
    settings = EvaluateConfig(columns=columns, bootstrap_draws=100, main_metric=config)
    baselines = evaluate_frozen(facts_of(data, bert), settings, tokens=bert.tokenise(data.train_texts))
    training = as_trained(give_effect(Adapter(bert, AdapterConfig(), data.label_names)))
    found = evaluate_adapter(facts_of(data, bert), settings, training=training, adapter_sha256=SHA, baselines=baselines)
    head, comparison = by_column(found.rows)["head"], found.comparison
    assert comparison is not None
    assert (head.main_metric, head.p_value, head.p_value_main) == (
        expected,
        comparison.p_value,
        comparison.main_p_value,
    )
    gain = head.macro_f1 - by_column(baselines.rows)["frozen_full_data"].macro_f1
    assert comparison.macro_f1_gain == (pytest.approx(gain) if expected == "macro_f1" else None)


def test_rows_of_few_shot_columns_say_how_many_texts_per_label_they_are_from(bert: Encoder, data: TaskData) -> None:
    baselines = frozen(data, bert)
    found = adapted(data, as_trained(give_effect(Adapter(bert, AdapterConfig(), data.label_names))), baselines)
    samples = {row.column: row.samples_per_label for row in (*baselines.rows, *found.rows)}
    assert samples == {
        "majority": None,
        "frozen_full_data": None,
        "head": None,
        "frozen_few_shot": 8,
        "adapted_few_shot": 8,
    }
