"""The configuration of ``lorafleet search``: a run's configuration, and what is tried."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, Strict, model_validator

from pipeline.config.sections import AdapterConfig, Layers, RunConfig, TrainConfig, Widths
from pipeline.config.values import NON_REPEATING, Section
from pipeline.records import Loss

_Rate = Annotated[float, Field(gt=0, le=1)]
_Some = Field(max_length=32)


class SearchConfig(Section):
    """What a search tries, and how long."""

    trials: int = Field(default=12, ge=2, le=10_000)
    """Number of trials. The first is the configuration as it is."""
    minutes: float | None = Field(default=None, gt=0, le=525_600)
    """No trial starts after so many minutes. Default: no limit."""
    learning_rate: Annotated[tuple[_Rate, _Rate], Strict(False)] | None = None
    """Smallest and largest ``train.learning_rate``, with the configured one between them.

    Default: a quarter of the configured one, and four times it. If both are the configured one, no other is tried."""
    rank: Annotated[tuple[Annotated[int, Field(ge=1, le=256)], ...], _Some, *NON_REPEATING] = (4, 8, 16)
    """Values of ``adapter.rank``. ``adapter.alpha`` is scaled with it, so that updates keep their size."""
    target: Annotated[tuple[Literal["attention", "query-value", "all-linear"], ...], _Some, *NON_REPEATING] = ()
    """Values of ``adapter.target``."""
    layers: Annotated[tuple[Layers, ...], _Some, *NON_REPEATING] = ()
    """Values of ``adapter.layers``."""
    max_epochs: Annotated[tuple[Annotated[int, Field(ge=1, le=10_000)], ...], _Some, *NON_REPEATING] = ()
    """Numbers of epochs."""
    loss: Annotated[tuple[Loss, ...], _Some, *NON_REPEATING] = ()
    """Values of the data set's ``loss``."""
    widths: Annotated[tuple[Widths, ...], _Some, *NON_REPEATING] = ()
    """Values of ``train.widths``."""
    label_smoothing: Annotated[tuple[Annotated[float, Field(ge=0, lt=1)], ...], _Some, *NON_REPEATING] = ()
    """Values of ``train.label_smoothing``."""

    @model_validator(mode="after")
    def _range_is_a_range(self) -> SearchConfig:
        if self.learning_rate is not None and self.learning_rate[0] > self.learning_rate[1]:
            low, high = self.learning_rate
            raise ValueError(f"learning_rate: expected the smaller number first, found {low:g} and {high:g}")
        return self


Choices = dict[str, tuple[Any, ...]]
"""Name of a setting -> its values."""


class SearchedConfig(RunConfig):
    """The whole configuration of ``lorafleet search``."""

    search: SearchConfig = SearchConfig()

    @property
    def rates(self) -> tuple[float, float]:
        """Smallest and largest learning rate."""
        rate = self.train.learning_rate
        return self.search.learning_rate or (rate / 4, min(1.0, 4 * rate))

    @property
    def choices(self) -> Choices:
        """The settings besides the learning rate that have several values. The configured value is one of them."""
        own = self.own_values
        found = {name: tuple(dict.fromkeys((own[name], *getattr(self.search, name)))) for name in own}
        return {name: values for name, values in found.items() if len(values) > 1}

    @property
    def own_values(self) -> dict[str, Any]:
        """The configured value of each setting besides the learning rate."""
        entry = self.mteb_tasks[0]
        return {
            "rank": self.adapter.rank,
            "target": self.adapter.target,
            "layers": self.adapter.layers,
            "max_epochs": entry.max_epochs or self.train.max_epochs,
            "loss": entry.loss,
            "widths": self.train.widths,
            "label_smoothing": self.train.label_smoothing,
        }

    def with_values(self, learning_rate: float, values: dict[str, Any]) -> RunConfig:
        """The configuration of a run with other values of some settings."""
        own = self.own_values
        chosen = own | values
        of_entry = {name: chosen[name] for name in ("loss", "max_epochs") if chosen[name] != own[name]}
        adapter = self.adapter.changed(**{name: chosen[name] for name in ("target", "layers")})
        scale = self.adapter.alpha / self.adapter.rank
        return RunConfig.model_validate(
            {name: getattr(self, name) for name in RunConfig.model_fields}
            | {
                "adapter": AdapterConfig.model_validate(
                    adapter.model_dump() | {"rank": chosen["rank"], "alpha": scale * chosen["rank"]}
                ),
                "train": TrainConfig.model_validate(
                    self.train.model_dump()
                    | {"learning_rate": learning_rate}
                    | {name: chosen[name] for name in ("widths", "label_smoothing")}
                ),
                "mteb_tasks": [self.mteb_tasks[0].changed(**of_entry)],
            }
        )

    @model_validator(mode="after")
    def _alpha_stays_lawful(self) -> SearchedConfig:
        largest = max((self.adapter.rank, *self.search.rank))
        if (alpha := self.adapter.alpha / self.adapter.rank * largest) > 1e6:
            raise ValueError(
                f"search.rank: with rank {largest}, adapter.alpha would be {alpha:g}; expected at most 1e+06, lower "
                "adapter.alpha"
            )
        return self

    @model_validator(mode="after")
    def _own_rate_is_tried(self) -> SearchedConfig:
        (low, high), own = self.rates, self.train.learning_rate
        if not low <= own <= high:
            raise ValueError(
                f"search.learning_rate: expected a range that holds train.learning_rate = {own:g}, "
                f"found {low:g} to {high:g}; change one of the two"
            )
        return self

    @model_validator(mode="after")
    def _can_choose(self) -> SearchedConfig:
        if self.train.early_stopping_split == "test":
            raise ValueError('train.early_stopping_split = "test" would choose a trial on test; leave it out')
        if self.train.refit:
            raise ValueError("train.refit has no effect on a search, which compares what validation sees; leave it out")
        if self.train.warm_start is not None:
            raise ValueError("train.warm_start has no effect: every trial starts from the encoder; leave it out")
        if self.publish.to is not None:
            raise ValueError("publish.to has no effect: search publishes nothing; leave it out")
        return self
