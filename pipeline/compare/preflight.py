"""Checks of a comparison before its first arm starts."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

from pipeline.adapter.targets import projection_paths
from pipeline.compare.plan import ArmSpec, ComparisonPlan, adapter_of_arm, kind_of_arm, run_config
from pipeline.config import ComparisonConfig
from pipeline.data.catalogue import plan_task
from pipeline.encoder.files import find_encoder
from pipeline.encoder.loading import empty_model
from pipeline.errors import AdapterError, ConfigError, DataError, InputError
from pipeline.pairs.reading import read_task
from pipeline.records import MtebTask, Runtime
from pipeline.run.plan import Plan, PlannedTask, job_spec
from pipeline.run.preflight import preflight
from pipeline.store.key import library_versions, task_key

ARMS_JOB = "pipeline.compare.job"
"""Module of the job of an arm."""


def preflight_comparison(config: ComparisonConfig, runtime: Runtime, *, run_id: str, store: str) -> ComparisonPlan:
    """Read the data, and check the encoder and every arm.

    Args:
        config: Config with absolute paths.
        runtime: Runtime of the workers.
        run_id: Id of the comparison.
        store: Folder of the comparisons.
    Raises: InputError: a check failed. The error has one line per fault.
    """
    first = run_config(config, "lora", seed=config.compare.seeds[0])
    plan = preflight(first, runtime)
    config = ComparisonConfig.model_validate(
        {name: getattr(config, name) for name in ComparisonConfig.model_fields} | {"encoder": plan.config.encoder}
    )
    _check_arms(config)
    forgetting = _read_forgetting(config)
    arms = tuple(_arm_spec(config, arm, plan, forgetting, run_id=run_id, store=store) for arm in config.compare.arms)
    (planned,) = plan.tasks
    _check_validation(config, planned)
    return ComparisonPlan(
        config=config,
        encoder=plan.encoder,
        runtime=runtime,
        mteb_task=planned.mteb_task,
        arms=arms,
        notes=planned.notes,
    )


def _check_validation(config: ComparisonConfig, planned: PlannedTask) -> None:
    """Raises: DataError: learning rates are to be chosen, but no text can be spared to choose them on."""
    if not planned.num_validation and any(len(config.rates(arm)) > 1 for arm in config.compare.arms):
        raise DataError(
            f"{planned.mteb_task.name}: there are no validation examples, so no learning rate can be chosen; "
            f"give each arm a single one in compare.learning_rates, or {_where_validation_comes_from(config)}"
        )


def _where_validation_comes_from(config: ComparisonConfig) -> str:
    if config.train.early_stopping_split == "test":
        return 'leave out train.early_stopping_split = "test", which takes all of train for training'
    return "validation files or a larger train.validation_fraction"


def _check_arms(config: ComparisonConfig) -> None:
    model: Any = empty_model(find_encoder(config.encoder, offline=config.data.offline), config.encoder)
    faults = []
    if config.compare.map == "umap" and importlib.util.find_spec("umap") is None:
        faults.append("compare.map: umap is not installed here; pip install 'lorafleet[umap]', or choose t-sne")
    for arm in config.compare.arms:
        if kind_of_arm(arm) == "lora":
            try:
                projection_paths(model, adapter_of_arm(arm, config.adapter), model_type=model.config.model_type)
            except AdapterError as error:
                faults.append(f"compare.arms: {arm}: {error}")
    if faults:
        raise ConfigError(*faults)


def _read_forgetting(config: ComparisonConfig) -> list[tuple[MtebTask, str]]:
    """Each other data set and the hash of its data."""
    found, faults = [], []
    for entry in config.compare.forgetting:
        try:
            task = plan_task(entry, data=config.data, default_epochs=config.train.max_epochs)
            data = read_task(task, config=config.train, offline=config.data.offline)
            found.append((data.task, data.fingerprint))
        except InputError as error:
            faults += [f"compare.forgetting: {line}" for line in error.args]
    if faults:
        raise DataError(*faults)
    return found


def _arm_spec(
    config: ComparisonConfig, arm: str, plan: Plan, forgetting: list[tuple[MtebTask, str]], *, run_id: str, store: str
) -> ArmSpec:
    (planned,) = plan.tasks
    jobs = []
    for seed in config.compare.seeds:
        of_seed = run_config(config, arm, seed=seed)
        key = task_key(
            # The learning rate and the adapter change nothing that arms share.
            run_config(config, "lora", seed=seed),
            mteb_task=planned.mteb_task,
            fingerprint=planned.fingerprint,
            encoder=plan.encoder,
            runtime=plan.runtime,
            versions=library_versions(),
            job=ARMS_JOB,
        )
        spec = job_spec(plan, planned, run_id=run_id, runs=Path(store))
        jobs.append(spec.changed(config=of_seed, key=key, warm_start=None))
    facts = {
        "arm": arm,
        "adapter": adapter_of_arm(arm, config.adapter).model_dump(mode="json"),
        "rates": config.rates(arm),
        "jobs": [job.key for job in jobs],
        "epochs": planned.mteb_task.max_epochs,
        "forgetting": [(task.name, fingerprint) for task, fingerprint in forgetting],
    }
    return ArmSpec(
        arm=arm,
        key=hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32],
        run_id=run_id,
        store=str(Path(store)),
        config=config,
        jobs=tuple(jobs),
        forgetting=tuple(task for task, _ in forgetting),
    )
