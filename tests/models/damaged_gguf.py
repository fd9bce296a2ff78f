"""GGUF files of tiny models with one thing wrong each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Tensors = dict[str, np.ndarray]

METADATA: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"llama.logit_scale": 0.5}, "llama.logit_scale=0.5 is not understood"),
    ("llama", {"llama.expert_count": 8, "llama.expert_used_count": 2}, r"llama.expert_count=8 .*\(2 such keys"),
    ("llama", {"clip.has_vision_encoder": True}, "clip.has_vision_encoder=True"),
    ("llama", {"tokenizer.ggml.normalizer": "nfkc"}, "tokenizer.ggml.normalizer='nfkc' is not understood"),
    ("llama", {"general.type": "adapter"}, "general.type is 'adapter'"),
    ("llama", {"split.count": 3}, "one of 3 parts"),
    ("llama", {"llama.rope.dimension_count": 16}, "rotates a part of a head"),
    ("phi3", {"phi3.rope.dimension_count": 128}, "dimension_count=128: a head of 16"),
    ("phi3", {"phi3.rope.dimension_count": 3}, "dimension_count=3: a head of 16"),
    ("phi3", {"phi3.rope.dimension_count": 0}, "dimension_count=0: a head of 16"),
    ("llama", {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}, "type=yarn"),
    ("llama", {"llama.rope.scaling.factor": 4.0}, "factor 4.0"),
    ("llama", {"llama.rope.scaling.attn_factor": 1.5}, "attn_factor=1.5"),
    ("llama", {"llama.rope.freq_base_swa": 1e4}, "freq_base_swa"),
    ("llama", {"llama.attention.value_length": 16}, "keys of 32 numbers and values of 16"),
    ("llama", {"llama.attention.head_count_kv": 3}, "4 heads cannot share 3 keys"),
    ("llama", {"llama.attention.head_count_kv": [2, 1]}, "differs between layers"),
    ("llama", {"llama.feed_forward_length": [96, 64]}, "the same for all layers"),
    ("llama", {"llama.block_count": None}, "llama.block_count=None"),
    ("llama", {"llama.vocab_size": 100}, "counts 100 tokens, token_embd.weight 272"),
    ("llama", {"llama.attention.sliding_window": 128}, "sliding_window=128 is not understood"),
    (
        "llama3-scaled",
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0},
        "rope_freqs.weight with",
    ),
    ("qwen2", {"qwen2.attention.key_length": 32, "qwen2.attention.value_length": 32}, "key_length=32"),
    ("gemma3", {"gemma3.attention.sliding_window": None}, "states no gemma3.attention.sliding_window"),
    ("gemma3", {"gemma3.attention.sliding_window_pattern": [True, False]}, "2 entries for 7 layers"),
    ("phi3-longrope", {"phi3.rope.scaling.attn_factor": 1.0}, "attn_factor=1.0 is not the"),
]
"""Tiny model, metadata entries changed, and what the refusal says."""


def without(*stems: str) -> Callable[[Tensors], None]:
    """Tensors left out whose names hold one of ``stems``."""

    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if any(stem in name for stem in stems)]:
            del tensors[name]

    return change


def with_one_more(tensors: Tensors) -> None:
    """A tensor that Llama does not have."""
    tensors["blk.0.attn_sinks.weight"] = np.zeros(4, dtype=np.float32)


def renamed(tensors: Tensors) -> None:
    """One kind of tensors under another name."""
    for name in list(tensors):
        tensors[name.replace("ffn_up", "ffn_upp")] = tensors.pop(name)


def misshaped(tensors: Tensors) -> None:
    """One tensor with fewer inputs."""
    tensors["blk.1.ffn_down.weight"] = tensors["blk.1.ffn_down.weight"][:, :64].copy()


def third_layer(tensors: Tensors) -> None:
    """One layer more than the metadata say."""
    for name in [name for name in tensors if name.startswith("blk.1.")]:
        tensors[name.replace("blk.1.", "blk.2.")] = tensors[name]


TENSORS: list[tuple[Callable[[Tensors], None], str]] = [
    (without("blk.1.ffn_down"), r"1 tensor is missing \(blk\.1\.ffn_down\.weight\)"),
    (without("norm"), r"5 tensors are missing \(.*, …\)"),
    (with_one_more, r"1 tensor is not part of the model \(blk\.0\.attn_sinks\.weight\)"),
    (renamed, r"2 tensors are missing .*; 2 tensors are not part of the model \(blk\.0\.ffn_upp"),
    (misshaped, r"of another shape than the model's \(blk\.1\.ffn_down\.weight \(\[64, 64\] for \[64, 96\]\)\)"),
    (without("blk.1."), "holds 1 layers, its metadata say 2"),
    (third_layer, "holds 3 layers, its metadata say 2"),
    (without("token_embd"), r"token_embd\.weight is missing"),
]
"""Change of a tiny Llama's tensors, and what the refusal says."""
