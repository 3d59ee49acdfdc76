"""Evaluation of all columns of the score table. Each text is embedded once per encoder state."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.adapter.adapter import Adapter
from pipeline.adapter.head import HeadStart
from pipeline.config import EvaluateConfig
from pipeline.data.dataset import TaskData
from pipeline.encoder.encoder import Encoder
from pipeline.encoder.tokeniser import IntArray, Tokens
from pipeline.evaluation import calibration, scores, significance
from pipeline.evaluation.few_shot import few_shot
from pipeline.evaluation.metrics import Estimate, measure
from pipeline.evaluation.probe import full_data_probe, head_start
from pipeline.evaluation.vectors import TextVectors
from pipeline.records import Calibration, Column, Comparison, Confusion, MainMetric, ScoreRow, SelectedOn, ValueRow
from pipeline.store.key import library_versions
from pipeline.training.train import AdapterTraining


@dataclass(frozen=True)
class Baselines:
    """Columns of the frozen encoder, and the values that training and evaluation reuse."""

    rows: tuple[ScoreRow, ...]
    values: tuple[ValueRow, ...]
    probe_c: float
    probe_predictions: IntArray
    """Predictions of the full-data probe on test, int64 (num_test,)."""
    head_start: HeadStart
    few_shot: dict[str, Any]
    """mteb's own result by the name of the few-shot column. Empty if the column was switched off."""


@dataclass(frozen=True)
class AdapterEvaluation:
    """Columns of the adapted encoder, and further measurements of the head."""

    rows: tuple[ScoreRow, ...]
    values: tuple[ValueRow, ...]
    comparison: Comparison | None
    calibration: Calibration
    confusions: tuple[Confusion, ...]
    few_shot: dict[str, Any]
    """mteb's own result by the name of the few-shot column. Empty if the column was switched off."""


@dataclass(frozen=True)
class RowFacts:
    """Values that all rows of one MTEB task share."""

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
        """Make one row of ``scores.parquet``. ``started`` is the ``perf_counter`` at the start of the work on it."""
        data = self.data
        without_overlap = None if data.num_overlap else score.accuracy
        if data.num_overlap and predictions is not None:
            without_overlap = scores.accuracy_without(data.test_labels, predictions, data.test_in_train)
        is_few_shot = column in ("frozen_few_shot", "adapted_few_shot")
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
            accuracy_without_overlap=without_overlap,
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
            samples_per_label=data.task.samples_per_label if is_few_shot else None,
            main_metric=comparison.main_metric if comparison else None,
            p_value_main=comparison.main_p_value if comparison else None,
        )

    def values(
        self, row: ScoreRow, estimates: Mapping[str, Estimate], *, main_metric: MainMetric
    ) -> tuple[ValueRow, ...]:
        """Make the rows of ``values.parquet`` for one column.

        Args:
            row: Score row of the column. Its numbers are used unchanged.
            estimates: Further metrics, and the interval of macro-F1.
            main_metric: Main metric of the MTEB task.
        """
        numbers = dict(estimates) | {"accuracy": Estimate(row.accuracy, row.low, row.high)}
        numbers["macro_f1"] = replace(numbers.get("macro_f1", Estimate(row.macro_f1)), value=row.macro_f1)
        if row.average_precision is not None:
            numbers["average_precision"] = Estimate(row.average_precision)
        origin = {"run_id": row.run_id, "mteb_task": row.mteb_task, "column": row.column}
        rows = [
            ValueRow(
                **origin,  # type: ignore[arg-type]
                metric=name,
                value=number.value,
                low=number.low,
                high=number.high,
                num_texts=row.num_texts,
                main=name == main_metric,
            )
            for name, number in numbers.items()
        ]
        num_new = row.num_texts - row.num_overlap
        if row.num_overlap and row.accuracy_without_overlap is not None and num_new:
            new_texts = {"slice": "in_train", "slice_value": "no", "num_texts": num_new, "low": None, "high": None}
            rows.append(rows[list(numbers).index("accuracy")].changed(value=row.accuracy_without_overlap, **new_texts))
        return tuple(rows)


def evaluate_frozen(facts: RowFacts, config: EvaluateConfig, *, tokens: Tokens, refit: bool = False) -> Baselines:
    """Evaluate the frozen encoder: majority class, mteb's few-shot protocol, logistic regression on all of train.

    Args:
        facts: Data and encoder of the task, without an attached adapter.
        config: Columns to evaluate, and options of the probe.
        tokens: Tokens of the training texts, so that they are not tokenised again.
        refit: Whether the head is finally trained on train and validation. The probe is then fitted on both, too.
    """
    data, vectors, columns = facts.data, TextVectors(facts.encoder), _Columns(facts, config)
    started = time.perf_counter()
    if "majority" in config.columns:
        majority = np.full_like(data.test_labels, np.bincount(data.train_labels).argmax())
        columns.add("majority", majority, None, started=started)
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
        columns.add("frozen_full_data", predictions, positive, started=started)
    started = time.perf_counter()
    mteb_results: dict[str, Any] = {}
    if "frozen_few_shot" in config.columns:
        score, mteb_results["frozen_few_shot"] = few_shot(data.mteb_task, vectors)
        columns.add_score("frozen_few_shot", score, started=started)
    rows, values = columns.done()
    return Baselines(rows, values, float(probe.C), predictions.astype(np.int64), start, mteb_results)


def evaluate_adapter(
    facts: RowFacts, config: EvaluateConfig, *, training: AdapterTraining, adapter_sha256: str, baselines: Baselines
) -> AdapterEvaluation:
    """Evaluate the adapted encoder: mteb's few-shot protocol on its vectors, and the adapter's own head."""
    data, adapter, columns = facts.data, training.adapter, _Columns(facts, config)
    assert isinstance(adapter, Adapter), "texts with labels have no sides"
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
    trained: dict[str, Any] = {"selected_on": training.selected_on, "adapter_sha256": adapter_sha256}
    margin = logits[:, -1] - logits[:, 0]
    columns.add("head", predictions, margin, started=started, comparison=comparison, **trained)
    started = time.perf_counter()
    mteb_results: dict[str, Any] = {}
    if "adapted_few_shot" in config.columns:
        score, mteb_results["adapted_few_shot"] = few_shot(data.mteb_task, vectors)
        columns.add_score("adapted_few_shot", score, started=started, **trained)
    # A temperature fitted on texts that the adapter was trained on would be too low.
    fit_on = None if training.learnt_selection else validation
    calibrated = calibration.calibrate(
        fit_on, data.validation_labels if fit_on is not None else None, logits, data.test_labels
    )
    confusions = scores.confusions(data.test_labels, predictions, data.label_names)
    rows, values = columns.done()
    return AdapterEvaluation(rows, values, comparison, calibrated, confusions, mteb_results)


def _main_metric(data: TaskData, config: EvaluateConfig) -> MainMetric:
    if config.main_metric != "auto":
        return config.main_metric
    return "macro_f1" if data.mteb_task.metadata.main_score == "f1" else "accuracy"


class _Columns:
    """Columns evaluated so far, as score rows and as values."""

    def __init__(self, facts: RowFacts, config: EvaluateConfig) -> None:
        self._facts = facts
        self._config = config
        self._main_metric = _main_metric(facts.data, config)
        self._rows: list[ScoreRow] = []
        self._values: list[ValueRow] = []

    def add(
        self,
        column: Column,
        predictions: IntArray,
        positive: npt.NDArray[Any] | None,
        *,
        started: float,
        **facts: Any,
    ) -> None:
        """Score one prediction per test text.

        Args:
            column: Name of the column.
            predictions: Class of each test text, int (num_test,).
            positive: Score of the last class for each text, on any scale, float (num_test,).
            started: The ``perf_counter`` at the start of the work on the column.
            facts: Further arguments of ``RowFacts.row``.
        """
        labels, num_classes = self._facts.data.test_labels, len(self._facts.data.label_names)
        draws, seed = self._config.bootstrap_draws, self._facts.seed
        score = scores.score_predictions(
            labels, predictions, num_classes=num_classes, positive_scores=positive, bootstrap_draws=draws, seed=seed
        )
        row = self._facts.row(column, score, started=started, predictions=predictions, **facts)
        estimates = measure(labels, predictions, num_classes=num_classes, draws=draws, seed=seed)
        self._append(row, estimates)

    def add_score(self, column: Column, score: scores.Score, *, started: float, **facts: Any) -> None:
        """Add a column whose score was computed elsewhere. Arguments are those of ``add``."""
        self._append(self._facts.row(column, score, started=started, **facts), {})

    def done(self) -> tuple[tuple[ScoreRow, ...], tuple[ValueRow, ...]]:
        """All columns, in the order in which they were added."""
        return tuple(self._rows), tuple(self._values)

    def _append(self, row: ScoreRow, estimates: Mapping[str, Estimate]) -> None:
        self._rows.append(row)
        self._values += self._facts.values(row, estimates, main_metric=self._main_metric)
