"""What travels between stages or touches a disk: frozen, validated, and no tensor in any of it."""

from __future__ import annotations

from collections import Counter
from datetime import datetime
from typing import Annotated, Any, Literal, Self

from pydantic import AwareDatetime, BaseModel, BeforeValidator, ConfigDict, FailFast, Field, RootModel, model_validator

SelectedOn = Literal["validation", "test", "last_epoch"]
"""The split that chose the epoch. ``test`` makes the score optimistic, so it is written on every row."""

Column = Literal["majority", "frozen_few_shot", "frozen_full_data", "adapted_few_shot", "head"]
"""One way to classify a data set; together they are the columns of the score table, left to right."""

FewShotColumn = Literal["frozen_few_shot", "adapted_few_shot"]
"""A column that mteb's own few-shot protocol measures."""

SIGNIFICANCE = 0.05
"""A p-value below this is called significant, in verdicts and at the gate."""
MainMetric = Literal["accuracy", "macro_f1"]
"""The score by which the head is judged against the full-data probe; the name of a field of ``ScoreRow``."""

Unit = Annotated[float, Field(ge=0.0, le=1.0)]
"""A share or a score, 0..1."""

# Strings that become part of a path, an address or a git reference: a record with another one cannot be read.

TaskName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=128)]
"""Name of an MTEB task: a folder of the run, and part of a column's name."""

RunId = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=64)]
"""Name of a run folder, and part of a tag and of a branch."""

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
"""SHA-256 in hexadecimal."""

EncoderRevision = Annotated[str, Field(pattern=r"^(sha256:)?[0-9a-f]+$", max_length=71)]
"""A commit of the Hub, or ``sha256:…`` of an encoder's files."""

Key = Annotated[str, Field(pattern=r"^[0-9a-f]{32,64}$")]
"""Beginning of a SHA-256 in hexadecimal: a file name under the run store."""

DataRevision = Annotated[str, Field(pattern=r"^[\w.:+! -]+$", max_length=100)]
"""A commit, a version of a package, or ``sha256:…`` of files; in words where nothing was read yet."""

LONGEST_PUBLIC_NAME = 200
"""Characters of a ``PublicName``."""

PublicName = Annotated[str, Field(pattern=r"^\w[\w.-]*(/\w[\w.-]*)?$", max_length=LONGEST_PUBLIC_NAME)]
"""``OWNER/NAME`` of the Hub, or the name of a package or folder."""

FilePath = Annotated[str, Field(pattern=r"^\w[\w.-]*(/\w[\w.-]*)*$", max_length=1000)]
"""Path of a file inside its folder, with slashes; no part begins with a dot."""

ModulePath = Annotated[str, Field(pattern=r"^[\w-]+(\.[\w-]+)*$", max_length=300)]
"""Path of a module in an encoder."""

LONGEST_LABEL = 10_000
"""Characters of a label."""

MOST_LABEL_BYTES = 2 * 1024**2
"""Of all label names together, as JSON in a record: ``run_folder.LARGEST_RECORD_BYTES`` has to hold them and more."""

LabelName = Annotated[str, Field(min_length=1, max_length=LONGEST_LABEL)]
"""Name of a class, as it stands in the data."""


class Record(BaseModel):
    """A frozen record; an unknown field is an error, and the text under a field is its description."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    def changed(self, **changes: Any) -> Self:
        """A copy with other values of some fields.

        Raises: pydantic.ValidationError: a value does not fit its field.
        """
        return type(self).model_validate(self.model_dump() | changes)


class EncoderRef(Record):
    """Which encoder, exactly."""

    name: str
    """As the config names it: a Hub id, a folder, or ``package:<name>``."""
    public_name: PublicName
    """The name that others can load it by; never a local path."""
    revision: EncoderRevision
    """A commit of the Hub, or ``sha256:…`` of the weights for a folder or a package."""


class Runtime(Record):
    """How the numbers are computed: chosen once per run, because each field can change the last bits of a weight."""

    device: Literal["cpu", "cuda"]
    dtype: Literal["float32", "bfloat16"]
    """Of the frozen encoder; adapters, head and optimiser are always float32."""
    attention: Literal["eager", "sdpa", "lorafleet"]
    """Of the encoder; ``lorafleet`` is ``pipeline/encoder/attention.py``."""
    compiled: bool
    """Whether ``torch.compile`` compiles the encoder."""
    kernels: Literal["lorafleet", "torch"]
    """Whose linear layers and shared inputs the encoder uses. A compiler and an exporter can follow PyTorch's only."""
    threads: int = Field(ge=1)
    """Torch threads of one worker."""
    processor: str
    """The instruction set or GPU the choice was made for."""

    @model_validator(mode="before")
    @classmethod
    def _older_versions_named_no_kernels(cls, values: Any) -> Any:
        if not isinstance(values, dict) or "kernels" in values:
            return values
        return values | {"kernels": "torch" if values.get("compiled") else "lorafleet"}


class CarvedTest(Record):
    """The part of train that becomes test where the data have no test split of their own."""

    fraction: float = Field(gt=0, lt=0.5)
    """Share of each label."""
    seed: int = Field(ge=0)


def _renamed_source(source: object) -> object:
    return "files" if source == "parquet" else source  # as earlier versions wrote it


class MtebTask(Record):
    """One classification data set and where it comes from, resolved from the config."""

    name: TaskName
    source: Annotated[Literal["hub", "mirror", "files", "package"], BeforeValidator(_renamed_source)]
    location: str
    """Hub data set, mirror folder, the user's training files, or package name."""
    test_location: str | None = None
    """The user's test files. None for other sources, and where ``test_split`` says which part of train becomes test."""
    test_split: CarvedTest | None = None
    revision: DataRevision
    """A commit, a package version, or ``sha256:…`` of the files once they have been read."""
    subset: str = "default"
    text_column: str = "text"
    label_column: str = "label"
    group_column: str | None = None
    """Texts with the same value in this column stay on one side of every split."""
    max_epochs: int = Field(ge=1)
    samples_per_label: int = Field(ge=1)
    """Texts per label in each of mteb's few-shot draws."""


class Probe(Record):
    """What an adapter says of some texts, to tell on any machine whether its files still are that adapter."""

    texts: tuple[str, ...] = Field(min_length=1)
    logits: tuple[tuple[float, ...], ...]
    """(texts, classes), with encoder and adapter in float32."""
    tolerance: float = Field(gt=0, le=0.01)
    """Largest difference of a logit that another machine may show."""

    @model_validator(mode="after")
    def _is_a_table(self) -> Self:
        if len(self.logits) != len(self.texts) or len({len(row) for row in self.logits}) != 1:
            raise ValueError("logits: expected one row per text, all of the same length")
        return self


class LabelNames(RootModel[Annotated[tuple[LabelName, ...], FailFast(), Field(min_length=2, max_length=100_000)]]):
    """The content of ``labels.json``: label names in the order of the head's outputs."""

    model_config = ConfigDict(frozen=True)

    @model_validator(mode="after")
    def _no_name_twice(self) -> Self:
        name, count = Counter(self.root).most_common(1)[0]
        if count > 1:
            raise ValueError(f"{name!r:.200} is there {count} times")
        return self


class EncoderName(Record):
    """Which encoder an adapter was trained on."""

    name: PublicName
    revision: EncoderRevision


class AdapterMeta(Record):
    """The content of ``meta.json``, as far as an adapter is loaded by it; it also tells how the adapter was trained."""

    model_config = ConfigDict(extra="ignore")

    num_classes: int
    label_names: Annotated[tuple[LabelName, ...], FailFast(), Field(max_length=100_000)]
    rank: int
    alpha: float
    dropout: float
    pooling: Literal["mean", "cls", "max"]
    max_tokens: int
    hidden_size: int
    encoder: EncoderName
    adapted_modules: Annotated[tuple[ModulePath, ...], FailFast(), Field(min_length=1, max_length=10_000)]
    """Paths of the linear layers that have a pair, in the order of the pairs."""
    task: TaskName | None = None
    """The MTEB task; none where the adapter was saved by itself."""
    learnt_validation: bool = False
    """Whether it, or an adapter that it started from, was trained on its validation slice too (``train.refit``)."""


class FewShotDraw(BaseModel):
    """mteb's scores of one few-shot draw, as far as they are read here."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    accuracy: Unit
    f1: Unit
    """Macro-F1."""
    ap: Unit | None = None
    """Average precision; only for two classes."""


class FewShotScores(FewShotDraw):
    """mteb's scores of one subset, each the mean over the draws, as far as they are read here."""

    main_score: Unit
    """The one of them that mteb compares models by."""
    hf_subset: str
    scores_per_experiment: tuple[FewShotDraw, ...] = ()
    """One per draw."""


class FewShotResult(BaseModel):
    """mteb's ``TaskResult``, as far as it is read here."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    task_name: TaskName
    scores: dict[Literal["test"], tuple[FewShotScores, ...]]


class FewShot(RootModel[dict[FewShotColumn, FewShotResult]]):
    """The content of ``few_shot.json``: mteb's own results of the few-shot columns."""

    model_config = ConfigDict(frozen=True)


class JsonObject(RootModel[dict[str, Any]]):
    """Any JSON object, of another library's making."""

    model_config = ConfigDict(frozen=True)


class AdapterRef(Record):
    """A trained adapter on disk."""

    path: str
    sha256: Sha256
    """Of ``adapter_model.safetensors`` and ``head.safetensors``, in that order."""
    encoder_revision: EncoderRevision


class EpochRow(Record):
    """One pass over the training texts."""

    epoch: int = Field(ge=1)
    train_loss: float
    validation_accuracy: Unit | None = None
    """On the split that selects the epoch. None in a refit, and where another number than accuracy selects."""
    validation_score: float | None = Field(default=None, exclude_if=lambda value: value is None)
    """The number that selects the epoch, where it is not accuracy."""
    learning_rate: float
    """At the end of the epoch."""
    texts_per_second: float
    """Training texts / seconds inside the training loop of this epoch."""
    tokens_per_second: float
    seconds: float
    """Of the training loop; validation and checkpoint not included."""
    peak_memory_bytes: int
    is_best: bool


class Progress(Record):
    """How far a training is."""

    epoch: int
    max_epochs: int
    step: int
    """Of this epoch."""
    num_steps: int
    """Of each epoch."""
    train_loss: float
    """Of the last step."""
    texts_per_second: float
    """Of this epoch so far."""


class LogLine(Record):
    """A line of a worker's log, on its way to the flow run's."""

    level: int
    """As Python's ``logging`` numbers it."""
    text: str


class ScoreRow(Record):
    """One column of the score table for one MTEB task, with all that is needed to make it again."""

    run_id: RunId
    mteb_task: TaskName
    subset: str
    split: Literal["test"] = "test"
    column: Column
    accuracy: Unit
    macro_f1: Unit
    average_precision: Unit | None
    """Only for two classes. From probabilities for the full-data probe and the head; from labels, as mteb has it, for few-shot columns."""
    low: Unit
    high: Unit
    """Ends of the 95 % interval of the accuracy: over the draws for few-shot, over the test texts otherwise."""
    num_texts: int
    num_classes: int
    num_overlap: int
    """Test texts that also occur in train."""
    accuracy_without_overlap: Unit | None
    """None where it was not measured apart (few-shot columns with overlap) or no text is left."""
    num_truncated: int
    """Test texts cut at ``max_tokens``."""
    selected_on: SelectedOn | None
    """What chose the epoch; none for columns of the frozen encoder, which has none (the probe's C is always chosen apart from test)."""
    seconds: float
    encoder: str
    encoder_revision: EncoderRevision
    dataset_revision: DataRevision
    adapter_sha256: Sha256 | None
    seed: int
    dtype: str
    device: str
    versions: str
    """JSON object: library -> version."""
    created_at: datetime
    p_value: Unit | None = None
    """McNemar's exact test against ``frozen_full_data`` on the same test texts; only in the ``head`` row."""
    p_value_holm: Unit | None = None
    """The same, corrected over the run's MTEB tasks."""
    reused_from: RunId | None = None
    """The run that computed this row, if not this one."""
    test_sha256: str | None = None
    """Of the texts and labels of test, in whatever order: where two differ, the scores are of different exams. None in older rows."""
    samples_per_label: int | None = None
    """Training texts per label in each few-shot draw: with another number the scores cannot be compared. None in the other columns' rows,
    like the three below in all but the ``head`` row, and all four in older rows."""
    main_metric: MainMetric | None = None
    """The score by which the head is judged against ``frozen_full_data``."""
    p_value_main: Unit | None = None
    """The paired test of the two on the main metric: ``p_value``, or for macro-F1 a randomisation test."""
    p_value_main_holm: Unit | None = None
    """The same, corrected over the run's MTEB tasks."""


class ValueRow(Record):
    """One number that was measured: one row of ``values.parquet``."""

    run_id: RunId
    mteb_task: TaskName
    split: Literal["test"] = "test"
    column: Column
    metric: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_@]{0,63}$")]
    """Name of the metric, such as ``accuracy``."""
    width: int | None = Field(default=None, ge=1)
    """Dimensions of the text vectors that were used. None: all of them."""
    slice: str | None = Field(default=None, min_length=1, max_length=128)
    """Property that the texts of this row share, such as ``in_train``. None: all texts."""
    slice_value: str | None = Field(default=None, max_length=1024)
    """Value of that property."""
    value: float
    low: float | None = None
    """Ends of the 95 % interval, over the draws for few-shot columns and over the test texts otherwise. None: not computed."""
    high: float | None = None
    num_texts: int = Field(ge=1)
    main: bool
    """Whether this is the metric that the MTEB task is judged by."""


class CoverageRow(Record):
    """Accuracy if texts below a confidence are left without a label."""

    threshold: Unit
    coverage: Unit
    """Share of the texts that keep their label."""
    accuracy: Unit | None
    """None where no text is left."""
    num_texts: int | None = Field(default=None, ge=0)
    """Texts that keep their label; None in tables of older versions, like ``low``."""
    low: Unit | None = None
    """Lower end of a 95 % interval of the accuracy; those of all rows of a table hold together. 0 where no text is left."""


class ReliabilityBin(Record):
    """One bar of the calibration plot."""

    confidence: Unit
    """Mean probability of the predicted label in this bin."""
    accuracy: Unit
    num_texts: int


class Calibration(Record):
    """How far the head's probabilities can be believed. Fitted on validation, measured on test."""

    temperature: float = Field(ge=0.01, le=100)
    fitted_on: Literal["validation", "none"]
    """``none``: there was no validation slice left to fit on, and the temperature is 1."""
    error_before: Unit
    """Expected calibration error on test, 15 bins, temperature 1."""
    error_after: Unit
    coverage: tuple[CoverageRow, ...]
    """On validation (on test where ``fitted_on`` is ``none``), so that a threshold can be chosen without reading test."""
    reliability: tuple[ReliabilityBin, ...]
    """On test, after temperature."""


class Confusion(Record):
    """A pair of labels that the head takes for each other on test."""

    label: str
    predicted: str
    num_texts: int
    num_of_label: int


class DataSummary(Record):
    """What was read, before anything was learnt from it."""

    num_train: int
    num_validation: int
    num_test: int
    label_names: tuple[str, ...]
    num_overlap: int
    num_empty_train: int
    num_empty_test: int
    num_truncated_train: int
    num_truncated_test: int
    fingerprint: str
    """sha256 over the texts and labels of all splits, in order."""
    notes: tuple[str, ...]
    """What is lawful but thin: classes too small for a validation slice, labels that test lacks, …"""
    label_counts: tuple[int, ...] = ()
    """Training texts per label, in the order of ``label_names``; empty in results of older versions, like the two below."""
    token_quantiles: tuple[int, ...] = ()
    """Tokens per training text, cut at ``max_tokens``: the 10th, 50th and 90th percentile, each the length of some text."""
    test_fingerprint: str | None = None
    """As ``ScoreRow.test_sha256``."""


class LabelShare(Record):
    """How frequent a label is."""

    label: str
    share: Unit
    """Of the training texts."""


class MtebTaskRow(Record):
    """What one MTEB task's data and work were in one run: one row of ``mteb_tasks.parquet``."""

    run_id: str
    mteb_task: str
    created_at: datetime
    """When the run collected it, also where it was taken over from an earlier run."""
    num_train: int
    """Less the validation slice."""
    num_validation: int
    num_test: int
    num_classes: int
    label_shares: tuple[LabelShare, ...]
    """Of train; empty where an older version read the data."""
    tokens_p10: int | None
    """Percentiles of the tokens per training text, cut at ``max_tokens``."""
    tokens_p50: int | None
    tokens_p90: int | None
    num_truncated_train: int
    """Texts of train and validation cut at ``max_tokens``."""
    num_overlap: int
    fingerprint: str
    """sha256 over the texts and labels of all splits."""
    test_sha256: str | None
    worker_seconds: float
    """Time in which this run's worker computed; 0 where the MTEB task was taken over from an earlier run."""
    gpu_seconds: float
    """``worker_seconds`` times the worker's share of a GPU."""
    peak_memory_bytes: int
    """Of the training, whichever run it was part of."""
    reused_from: str | None


class Comparison(Record):
    """The head against the full-data probe on the same test texts."""

    only_head: int
    """Texts that only the head gets right."""
    only_probe: int
    p_value: Unit
    """McNemar's exact test, two-sided."""
    main_metric: MainMetric = "accuracy"
    """The score by which the two are judged."""
    macro_f1_gain: float | None = None
    """How much higher the head's macro-F1 is. None where accuracy is the main metric, like the next."""
    macro_f1_p_value: Unit | None = None
    """Paired randomisation test of this difference, two-sided."""

    @property
    def gain(self) -> float:
        """Positive where the head is better by the main metric, negative where the probe is."""
        return self.macro_f1_gain if self.macro_f1_gain is not None else self.only_head - self.only_probe

    @property
    def main_p_value(self) -> float:
        """The p-value of the test on the main metric."""
        return self.macro_f1_p_value if self.macro_f1_p_value is not None else self.p_value


class WarmStart(Record):
    """The published adapter that a training went on from."""

    sha256: Sha256


class TaskResult(Record):
    """Everything a run knows of one MTEB task. Written last into its folder: with it the task is finished."""

    mteb_task: MtebTask
    key: Key
    """Hash of all that the weights and scores depend on; equal keys need no second run."""
    run_id: RunId
    data: DataSummary
    encoder: EncoderRef
    runtime: Runtime
    adapter: AdapterRef
    num_lora_parameters: int
    num_head_parameters: int
    merge_difference: float
    """Largest absolute difference between embeddings of the merged and the unmerged adapter, over 32 test texts."""
    probe_c: float
    """Inverse regularisation of the full-data probe, chosen on validation."""
    epochs: tuple[EpochRow, ...]
    best_epoch: int = Field(ge=0)
    """0: every epoch was below the start, so the adapter is its start: the probe's head (or a random one) and pairs without effect, or the
    published adapter of a warm start."""
    start_accuracy: Unit | None = None
    """Accuracy of the start on the split that selects the epoch.

    None where there is no such split, where the start was refitted on an earlier slice, and in results of older versions. Another published
    adapter may have been trained on a few of these texts: most, but not all of a slice stays the same while the data grow."""
    selected_on: SelectedOn
    refitted: bool
    warm_start: WarmStart | None = None
    """None for a training from scratch."""
    scores: tuple[ScoreRow, ...]
    values: tuple[ValueRow, ...] = ()
    """Every measured number. Empty in results of older versions, whose numbers are in ``scores`` only."""
    comparison: Comparison | None
    """None where one of the two columns was switched off."""
    calibration: Calibration | None
    """None for an adapter without a head."""
    confusions: tuple[Confusion, ...]
    """The most frequent ones, at most ten."""
    busy_seconds: float
    """Time in which the worker computed for this MTEB task."""
    reused_from: RunId | None = None

    @property
    def has_head(self) -> bool:
        """Whether the adapter can classify."""
        return self.num_head_parameters > 0

    @model_validator(mode="before")
    @classmethod
    def _older_versions_kept_the_start_elsewhere(cls, values: Any) -> Any:
        start = values.get("warm_start") if isinstance(values, dict) else None
        if not isinstance(start, dict) or "validation_accuracy" not in start:
            return values
        accuracy = {"start_accuracy": start["validation_accuracy"]}
        return accuracy | values | {"warm_start": {k: v for k, v in start.items() if k != "validation_accuracy"}}


class Failure(Record):
    """An MTEB task that did not finish; the others did not care."""

    mteb_task: str
    stage: str
    reason: str
    """One line for the person who started the run."""
    user_fault: bool = False
    """True where the input was wrong, so that trying again cannot help."""


class ResultsEntry(Record):
    """One MTEB task in ``classification_results.json``; accuracies 0..1."""

    task: TaskName
    num_classes: int
    baseline_accuracy: float | None
    """mteb's few-shot protocol on the frozen encoder."""
    lora_accuracy: float | None
    """The same on the adapted encoder."""
    delta: float | None
    full_data_probe_accuracy: float | None
    head_accuracy: float | None
    majority_accuracy: float | None
    epochs: int
    best_epoch: int
    """0: no epoch was as good as the start."""
    selected_on: SelectedOn
    p_value_holm: float | None
    num_test: int
    num_overlap: int
    adapter_sha256: Sha256
    reused_from: RunId | None
    samples_per_label: int | None = None
    """Training texts per label in mteb's few-shot draws; None in files of older versions, like all that follows."""
    full_data_probe_macro_f1: float | None = None
    head_macro_f1: float | None = None
    main_metric: MainMetric | None = None
    """The score by which the head is judged against the full-data probe."""
    p_value_main: float | None = None
    """Of the paired test on the main metric, as it is."""
    p_value_main_holm: float | None = None
    """Corrected over the run's MTEB tasks."""


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


class Publication(Record):
    """The content of ``publication.json``: what a published repository consists of."""

    run_id: RunId
    """The run that was published last; adapters that it did not bring stay."""
    lorafleet_version: str
    encoder: EncoderRef
    adapters: dict[TaskName, Sha256]
    """MTEB task -> sha256 of its adapter."""
    files: dict[FilePath, Sha256]
    """Path -> sha256 of every published file but this one."""


Decision = Literal["promote", "keep", "block"]
"""What becomes of a newly trained adapter: it takes the published one's place, that one stays, or it stays and somebody should look."""


class GateDecision(Record):
    """The published adapter of one MTEB task against the newly trained one, on the latter's test texts."""

    run_id: str
    mteb_task: str
    to: str
    """The folder or repository that was published to."""
    decision: Decision
    reason: str
    published_accuracy: Unit | None
    """None where nothing was compared: nothing was published yet, or the labels differ."""
    candidate_accuracy: Unit | None
    difference: float | None
    low: float | None
    """Ends of the 95 % interval of the difference, from a paired bootstrap over the test texts."""
    high: float | None
    p_value: Unit | None
    """McNemar's exact test, two-sided."""
    num_texts: int | None
    published_sha256: str | None
    candidate_sha256: str
    published_revision: str | None
    """Commit of the repository; none for a folder."""
    created_at: datetime
