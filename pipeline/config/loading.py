"""Reading a config: presets, TOML files, overrides and validation."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from pipeline.config.compare import ComparisonConfig
from pipeline.config.messages import describe_faults
from pipeline.config.overrides import apply_overrides
from pipeline.config.search import SearchedConfig
from pipeline.config.sections import GateConfig, PublishConfig, RunConfig
from pipeline.config.values import TARGET, TARGET_IN_WORDS
from pipeline.documents import check_values, parse_toml, read_text
from pipeline.errors import ConfigError
from pipeline.hub_address import is_on_hub

_Config = TypeVar("_Config", bound=RunConfig)
_OF_OTHER_COMMANDS = (
    *(ComparisonConfig.model_fields.keys() - RunConfig.model_fields.keys()),
    *(SearchedConfig.model_fields.keys() - RunConfig.model_fields.keys()),
)


def load_config(source: str, *, overrides: tuple[str, ...] = ()) -> RunConfig:
    """Read the config of a run. Sections of other commands, such as ``[compare]``, are left to those.

    Args, Raises: as ``load_config_of``.
    """
    return load_config_of(RunConfig, source, overrides=overrides)


def load_config_of(kind: type[_Config], source: str, *, overrides: tuple[str, ...] = ()) -> _Config:
    """Read a preset or a TOML file, apply ``KEY=VALUE`` overrides, and validate.

    Args:
        kind: Config of the command.
        source: Name of a preset, or path of a file. A preset is a file in ``pipeline/presets/`` without its ending.
        overrides: Assignments to dotted keys, such as ``train.seed=7``. A value that is not TOML is a string.
    Raises: ConfigError: the preset or file does not exist or is not TOML, a key is unknown or has no effect, or a value
        is invalid.
    """
    text, origin = _read_source(source)
    values = parse_toml(text, origin=origin)
    values = {key: value for key, value in values.items() if key not in _OF_OTHER_COMMANDS or key in kind.model_fields}
    apply_overrides(values, overrides)
    origin = f"{origin} with --set" if overrides else origin
    config = _validate(values, origin, kind)
    if without_effect := _without_effect(config, values, overrides):
        raise ConfigError(*(f"{origin}: {key} has no effect: {why}; leave it out" for key, why in without_effect))
    return config


def validate_config(values: dict[str, Any], origin: str) -> RunConfig:
    """Validate raw values of the config of a run.

    Args:
        values: Parsed TOML.
        origin: Name of the values, for messages.
    Raises: ConfigError: the values are invalid. The message has one line per fault.
    """
    return _validate(values, origin, RunConfig)


def _validate(values: dict[str, Any], origin: str, kind: type[_Config]) -> _Config:
    check_values(values, origin=origin)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        lines = describe_faults(error.errors(include_url=False), kind)
        raise ConfigError(f"{origin}: {lines[0]}", *lines[1:]) from None


def with_absolute_paths(config: _Config) -> _Config:
    """Return the config with absolute paths, because a worker has another working folder than the driver."""
    values = config.model_dump(mode="json")
    entries = [*values["mteb_tasks"], *values.get("compare", {}).get("forgetting", ())]
    files = [(part, name) for part in entries for name in _FILES]
    for part, name in ((values["data"], "mirror"), (values["publish"], "to"), (values["train"], "warm_start"), *files):
        if part[name] is not None and not is_on_hub(part[name]):
            part[name] = absolute(part[name])
    if Path(config.encoder.name).is_dir():
        values["encoder"]["name"] = str(Path(config.encoder.name).resolve())
    return type(config).model_validate(values)


_FILES = ("train", "test", "validation", "corpus", "qrels")  # keys of an MTEB task that name files


def absolute(location: str) -> str:
    """Return a path as an absolute path; leave a URL unchanged."""
    path = location.removeprefix("file://")
    if path.startswith("~/"):
        path = f"{Path.home()}{path[1:]}"
    return path if "://" in path else os.path.realpath(path)  # Path.resolve fails on a loop of links


def select_tasks(config: _Config, *, mteb_tasks: Sequence[str] | None, publish: bool) -> _Config:
    """Return the config with some of its MTEB tasks only, and optionally without publication.

    Args:
        config: The whole config.
        mteb_tasks: Names of the tasks to keep; None or empty for all.
        publish: Whether to keep ``publish.to``.
    Raises: ConfigError: the config has no such MTEB task.
    """
    names = [t.name for t in config.mteb_tasks]
    if unknown := [name for name in mteb_tasks or () if name not in names]:
        raise ConfigError(f"mteb_tasks: {', '.join(unknown)} is not in the config; it has {', '.join(names)}")
    values = config.model_dump(mode="json")
    if mteb_tasks:
        values["mteb_tasks"] = [t for t in values["mteb_tasks"] if t["name"] in mteb_tasks]
    if not publish:
        values["publish"]["to"] = None
    return type(config).model_validate(values)


def select_task(config: _Config, name: str | None, *, command: str) -> _Config:
    """Return the config with one of its MTEB tasks.

    Args:
        config: The whole config.
        name: Name of the task. None: its only one.
        command: Command that takes a single task, for the message.
    Raises: ConfigError: the config has no such task, or several.
    """
    config = select_tasks(config, mteb_tasks=[name] if name else None, publish=True)
    if len(config.mteb_tasks) > 1:
        names = ", ".join(t.name for t in config.mteb_tasks)
        raise ConfigError(
            f"{command} takes one data set, found {len(config.mteb_tasks)}: {names}; choose with --task NAME"
        )
    return config


def publish_config(config: RunConfig, *, to: str, private: bool, overrides: tuple[str, ...]) -> PublishConfig:
    """Return the publish section of a finished run's config, with the changes that ``lorafleet publish`` requests.

    Args:
        config: Config of the run.
        to: Target.
        private: Whether a new repository is private. False keeps the config's value.
        overrides: ``KEY=VALUE`` assignments to keys of ``publish``.
    Raises: ConfigError: a key is unknown, outside ``publish`` or without effect, or a value is invalid.
    """
    if re.fullmatch(TARGET, to) is None:
        raise ConfigError(f"--to: expected {TARGET_IN_WORDS}, found {to!r}")
    values = config.model_dump(mode="json", exclude_none=True)
    values["publish"] |= {"to": to} | ({"private": True} if private else {})
    for override in overrides:
        key = override.partition("=")[0].strip()
        if not key.startswith("publish."):
            raise ConfigError(f"--set {override}: only keys of [publish] have an effect on a finished run")
        if key == "publish.to":
            raise ConfigError(f"--set {override}: --to already names the target; leave this out")
    apply_overrides(values, overrides)
    publish = validate_config(values, "lorafleet publish").publish
    if publish.private and not is_on_hub(to):
        raise ConfigError(
            f"--private, or publish.private = true, has no effect on the folder {to}: only a repository is private"
        )
    return publish


def preset_names() -> list[str]:
    """Return the names of lorafleet's presets, sorted."""
    folder = resources.files("pipeline") / "presets"
    return sorted(Path(f.name).stem for f in folder.iterdir() if f.name.endswith(".toml"))


def _read_source(source: str) -> tuple[str, str]:
    if source in preset_names():
        file = resources.files("pipeline") / "presets" / f"{source}.toml"
        return file.read_text(encoding="utf-8"), f"preset {source}"
    path = Path(source)
    try:
        return read_text(path), str(path)
    except ConfigError as error:
        raise ConfigError(
            f"config {source!r} is neither a preset ({', '.join(preset_names())}) nor a readable file: {error}"
        ) from None


def _without_effect(config: RunConfig, values: dict[str, Any], overrides: tuple[str, ...]) -> list[tuple[str, str]]:
    """Return the keys that are set but have no effect because of other keys, each with the reason."""
    train, gate, to = config.train, config.publish.gate, config.publish.to
    rules: list[tuple[str, bool, str]] = [
        (
            "train.validation_fraction",
            train.early_stopping_split == "test",
            'early_stopping_split = "test" holds nothing out',
        ),
        ("compute.retry_delay_seconds", config.compute.retries == 0, "compute.retries = 0"),
        ("data.mirror", all(t.train for t in config.mteb_tasks), "every MTEB task names its own files"),
        (
            "publish.private",
            config.publish.private and to is not None and not is_on_hub(to),
            "publish.to is a folder",
        ),
        ("publish.token_block", to is not None and not is_on_hub(to), "publish.to is a folder"),
        *(
            (f"publish.gate.{key}", not gate.enabled, "publish.gate.enabled = false")
            for key in GateConfig.model_fields
            if key != "enabled"
        ),
    ]
    idle = [(key, why) for key, is_idle, why in rules if is_idle and _is_given(values, key)]
    # In a file, the key may be the default for tasks that are added later, so only --set is refused.
    if all(t.max_epochs for t in config.mteb_tasks) and any(
        o.partition("=")[0].strip() == "train.max_epochs" for o in overrides
    ):
        idle.append(("train.max_epochs", "every MTEB task sets its own (mteb_tasks.NAME.max_epochs)"))
    return idle


def _is_given(values: dict[str, Any], key: str) -> bool:
    node: Any = values
    for part in key.split("."):
        if not isinstance(node, dict) or part not in node:
            return False
        node = node[part]
    return True
