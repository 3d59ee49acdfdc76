"""The plan of a comparison, and the job of each arm. Both are plain data, so the driver does not import torch."""

from __future__ import annotations

from typing import Literal

from pipeline.config import AdapterConfig, ComparisonConfig, RunConfig
from pipeline.records import EncoderRef, Key, MtebTask, Record, RunId, Runtime
from pipeline.run.plan import JobSpec

ArmKind = Literal["frozen", "full", "linear", "lora"]
"""What an arm trains. All variants of LoRA are of one kind."""


class ArmSpec(Record):
    """Complete description of the job of an arm."""

    arm: str
    """Name of the arm."""
    key: Key
    """Hash of everything that the arm's files depend on."""
    run_id: RunId
    """Comparison that the arm is made for."""
    store: str
    """Folder of the comparisons."""
    config: ComparisonConfig
    """Config with the encoder's resolved revision."""
    jobs: tuple[JobSpec, ...]
    """Job of each seed, in the order of ``compare.seeds``. Their keys are those of the data and of the frozen encoder.

    Arms share what is computed for such a key."""
    forgetting: tuple[MtebTask, ...]
    """Other data sets to measure on, with resolved revisions."""

    @property
    def kind(self) -> ArmKind:
        """What the arm trains."""
        return kind_of_arm(self.arm)

    @property
    def mteb_task(self) -> MtebTask:
        """The data set that is learnt."""
        return self.jobs[0].mteb_task

    @property
    def runtime(self) -> Runtime:
        """Runtime of the worker."""
        return self.jobs[0].runtime


class ComparisonPlan(Record):
    """A checked comparison that can start."""

    config: ComparisonConfig
    encoder: EncoderRef
    runtime: Runtime
    mteb_task: MtebTask
    """The data set, with resolved revision."""
    arms: tuple[ArmSpec, ...]
    notes: tuple[str, ...]
    """Warnings about the data."""


def kind_of_arm(arm: str) -> ArmKind:
    """What an arm trains, from its name."""
    kinds: dict[str, ArmKind] = {"frozen": "frozen", "full": "full", "linear": "linear"}
    return kinds.get(arm, "lora")


def folder_of_arm(arm: str) -> str:
    """Name of an arm's folder."""
    return arm.replace(":", "-")


def adapter_of_arm(arm: str, adapter: AdapterConfig) -> AdapterConfig:
    """Configuration of the adapter that an arm trains, from the configured one."""
    if arm.startswith("last:"):
        return adapter.changed(layers=arm)
    _, _, target = arm.partition(":")
    return adapter.changed(target=target) if target else adapter


def run_config(config: ComparisonConfig, arm: str, *, seed: int, learning_rate: float | None = None) -> RunConfig:
    """Configuration of one training of an arm."""
    values = {name: getattr(config, name) for name in RunConfig.model_fields}
    rate = {} if learning_rate is None else {"learning_rate": learning_rate}
    return RunConfig.model_validate(
        values
        | {
            "adapter": adapter_of_arm(arm, config.adapter),
            "train": config.train.changed(seed=seed, **rate),
            # The head starts from the probe, and mteb's few-shot protocol is no part of a comparison.
            "evaluate": config.evaluate.changed(columns=("frozen_full_data", "head")),
        }
    )
