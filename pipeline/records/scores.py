"""Records of scores, calibration and comparisons."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, RootModel

from pipeline.records.base import (
    Column,
    DataRevision,
    EncoderRevision,
    FewShotColumn,
    Fraction,
    MainMetric,
    Record,
    RunId,
    SelectedOn,
    Sha256,
    TaskName,
    ValueColumn,
)


class FewShotDraw(BaseModel):
    """mteb's scores of one few-shot draw. Scores that lorafleet does not use are kept as they are."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    accuracy: Fraction
    f1: Fraction
    """Macro-F1."""
    ap: Fraction | None = None
    """Average precision, for two classes only."""


class FewShotScores(FewShotDraw):
    """mteb's scores of one subset, each the mean over the draws."""

    main_score: Fraction
    """The score by which mteb compares models."""
    hf_subset: str
    scores_per_experiment: tuple[FewShotDraw, ...] = ()
    """Scores of each draw."""


class FewShotResult(BaseModel):
    """mteb's ``TaskResult``. Fields that lorafleet does not use are kept as they are."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    task_name: TaskName
    scores: dict[Literal["test"], tuple[FewShotScores, ...]]


class FewShot(RootModel[dict[FewShotColumn, FewShotResult]]):
    """The content of ``few_shot.json``: mteb's own results of the few-shot columns."""

    model_config = ConfigDict(frozen=True)


class ScoreRow(Record):
    """One column of the score table for one MTEB task, with everything needed to reproduce it."""

    run_id: RunId
    mteb_task: TaskName
    subset: str
    split: Literal["test"] = "test"
    column: Column
    accuracy: Fraction
    macro_f1: Fraction
    average_precision: Fraction | None
    """Average precision, for two classes only.

    Computed from probabilities for the full-data probe and the head. For few-shot columns it is mteb's, from labels."""
    low: Fraction
    """Lower end of the 95 % interval of the accuracy: over the draws for few-shot, over the test texts otherwise."""
    high: Fraction
    """Upper end of that interval."""
    num_texts: int
    num_classes: int
    num_overlap: int
    """Test texts that also occur in train."""
    accuracy_without_overlap: Fraction | None
    """Accuracy on the test texts that do not occur in train.

    None if it was not measured (few-shot columns with overlap) or no text is left."""
    num_truncated: int
    """Test texts cut at ``max_tokens``."""
    selected_on: SelectedOn | None
    """Split that chose the epoch. None for columns of the frozen encoder, which is not trained."""
    seconds: float
    encoder: str
    encoder_revision: EncoderRevision
    dataset_revision: DataRevision
    adapter_sha256: Sha256 | None
    seed: int
    dtype: str
    device: str
    versions: str
    """JSON object that maps libraries to versions."""
    created_at: datetime
    p_value: Fraction | None = None
    """McNemar's exact test against ``frozen_full_data`` on the same test texts. Set in the ``head`` row only."""
    p_value_holm: Fraction | None = None
    """``p_value`` with Holm's correction over the MTEB tasks of the run."""
    reused_from: RunId | None = None
    """Run that computed this row, if not this one."""
    test_sha256: str | None = None
    """SHA-256 of the test texts and labels, independent of order. None in rows of older versions.

    Scores with different hashes are not comparable."""
    samples_per_label: int | None = None
    """Training texts per label in each few-shot draw. None in other columns and in rows of older versions.

    Scores with different numbers are not comparable."""
    main_metric: MainMetric | None = None
    """Metric that compares the head with ``frozen_full_data``.

    Set in the ``head`` row only, like the next two fields. None in rows of older versions."""
    p_value_main: Fraction | None = None
    """Paired test on the main metric: ``p_value`` for accuracy, a randomisation test for macro-F1."""
    p_value_main_holm: Fraction | None = None
    """``p_value_main`` with Holm's correction over the MTEB tasks of the run."""


class ValueRow(Record):
    """One measured number: one row of ``values.parquet``."""

    run_id: RunId
    mteb_task: TaskName
    split: Literal["test"] = "test"
    column: ValueColumn
    metric: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_@]{0,63}$")]
    """Name of the metric, such as ``accuracy``."""
    width: int | None = Field(default=None, ge=1)
    """Number of dimensions used of the text vectors. None: all of them."""
    slice: str | None = Field(default=None, min_length=1, max_length=128)
    """Property that the texts of this row share, such as ``in_train``. None: all texts."""
    slice_value: str | None = Field(default=None, max_length=1024)
    """Value of that property."""
    value: float
    low: float | None = None
    """Lower end of the 95 % interval: over the draws for few-shot columns, over the test texts otherwise.

    None: not computed."""
    high: float | None = None
    """Upper end of that interval."""
    num_texts: int = Field(ge=1)
    main: bool
    """Whether this is the main metric of the MTEB task."""


class Difference(Record):
    """Main metric of the adapted encoder minus that of the frozen one, on the same test texts."""

    metric: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_@]{0,63}$")]
    width: int | None = Field(default=None, ge=1)
    """Number of dimensions used of the text vectors. None: all of them."""
    slice: str | None = Field(default=None, min_length=1, max_length=128)
    """Property that the texts share. None: all texts."""
    slice_value: str | None = Field(default=None, max_length=1024)
    gain: float
    """Positive if the adapted encoder is better."""
    low: float | None
    """Lower end of the 95 % interval of the paired bootstrap. None: too few independent texts for an interval."""
    high: float | None
    """Upper end of that interval."""
    p_value: float = Field(gt=0.0, le=1.0)
    """Two-sided test of the same bootstrap. 1 without an interval."""
    p_value_holm: Fraction | None = None
    """``p_value`` with Holm's correction over the MTEB tasks of the run. Set for all of test at full width."""
    num_texts: int = Field(ge=1)
    """Number of pairs, of queries in a search, or of texts."""


class CoverageRow(Record):
    """Accuracy if texts whose confidence is below a threshold get no label."""

    threshold: Fraction
    coverage: Fraction
    """Fraction of the texts that keep their label."""
    accuracy: Fraction | None
    """Accuracy on the texts that keep their label. None if there are none."""
    num_texts: int | None = Field(default=None, ge=0)
    """Number of texts that keep their label. None in tables of older versions."""
    low: Fraction | None = None
    """Lower end of a 95 % interval of the accuracy, simultaneous over all rows of a table. 0 if no text is left.

    None in tables of older versions."""


class ReliabilityBin(Record):
    """One bar of the calibration plot."""

    confidence: Fraction
    """Mean probability of the predicted label in this bin."""
    accuracy: Fraction
    num_texts: int


class Calibration(Record):
    """Calibration of the head's probabilities: fitted on validation, measured on test."""

    temperature: float = Field(ge=0.01, le=100)
    fitted_on: Literal["validation", "none"]
    """``none``: no validation slice was left to fit on, so the temperature is 1."""
    error_before: Fraction
    """Expected calibration error on test in 15 bins, at temperature 1."""
    error_after: Fraction
    """Expected calibration error on test in 15 bins, at the fitted temperature."""
    coverage: tuple[CoverageRow, ...]
    """Accuracy by threshold on validation, so that choosing a threshold does not use test.

    Measured on test if ``fitted_on`` is ``none``."""
    reliability: tuple[ReliabilityBin, ...]
    """Bins of test, at the fitted temperature."""


class Confusion(Record):
    """Test texts of one label that the head gives another label."""

    label: str
    """True label."""
    predicted: str
    num_texts: int
    """Texts of ``label`` that the head labels ``predicted``."""
    num_of_label: int
    """All test texts of ``label``."""


class Comparison(Record):
    """The head against the full-data probe on the same test texts."""

    only_head: int
    """Texts that only the head labels correctly."""
    only_probe: int
    """Texts that only the probe labels correctly."""
    p_value: Fraction
    """McNemar's exact test, two-sided."""
    main_metric: MainMetric = "accuracy"
    """Metric by which the two are compared."""
    macro_f1_gain: float | None = None
    """Macro-F1 of the head minus that of the probe. None if accuracy is the main metric."""
    macro_f1_p_value: Fraction | None = None
    """Two-sided paired randomisation test of ``macro_f1_gain``. None if accuracy is the main metric."""

    @property
    def gain(self) -> float:
        """Positive if the head is better by the main metric, negative if the probe is."""
        return self.macro_f1_gain if self.macro_f1_gain is not None else self.only_head - self.only_probe

    @property
    def main_p_value(self) -> float:
        """P-value of the test on the main metric."""
        return self.macro_f1_p_value if self.macro_f1_p_value is not None else self.p_value


class SimilarityCounts(Record):
    """Histogram of the cosine similarities of the test pairs of one group, in equal bins from -1 to 1."""

    column: Literal["frozen", "adapted"]
    group: Annotated[str, Field(min_length=1, max_length=64)]
    """Pairs that are counted, such as ``label 1``."""
    counts: tuple[Annotated[int, Field(ge=0)], ...]
