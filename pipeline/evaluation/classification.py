"""Every column of the score table, each text embedded once per encoder state; the door to ``mteb.evaluate``."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.adapter.adapter import HeadStart
from pipeline.config import EvaluateConfig
from pipeline.data.dataset import TaskData
from pipeline.encoder.encoder import Encoder, FloatArray
from pipeline.encoder.tokeniser import IntArray, Tokens
from pipeline.evaluation import scores
from pipeline.records import Calibration, Column, Comparison, Confusion, MainMetric, ScoreRow, SelectedOn
from pipeline.store.manifest import library_versions
from pipeline.training.train import Training

_PROBE_ITERATIONS = 1000
_HEAD_START_CONFIDENCE = 0.25  # a head as sure as the probe leaves the encoder nothing to learn from: see CHANGELOG, Experiments


class TextVectors:
    """The vectors that one state of an encoder gives; no text is embedded twice."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._row_of: dict[str, int] = {}
        self._vectors: FloatArray = np.empty((0, encoder.hidden_size), dtype=np.float32)

    def __call__(self, texts: Sequence[str], tokens: Tokens | None = None) -> FloatArray:
        """float32 (texts, width), not normalised; ``tokens`` saves tokenising texts that are all new."""
        new = list(dict.fromkeys(text for text in texts if text not in self._row_of))
        if new:
            reuse = tokens is not None and len(new) == len(texts)
            made = self._encoder.embed(tokens if reuse and tokens is not None else self._encoder.tokenise(new))
            for text in new:
                self._row_of[text] = len(self._row_of)
            self._vectors = np.concatenate([self._vectors, made])
        return self._vectors[[self._row_of[text] for text in texts]]

    def features(self, texts: Sequence[str]) -> FloatArray:
        """What classifiers on top see: unit vectors where the encoder's own definition ends in them."""
        vectors = self(texts)
        return unit(vectors) if self._encoder.normalize else vectors


@dataclass(frozen=True)
class Baselines:
    """The columns of the frozen encoder, and what training and evaluation take from them."""

    rows: tuple[ScoreRow, ...]
    probe_c: float
    probe_predictions: IntArray
    """Of the full-data probe on test, (num_test,)."""
    head_start: HeadStart
    few_shot: dict[str, Any]
    """mteb's own result of the few-shot column, by its name; empty where that was left out."""


@dataclass(frozen=True)
class AdapterEvaluation:
    """The columns of the adapted encoder and what is known of the head."""

    rows: tuple[ScoreRow, ...]
    comparison: Comparison | None
    calibration: Calibration
    confusions: tuple[Confusion, ...]
    few_shot: dict[str, Any]
    """As in ``Baselines``."""


@dataclass(frozen=True)
class RowFacts:
    """What all rows of one MTEB task have in common."""

    run_id: str
    data: TaskData
    encoder: Encoder
    num_truncated: int
    """Test texts cut at ``max_tokens``."""
    seed: int

    def row(
        self,
        column: Column,
        score: scores.Score,
        *,
        started: float,
        predictions: IntArray | None = None,
        selected_on: SelectedOn | None = None,
        adapter_sha256: str | None = None,
        comparison: Comparison | None = None,
    ) -> ScoreRow:
        """One line of ``scores.parquet``; ``started`` is the ``perf_counter`` at which the work on it began."""
        data = self.data
        without = scores.accuracy_without(data.test_labels, predictions, data.test_in_train) if predictions is not None else None
        return ScoreRow(
            run_id=self.run_id,
            mteb_task=data.task.name,
            subset=data.task.subset,
            column=column,
            accuracy=score.accuracy,
            macro_f1=score.macro_f1,
            average_precision=score.average_precision,
            low=score.low,
            high=score.high,
            num_texts=len(data.test_texts),
            num_classes=len(data.label_names),
            num_overlap=data.num_overlap,
            accuracy_without_overlap=without if data.num_overlap else score.accuracy,
            num_truncated=self.num_truncated,
            selected_on=selected_on,
            seconds=time.perf_counter() - started,
            encoder=self.encoder.ref.public_name,
            encoder_revision=self.encoder.ref.revision,
            dataset_revision=data.task.revision,
            adapter_sha256=adapter_sha256,
            seed=self.seed,
            dtype=self.encoder.runtime.dtype,
            device=self.encoder.runtime.device,
            versions=json.dumps(library_versions(), sort_keys=True),
            created_at=datetime.now(UTC),
            p_value=comparison.p_value if comparison else None,
            test_sha256=data.test_fingerprint,
            samples_per_label=data.task.samples_per_label if column in ("frozen_few_shot", "adapted_few_shot") else None,
            main_metric=comparison.main_metric if comparison else None,
            p_value_main=comparison.main_p_value if comparison else None,
        )


def evaluate_frozen(facts: RowFacts, config: EvaluateConfig, *, tokens: Tokens, refit: bool = False) -> Baselines:
    """Measure the frozen encoder: majority class, mteb's few-shot protocol, logistic regression on all of train.

    Args:
        facts: The task's data and encoder, no adapter attached.
        config: Which columns.
        tokens: Of the training texts, to embed them without tokenising again.
        refit: The head will learn from train and validation in the end, so the probe it is compared with does too.
    """
    data, vectors, rows = facts.data, TextVectors(facts.encoder), []
    started = time.perf_counter()
    if "majority" in config.columns:
        majority = np.full_like(data.test_labels, np.bincount(data.train_labels).argmax())
        score = _score(majority, None, facts, config)
        rows.append(facts.row("majority", score, started=started, predictions=majority))
    started = time.perf_counter()
    vectors(data.train_texts, tokens)
    probe, features_scale = _full_data_probe(data, vectors, config, seed=facts.seed)
    start = _head_start(probe, features_scale, len(data.label_names))
    if refit and data.validation_texts:
        both = [vectors.features(data.train_texts), vectors.features(data.validation_texts)]
        probe.fit(np.concatenate(both), np.concatenate([data.train_labels, data.validation_labels]))
    predictions = probe.predict(vectors.features(data.test_texts))
    if "frozen_full_data" in config.columns:
        positive = probe.predict_proba(vectors.features(data.test_texts))[:, -1]
        score = _score(predictions, positive, facts, config)
        rows.append(facts.row("frozen_full_data", score, started=started, predictions=predictions))
    started = time.perf_counter()
    own: dict[str, Any] = {}
    if "frozen_few_shot" in config.columns:
        score, own["frozen_few_shot"] = few_shot(data.mteb_task, vectors)
        rows.append(facts.row("frozen_few_shot", score, started=started))
    return Baselines(tuple(rows), float(probe.C), predictions.astype(np.int64), start, own)


def evaluate_adapter(
    facts: RowFacts, config: EvaluateConfig, *, training: Training, adapter_sha256: str, baselines: Baselines
) -> AdapterEvaluation:
    """Measure the adapted encoder: mteb's few-shot protocol on its vectors, and the adapter's own head."""
    data, adapter, rows = facts.data, training.adapter, []
    vectors = TextVectors(facts.encoder)
    started = time.perf_counter()
    logits = adapter.logits_of_vectors(vectors(data.test_texts))
    validation = adapter.logits_of_vectors(vectors(data.validation_texts)) if data.validation_texts else None
    predictions = logits.argmax(axis=1).astype(np.int64)
    comparison = None
    if "frozen_full_data" in config.columns:
        comparison = scores.compare_paired(
            data.test_labels,
            predictions,
            baselines.probe_predictions,
            num_classes=len(data.label_names),
            main_metric=_main_metric(data, config),
            seed=facts.seed,
        )
    score = _score(predictions, logits[:, -1] - logits[:, 0], facts, config)
    trained = {"selected_on": training.selected_on, "adapter_sha256": adapter_sha256}
    rows.append(facts.row("head", score, started=started, predictions=predictions, comparison=comparison, **trained))  # type: ignore[arg-type]
    started = time.perf_counter()
    own: dict[str, Any] = {}
    if "adapted_few_shot" in config.columns:
        score, own["adapted_few_shot"] = few_shot(data.mteb_task, vectors)
        rows.append(facts.row("adapted_few_shot", score, started=started, **trained))  # type: ignore[arg-type]
    fit_on = validation if not training.learnt_selection else None  # a temperature fitted on what was learnt would flatter itself
    calibration = scores.calibrate(fit_on, data.validation_labels if fit_on is not None else None, logits, data.test_labels)
    confusions = scores.confusions(data.test_labels, predictions, data.label_names)
    return AdapterEvaluation(tuple(rows), comparison, calibration, confusions, own)


def unit(vectors: FloatArray) -> FloatArray:
    """The vectors at length 1, float32 (texts, width)."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.maximum(lengths, 1e-12)).astype(np.float32)


def _main_metric(data: TaskData, config: EvaluateConfig) -> MainMetric:
    if config.main_metric != "auto":
        return config.main_metric
    return "macro_f1" if data.mteb_task.metadata.main_score == "f1" else "accuracy"


def _score(predictions: IntArray, positive: npt.NDArray[Any] | None, facts: RowFacts, config: EvaluateConfig) -> scores.Score:
    return scores.score_predictions(
        facts.data.test_labels,
        predictions,
        num_classes=len(facts.data.label_names),
        positive_scores=positive,
        bootstrap_draws=config.bootstrap_draws,
        seed=facts.seed,
    )


def _full_data_probe(data: TaskData, vectors: TextVectors, config: EvaluateConfig, *, seed: int) -> tuple[Any, float]:
    """Logistic regression on all of train, and the mean length of what it was fitted on relative to its features."""
    from sklearn.linear_model import LogisticRegression

    features, labels = vectors.features(data.train_texts), data.train_labels
    if data.validation_texts:
        fit, choose = (features, labels), (vectors.features(data.validation_texts), data.validation_labels)
    else:
        fit, choose = _hold_out(features, labels, seed=seed)
    best: tuple[float, Any] | None = None
    probe = LogisticRegression(max_iter=_PROBE_ITERATIONS, warm_start=True)
    for c in sorted(config.probe_c):
        probe.set_params(C=c).fit(*fit)
        right = float(probe.score(*choose)) if len(choose[1]) else 0.0  # of equals the smallest C is taken, so also of unmeasured ones
        if best is None or right > best[0]:
            best = (right, (c, probe.coef_.copy(), probe.intercept_.copy()))
    assert best is not None
    c, probe.coef_, probe.intercept_ = best[1]
    probe.set_params(C=c)
    if not data.validation_texts:
        probe.fit(features, labels)
    scale = float(np.linalg.norm(vectors(data.train_texts), axis=1).mean() / np.linalg.norm(features, axis=1).mean())
    return probe, scale


def _hold_out(features: FloatArray, labels: IntArray, *, seed: int) -> tuple[Any, Any]:
    """Train in two parts: what is fitted, and a tenth to choose the probe's C on where the task has no validation slice.

    Each class keeps a text in what is fitted, so the tenth is empty where no class has two.
    """
    from sklearn.model_selection import train_test_split

    single = np.bincount(labels)[labels] == 1
    spare = np.flatnonzero(~single)
    if not len(spare):
        return (features, labels), (features[spare], labels[spare])
    stratify = labels[spare] if len(spare) // 10 >= len(np.unique(labels[spare])) else None
    fit, choose = train_test_split(spare, test_size=0.1, random_state=seed, stratify=stratify)
    classes, first = np.unique(labels[choose], return_index=True)
    back = first[~np.isin(classes, labels[fit])]  # of a class that is wholly in the tenth; it has at least two
    fit, choose = np.concatenate([fit, choose[back], np.flatnonzero(single)]), np.delete(choose, back)
    return (features[fit], labels[fit]), (features[choose], labels[choose])


def _head_start(probe: Any, scale: float, num_classes: int) -> HeadStart:
    """The probe as a linear layer on vectors that are not normalised, less sure of itself; of two classes each gets half the margin."""
    weight = np.asarray(probe.coef_) * _HEAD_START_CONFIDENCE / scale
    bias = np.asarray(probe.intercept_) * _HEAD_START_CONFIDENCE
    if num_classes == 2:
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    return HeadStart(weight.astype(np.float32), bias.astype(np.float32))


def import_ahead() -> None:
    """Import what an evaluation, and the encoder before it, would else wait for: mteb and transformers take seconds."""
    import mteb  # noqa: F401
    import transformers.modeling_utils  # noqa: F401


def few_shot(mteb_task: Any, vectors: TextVectors) -> tuple[scores.Score, dict[str, Any]]:
    """mteb's own protocol: logistic regression on ``samples_per_label`` texts, ten draws, on test; and its own result of it."""
    import mteb

    result = mteb.evaluate(
        _mteb_encoder(vectors), mteb_task, cache=None, co2_tracker=False, show_progress_bar=False, encode_kwargs={"batch_size": 1024}
    )
    task_result = result.task_results[0]
    (entry,) = task_result.scores["test"]
    draws = entry["scores_per_experiment"]
    precisions = [draw["ap"] for draw in draws] if draws[0].get("ap") is not None else None
    score = scores.score_of_draws([d["accuracy"] for d in draws], [d["f1"] for d in draws], precisions)
    return score, task_result.model_dump(mode="json")


def _mteb_encoder(vectors: TextVectors) -> Any:
    """An object that mteb takes for an encoder, reading vectors that are already there."""
    from mteb.models import ModelMeta
    from mteb.similarity_functions import cos_sim, pairwise_cos_sim

    class CachedEncoder:
        mteb_model_meta = ModelMeta.create_empty({"name": "lorafleet/encoder", "revision": "current"})

        def __init__(self, model_name: str = "", revision: str | None = None, *, device: str | None = None, **kwargs: Any) -> None:
            """mteb's protocol asks for this signature."""

        def encode(self, inputs: Any, **kwargs: Any) -> FloatArray:
            return vectors.features([text for batch in inputs for text in batch["text"]])

        def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
            return cos_sim(embeddings1, embeddings2)

        def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
            return pairwise_cos_sim(embeddings1, embeddings2)

    return CachedEncoder()
