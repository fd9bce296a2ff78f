"""A model without memory: the names and shapes that a configuration describes."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel


def skeleton(config: PretrainedConfig) -> PreTrainedModel:
    """The model of a configuration on the meta device; nothing is read, and the global RNG is left alone."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model
