"""Run configuration: small YAML files, dotted overrides; strict, checked before using a device."""

from dapo_jax.config.checks import ConfigError, check_context, check_model, printable
from dapo_jax.config.load import (
    config_from_dict,
    dump_yaml,
    load_config,
    merge,
    open_regular,
    read_mapping,
    read_text,
)
from dapo_jax.config.schema import (
    DAPO_TEMPLATE,
    Architecture,
    ArithmeticConfig,
    ColumnsConfig,
    Config,
    DapoSection,
    DataSection,
    EvalSection,
    EvalSet,
    Experts,
    LoraConfig,
    MeshSection,
    ModelConfig,
    ModelSection,
    OptimSection,
    RewardSection,
    RolloutSection,
    RopeScaling,
    SupervisedSection,
    TrainSection,
    TrainSet,
    Windows,
    flatten,
    to_dict,
)
