"""Typed schema of the Hydra configuration and its validation before any long work."""

from usllm.config.schema import (
    AllocationConfig,
    DataConfig,
    EvalConfig,
    EvaluationConfig,
    HarnessConfig,
    TrainConfig,
)
from usllm.config.validation import (
    check_eval,
    check_train,
    compressor_of,
    evaluation_of_run,
    plain_config,
    section_of,
    sketch_config,
    sketch_config_of,
)

__all__ = [
    "AllocationConfig",
    "DataConfig",
    "EvalConfig",
    "EvaluationConfig",
    "HarnessConfig",
    "TrainConfig",
    "check_eval",
    "check_train",
    "compressor_of",
    "evaluation_of_run",
    "plain_config",
    "section_of",
    "sketch_config",
    "sketch_config_of",
]
