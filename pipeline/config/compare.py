"""The configuration of ``lorafleet compare``: a run's configuration, and what is compared."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Strict, model_validator

from pipeline.config.mteb_task import MtebTaskConfig
from pipeline.config.sections import RunConfig
from pipeline.config.values import NON_REPEATING, Section, like

ARM = r"frozen|full|linear|lora(:query-value|:all-linear)?|last:[1-9][0-9]{0,3}"
_ARMS_IN_WORDS = "frozen, full, linear, lora, lora:query-value, lora:all-linear, or last:K"
MapMethod = Literal["t-sne", "umap"]
"""Method that draws vectors in two dimensions."""

ArmName = Annotated[str, like(ARM, _ARMS_IN_WORDS)]
"""Name of an arm: a way to use or to train the encoder."""

_Rate = Annotated[float, Field(gt=0, le=1)]
_Rates = Annotated[tuple[_Rate, ...], Field(min_length=1, max_length=32), *NON_REPEATING]

_FACTORS = {"full": (0.01, 0.02, 0.05, 0.1), "linear": (0.3, 1.0, 3.0, 10.0)}
_LORA_FACTORS = (0.25, 0.5, 1.0, 2.0)


class CompareConfig(Section):
    """The arms of a comparison, and how often each is trained."""

    arms: Annotated[tuple[ArmName, ...], Field(min_length=2), *NON_REPEATING] = (
        *("frozen", "full", "lora", "lora:query-value", "lora:all-linear", "last:2", "linear"),
    )
    """Arms to compare.

    ``frozen`` trains nothing, ``full`` every weight of the encoder, ``linear`` a matrix on the frozen vectors. ``lora``
    is the configured adapter, and ``lora:query-value``, ``lora:all-linear`` and ``last:K`` have other layers."""
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, lt=2**32)], ...], Field(min_length=1), *NON_REPEATING] = (0, 1, 2)
    """Seeds that each arm is trained with, in place of ``train.seed``. The first chooses the learning rate."""
    learning_rates: dict[ArmName, _Rates] = Field(default_factory=dict)
    """Learning rates to choose from on validation, by arm. Every arm needs as many.

    Default: four multiples of ``train.learning_rate``: 0.01 to 0.1 for ``full``, 0.3 to 10 for ``linear``, 0.25 to 2
    for LoRA."""
    forgetting: Annotated[tuple[MtebTaskConfig, ...], Strict(False)] = ()
    """Other data sets, on which every arm is measured without learning from them, in the form of ``mteb_tasks``."""
    map: MapMethod = "t-sne"
    """Method of the maps in the report. ``umap`` needs ``pip install 'lorafleet[umap]'``."""

    @model_validator(mode="after")
    def _has_frozen(self) -> CompareConfig:
        if "frozen" not in self.arms:
            raise ValueError('arms must contain "frozen", which every other arm is compared with')
        return self

    @model_validator(mode="after")
    def _rates_have_an_effect(self) -> CompareConfig:
        if idle := sorted(set(self.learning_rates) - (set(self.arms) - {"frozen"})):
            raise ValueError(f"learning_rates names {', '.join(idle)}, which is no trained arm of arms")
        return self


class ComparisonConfig(RunConfig):
    """The whole configuration of ``lorafleet compare``."""

    compare: CompareConfig = CompareConfig()

    def rates(self, arm: str) -> tuple[float, ...]:
        """Learning rates of an arm, smallest first. Empty for ``frozen``."""
        if arm == "frozen":
            return ()
        given = self.compare.learning_rates.get(arm)
        factors = _FACTORS.get(arm, _LORA_FACTORS)
        return tuple(sorted(given or (float(f"{factor * self.train.learning_rate:.3g}") for factor in factors)))

    @model_validator(mode="after")
    def _arms_are_treated_alike(self) -> ComparisonConfig:
        rates = {arm: self.rates(arm) for arm in self.compare.arms if arm != "frozen"}
        if len({len(of_arm) for of_arm in rates.values()}) > 1:
            counts = ", ".join(f"{arm} {len(of_arm)}" for arm, of_arm in rates.items())
            raise ValueError(f"compare.learning_rates: every arm needs as many learning rates, found {counts}")
        if (above := max((rate for of_arm in rates.values() for rate in of_arm), default=0.0)) > 1:
            raise ValueError(f"compare.learning_rates: {above:g} is above 1; lower train.learning_rate")
        return self

    @model_validator(mode="after")
    def _one_data_set(self) -> ComparisonConfig:
        if self.publish.to is not None:
            raise ValueError("publish.to has no effect: compare publishes nothing; leave it out")
        if self.train.warm_start is not None:
            raise ValueError("train.warm_start has no effect: every arm starts from the encoder; leave it out")
        names = [t.name for t in (*self.mteb_tasks, *self.compare.forgetting)]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"compare.forgetting: the name {', '.join(twice)} is already taken; choose another")
        return self
