"""Small configurations of many model families, and what two versions of transformers understand of them.

As a program it writes the file of the installed version: ``python model_families.py tests/fixtures/meaning``.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from usllm.packed.meaning import meaning_of
from usllm.packed.rotary import older_rope

STORED = Path(__file__).parents[1] / "fixtures" / "meaning"
_SIZES = {
    "vocab_size": 264,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "head_dim": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LONG = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]}
_GEMMA3 = {"sliding_window": 32, "sliding_window_pattern": 2, "rope_theta": 1e6, "rope_local_base_freq": 2e4}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, llama3": {"rope_theta": 5e5, "rope_scaling": _LLAMA3 | {"original_max_position_embeddings": 128}},
    "llama, yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}},
    "llama, dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    "mistral": {"sliding_window": 64},
    "qwen2": {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 2},
    "qwen3": {"rope_theta": 1e6},
    "gemma": {},
    "gemma2": {"sliding_window": 32, "query_pre_attn_scalar": 32, "final_logit_softcapping": 20.0},
    "gemma3_text": _GEMMA3,
    "gemma3_text, linear": _GEMMA3 | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    "phi": {"partial_rotary_factor": 0.25, "num_key_value_heads": 4},
    "phi3": {"partial_rotary_factor": 0.5},
    "phi3, longrope": {"original_max_position_embeddings": 128, "rope_scaling": _LONG},
    "gpt_neox": {"rotary_pct": 0.25},
    "stablelm": {"partial_rotary_factor": 0.25},
    "nemotron": {"partial_rotary_factor": 0.5},
    "glm": {"partial_rotary_factor": 0.5},
    "olmo2": {},
    "cohere2": {"sliding_window": 32, "logit_scale": 0.125},
    "granite": {"embedding_multiplier": 12.0, "logits_scaling": 8.0, "residual_multiplier": 0.22},
    "starcoder2": {"sliding_window": 32},
    "smollm3": {},
    "falcon": {"ffn_hidden_size": 96, "rope_theta": 2e4},
}


def config_of(family: str) -> dict[str, Any]:
    """Content of the ``config.json`` that an export with the installed transformers writes."""
    kind = family.partition(",")[0]
    sizes = {key: value for key, value in _SIZES.items() if (kind, key) != ("falcon", "head_dim")}
    config: PretrainedConfig = AutoConfig.for_model(kind, **(sizes | FAMILIES[family]))
    content: dict[str, Any] = json.loads(config.to_json_string())
    return older_rope(content) | content


def understood(content: dict[str, Any]) -> PreTrainedModel:
    """The model that the installed transformers makes of a ``config.json``, without memory."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(content))
        config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


if __name__ == "__main__":
    described = {}
    for name in FAMILIES:
        content = config_of(name)
        described[name] = {"config": content, "meaning": meaning_of(understood(content))}
    Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in described.items())
    (Path(sys.argv[1]) / f"{transformers.__version__}.json").write_text(f"{{\n{lines}\n}}\n")
