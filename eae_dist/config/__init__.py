"""The configuration: `schema` defines every setting; `loading` reads settings from files and command lines."""

from eae_dist.config.loading import (
    changed_keys,
    find_config,
    flatten,
    help_text,
    is_assignment,
    load_config,
    override,
    read_config,
    save_config,
    split_arguments,
)
from eae_dist.config.schema import (
    HOW_TO_START,
    WHERE_DATA_LIES,
    Config,
    DataConfig,
    EvaluateConfig,
    IndexConfig,
    ModelConfig,
    ObjectiveConfig,
    TrainConfig,
)

__all__ = [
    "HOW_TO_START",
    "WHERE_DATA_LIES",
    "Config",
    "DataConfig",
    "EvaluateConfig",
    "IndexConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "TrainConfig",
    "changed_keys",
    "find_config",
    "flatten",
    "help_text",
    "is_assignment",
    "load_config",
    "override",
    "read_config",
    "save_config",
    "split_arguments",
]
