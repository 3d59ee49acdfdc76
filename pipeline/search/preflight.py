"""Checks of a search before its first trial."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from pipeline.adapter.targets import projection_paths
from pipeline.config import RunConfig, SearchedConfig
from pipeline.config.messages import describe_faults
from pipeline.data.catalogue import plan_task
from pipeline.data.families import check_train_keys, check_widths
from pipeline.encoder.files import find_encoder
from pipeline.encoder.loading import empty_model
from pipeline.errors import ConfigError, DataError, InputError
from pipeline.pairs.reading import read_task
from pipeline.records import MtebTask, Runtime
from pipeline.run.preflight import preflight
from pipeline.search.trials import SearchPlan


def preflight_search(config: SearchedConfig, runtime: Runtime, *, runs: str) -> SearchPlan:
    """Read the data, and check the encoder and every value that may be tried.

    Args:
        config: Config with absolute paths and one data set.
        runtime: Runtime of the workers.
        runs: Run store.
    Raises: InputError: a check failed. The error has one line per fault.
    """
    low, high = config.rates
    if not config.choices and low == high:
        raise ConfigError("search: nothing is searched; give several values of a key of [search]")
    own = config.with_values(config.train.learning_rate, {})
    plan = preflight(own, runtime)
    (planned,) = plan.tasks
    if not planned.num_validation:
        raise DataError(
            f"{planned.mteb_task.name}: there are no validation examples, so no trial can be chosen; "
            "give validation files, or a larger train.validation_fraction"
        )
    check_train_keys([planned.mteb_task], own.train)  # a run of the best settings would refuse it
    _check_values(config, planned.mteb_task)
    return SearchPlan(
        config=SearchedConfig.model_validate(
            {name: getattr(config, name) for name in SearchedConfig.model_fields} | {"encoder": plan.config.encoder}
        ),
        encoder=plan.encoder,
        runtime=runtime,
        mteb_task=planned.mteb_task,
        fingerprint=planned.fingerprint,
        num_validation=planned.num_validation,
        runs=runs,
        notes=planned.notes,
    )


def _check_values(config: SearchedConfig, planned: MtebTask) -> None:
    """Raises: ConfigError: the encoder or the data do not allow a value."""
    model: Any = empty_model(find_encoder(config.encoder, offline=config.data.offline), config.encoder)
    faults = []
    for name, values in config.choices.items():
        for value in values:
            try:
                one = config.with_values(config.train.learning_rate, {name: value})
                _check_value(name, one, planned, model)
            except InputError as error:
                faults.append(f"search.{name}: {error}")
            except ValidationError as error:
                faults += [f"search.{name} = {value}: {line}" for line in describe_faults(error.errors(), RunConfig)]
    if faults:
        raise ConfigError(*faults)


def _check_value(name: str, config: RunConfig, planned: MtebTask, model: Any) -> None:
    if name in ("rank", "target", "layers"):
        projection_paths(model, config.adapter, model_type=model.config.model_type)
    if name in ("widths", "label_smoothing"):
        check_train_keys([planned], config.train)
    if name == "widths":
        check_widths(config.train.widths, hidden_size=int(model.config.hidden_size))
    if name in ("loss", "widths"):
        task = plan_task(config.mteb_tasks[0], data=config.data, default_epochs=config.train.max_epochs)
        read_task(task, config=config.train, offline=config.data.offline)
