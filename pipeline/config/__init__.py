"""The configuration of a run: one section per concern, a default for every key, and one function that reads it."""

from pipeline.config.compare import ArmName, CompareConfig, ComparisonConfig, MapMethod
from pipeline.config.loading import (
    absolute,
    load_config,
    load_config_of,
    preset_names,
    publish_config,
    select_task,
    select_tasks,
    validate_config,
    with_absolute_paths,
)
from pipeline.config.mteb_task import MtebTaskConfig
from pipeline.config.search import SearchConfig, SearchedConfig
from pipeline.config.sections import (
    ALL_COLUMNS,
    AdapterConfig,
    ComputeConfig,
    DataConfig,
    EncoderConfig,
    EvaluateConfig,
    GateConfig,
    PublishConfig,
    RunConfig,
    TrainConfig,
)
from pipeline.config.values import CpuShare, GpuShare, Section, like, without_repeats

__all__ = [
    "ALL_COLUMNS",
    "AdapterConfig",
    "ArmName",
    "CompareConfig",
    "ComparisonConfig",
    "ComputeConfig",
    "CpuShare",
    "DataConfig",
    "EncoderConfig",
    "EvaluateConfig",
    "GateConfig",
    "GpuShare",
    "MapMethod",
    "MtebTaskConfig",
    "PublishConfig",
    "RunConfig",
    "SearchConfig",
    "SearchedConfig",
    "Section",
    "TrainConfig",
    "absolute",
    "like",
    "load_config",
    "load_config_of",
    "preset_names",
    "publish_config",
    "select_task",
    "select_tasks",
    "validate_config",
    "with_absolute_paths",
    "without_repeats",
]
