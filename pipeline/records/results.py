"""Records of finished and failed MTEB tasks."""

from __future__ import annotations

from typing import Any

from pydantic import AwareDatetime, Field, model_validator

from pipeline.records.base import Family, Fraction, Key, MainMetric, Record, RunId, SelectedOn, Sha256, TaskName
from pipeline.records.data import DataSummary, MtebTask
from pipeline.records.refs import AdapterRef, EncoderRef, Runtime
from pipeline.records.scores import Calibration, Comparison, Confusion, Difference, ScoreRow, SimilarityCounts, ValueRow
from pipeline.records.training import EpochRow, WarmStart


class TaskResult(Record):
    """Result of one MTEB task in a run. Written last into its folder: its presence marks the task as finished."""

    mteb_task: MtebTask
    key: Key
    """Hash of everything that the weights and scores depend on. Equal keys need no second training."""
    run_id: RunId
    data: DataSummary
    encoder: EncoderRef
    runtime: Runtime
    adapter: AdapterRef
    num_lora_parameters: int
    num_head_parameters: int
    merge_difference: float
    """Largest absolute difference between vectors of the merged and the unmerged adapter, over 32 test texts."""
    probe_c: float | None
    """Inverse regularisation of the full-data probe, chosen on validation. None for an adapter without a head."""
    epochs: tuple[EpochRow, ...]
    best_epoch: int = Field(ge=0)
    """Epoch whose weights the adapter has. 0: no epoch was better than the start, so the adapter is its start.

    The start is the published adapter of a warm start. Otherwise it is the probe's head, or a random one, and LoRA
    pairs without effect."""
    start_accuracy: Fraction | None = None
    """Accuracy of the start on the split that selects the epoch.

    None if there is no such split, if the start was refitted on an earlier slice, and in results of older versions.
    While the data grow, most of the slice stays the same, but not all. Another published adapter may therefore have
    been trained on a few of these texts."""
    selection_metric: str = "accuracy"
    """Metric that selected the epoch."""
    start_score: float | None = None
    """Value of that metric for the start, if it is not accuracy. None for the same reasons as ``start_accuracy``."""
    selected_on: SelectedOn
    refitted: bool
    """Whether the adapter was trained again on train and validation together."""
    warm_start: WarmStart | None = None
    """Published adapter that training started from. None: it started from scratch."""
    scores: tuple[ScoreRow, ...]
    values: tuple[ValueRow, ...] = ()
    """Every measured number. Empty in results of older versions, whose numbers are in ``scores`` only."""
    comparison: Comparison | None
    """Head against probe. None if one of the two columns was switched off."""
    differences: tuple[Difference, ...] = ()
    """The adapted against the frozen encoder, for an adapter without a head: full width first."""
    similarities: tuple[SimilarityCounts, ...] = ()
    """Histograms of the similarities of the test pairs. Empty for other tasks."""
    calibration: Calibration | None
    """Calibration of the head. None for an adapter without a head."""
    confusions: tuple[Confusion, ...]
    """The most frequent confusions, at most ten."""
    busy_seconds: float
    """Computing time of the worker for this MTEB task."""
    reused_from: RunId | None = None
    """Run that computed this result, if not this one."""

    @property
    def has_head(self) -> bool:
        """Whether the adapter can classify."""
        return self.num_head_parameters > 0

    @property
    def has_sides(self) -> bool:
        """Whether each side of the task's pairs has an adapter of its own."""
        return self.mteb_task.sides is not None

    @model_validator(mode="before")
    @classmethod
    def _move_start_accuracy_of_older_versions(cls, values: Any) -> Any:
        start = values.get("warm_start") if isinstance(values, dict) else None
        if not isinstance(start, dict) or "validation_accuracy" not in start:
            return values
        accuracy = {"start_accuracy": start["validation_accuracy"]}
        return accuracy | values | {"warm_start": {k: v for k, v in start.items() if k != "validation_accuracy"}}


class Failure(Record):
    """An MTEB task that failed. The other tasks are unaffected."""

    mteb_task: str
    stage: str
    reason: str
    """One line for the person who started the run."""
    user_fault: bool = False
    """Whether the input was wrong, so that a retry cannot help."""


class ResultsEntry(Record):
    """One MTEB task in ``classification_results.json``. Accuracies are 0..1."""

    task: TaskName
    num_classes: int
    baseline_accuracy: float | None
    """Accuracy of mteb's few-shot protocol on the frozen encoder."""
    lora_accuracy: float | None
    """Accuracy of the same protocol on the adapted encoder."""
    delta: float | None
    """``lora_accuracy`` minus ``baseline_accuracy``."""
    full_data_probe_accuracy: float | None
    head_accuracy: float | None
    majority_accuracy: float | None
    epochs: int
    best_epoch: int
    """Epoch whose weights the adapter has. 0: no epoch was better than the start."""
    selected_on: SelectedOn
    p_value_holm: float | None
    num_test: int
    num_overlap: int
    adapter_sha256: Sha256
    reused_from: RunId | None
    samples_per_label: int | None = None
    """Training texts per label in mteb's few-shot draws.

    This field and all that follow are None in files of older versions."""
    full_data_probe_macro_f1: float | None = None
    head_macro_f1: float | None = None
    main_metric: MainMetric | None = None
    """Metric that compares the head with the full-data probe."""
    p_value_main: float | None = None
    """Paired test on the main metric, without correction."""
    p_value_main_holm: float | None = None
    """``p_value_main`` with Holm's correction over the MTEB tasks of the run."""


class ResultsAverage(Record):
    """Means over the MTEB tasks that have the column."""

    baseline_accuracy: float | None
    lora_accuracy: float | None
    delta: float | None
    full_data_probe_accuracy: float | None
    head_accuracy: float | None


class ClassificationResults(Record):
    """The content of ``classification_results.json``."""

    encoder: EncoderRef
    tasks: tuple[ResultsEntry, ...]
    average: ResultsAverage
    failures: tuple[Failure, ...]
    run_id: RunId
    created_at: AwareDatetime


class TaskEntry(Record):
    """One MTEB task of any family in ``results.json``."""

    task: TaskName
    family: Family
    metric: str
    """Main metric of the task, which all numbers of this entry are values of."""
    frozen: float | None
    """Value without the adapter. For classification that of the full-data probe. None if it was not measured."""
    adapted: float | None
    """Value with the adapter. For classification that of its own head. None if it was not measured."""
    low: float | None
    """Lower end of the 95 % interval of ``adapted``. None if it was not computed."""
    high: float | None
    gain: float | None
    """``adapted`` minus ``frozen``."""
    gain_low: float | None = None
    """Lower end of the 95 % interval of the gain. None for classification, which has a paired test only."""
    gain_high: float | None = None
    p_value: Fraction | None
    """Paired test of the gain on the same test texts."""
    p_value_holm: Fraction | None
    """``p_value`` with Holm's correction over the MTEB tasks of the run."""
    num_test: int
    num_overlap: int
    """Test examples that also occur in train, word for word."""
    epochs: int
    best_epoch: int
    """Epoch whose weights the adapter has. 0: no epoch was better than the start."""
    selected_on: SelectedOn
    adapter_sha256: Sha256
    reused_from: RunId | None


class RunResults(Record):
    """The content of ``results.json``: every MTEB task of a run, of every family."""

    encoder: EncoderRef
    tasks: tuple[TaskEntry, ...]
    failures: tuple[Failure, ...]
    run_id: RunId
    created_at: AwareDatetime
