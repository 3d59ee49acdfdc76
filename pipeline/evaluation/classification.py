"""Every column of the score table, each text embedded once per encoder state; the door to ``mteb.evaluate``."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.adapter.head import HeadStart
from pipeline.config import EvaluateConfig
from pipeline.data.dataset import TaskData
from pipeline.encoder.encoder import Encoder
from pipeline.encoder.tokeniser import IntArray, Tokens
from pipeline.evaluation import calibration, scores, significance
from pipeline.evaluation.few_shot import few_shot
from pipeline.evaluation.probe import full_data_probe, head_start
from pipeline.evaluation.vectors import TextVectors
from pipeline.records import Calibration, Column, Comparison, Confusion, MainMetric, ScoreRow, SelectedOn
from pipeline.store.key import library_versions
from pipeline.training.train import Training


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
        without = (
            scores.accuracy_without(data.test_labels, predictions, data.test_in_train)
            if predictions is not None
            else None
        )
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
            samples_per_label=data.task.samples_per_label
            if column in ("frozen_few_shot", "adapted_few_shot")
            else None,
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
    probe, features_scale = full_data_probe(data, vectors, config, seed=facts.seed)
    start = head_start(probe, features_scale, len(data.label_names))
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
        comparison = significance.compare_paired(
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
    fit_on = (
        validation if not training.learnt_selection else None
    )  # a temperature fitted on what was learnt would flatter itself
    calibrated = calibration.calibrate(
        fit_on, data.validation_labels if fit_on is not None else None, logits, data.test_labels
    )
    confusions = scores.confusions(data.test_labels, predictions, data.label_names)
    return AdapterEvaluation(tuple(rows), comparison, calibrated, confusions, own)


def _main_metric(data: TaskData, config: EvaluateConfig) -> MainMetric:
    if config.main_metric != "auto":
        return config.main_metric
    return "macro_f1" if data.mteb_task.metadata.main_score == "f1" else "accuracy"


def _score(
    predictions: IntArray, positive: npt.NDArray[Any] | None, facts: RowFacts, config: EvaluateConfig
) -> scores.Score:
    return scores.score_predictions(
        facts.data.test_labels,
        predictions,
        num_classes=len(facts.data.label_names),
        positive_scores=positive,
        bootstrap_draws=config.bootstrap_draws,
        seed=facts.seed,
    )
