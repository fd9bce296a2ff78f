"""What patterns cover is counted by hand, and what they leave out is named."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import AutoConfig, PreTrainedModel

from usllm.compress import DEFAULT_PATTERNS, swap_linears_
from usllm.compress.coverage import coverage
from usllm.models.random_model import random_model
from usllm.models.skeleton import skeleton

ATTENTION = 2 * (64 * 64 * 2 + 2 * 32 * 64)  # two layers: queries and outputs, keys and values
FEED_FORWARD = 2 * 3 * 96 * 64


def described(model_type: str, **settings: Any) -> PreTrainedModel:
    sizes = {"vocab_size": 264, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    return skeleton(AutoConfig.for_model(model_type, **(sizes | heads | settings)))


def test_head_and_embedding_are_not_counted() -> None:
    covered = coverage(described("llama", tie_word_embeddings=False), DEFAULT_PATTERNS)
    assert covered.linear_weights == ATTENTION + FEED_FORWARD
    assert covered.compressed_weights == ATTENTION + FEED_FORWARD - 2 * 64 * 64
    assert covered.left_out == {"o_proj": (2, 2 * 64 * 64)}


def test_share_is_the_same_before_and_after_surgery() -> None:
    model = random_model("llama")
    before = coverage(model, DEFAULT_PATTERNS)
    swap_linears_(model, DEFAULT_PATTERNS)
    assert coverage(model, DEFAULT_PATTERNS) == before


def test_pattern_that_matches_nothing_is_named() -> None:
    covered = coverage(described("llama"), [*DEFAULT_PATTERNS, "o_proj", "gate_prj"])
    assert covered.warnings() == ["model.patterns: gate_prj matched no layer of this model"]


def test_fused_projections_are_covered_and_their_parts_are_not_missed() -> None:
    model = described("phi3")
    covered = coverage(model, [*DEFAULT_PATTERNS, "o_proj"])
    assert (covered.share, covered.layers, covered.warnings()) == (1.0, 8, [])
    assert sum(layer.in_features for layer in swap_linears_(model, ["qkv_proj", "gate_up_proj"]).values()) == 4 * 64


def test_less_than_nine_tenths_is_warned_about_with_the_names_and_the_way_out() -> None:
    (warning,) = coverage(described("llama"), ["up_proj", "gate_proj", "down_proj"]).warnings()
    assert "only 60.0%" in warning
    assert "q_proj (2 x)" in warning
    assert "Add to model.patterns: q_proj, o_proj, k_proj, v_proj" in warning
    assert coverage(described("llama"), [*DEFAULT_PATTERNS, "o_proj"]).warnings() == []


@pytest.mark.parametrize("three", [True, False])
def test_experts_in_one_parameter_are_named_as_left_out(three: bool) -> None:
    model = described("llama")
    model.model.layers[0].register_parameter(
        "experts", torch.nn.Parameter(torch.empty(8, 64, 64, device="meta") if three else torch.empty(8, device="meta"))
    )
    covered = coverage(model, [*DEFAULT_PATTERNS, "o_proj"])
    assert ("0.experts [8, 64, 64]" in covered.left_out) == three
    assert bool(covered.warnings()) == three
    if three:
        assert "Nothing more can be compressed" in covered.warnings()[0]


def test_layers_that_were_compressed_are_counted_whatever_the_patterns_say() -> None:
    names = {"model.layers.0.mlp.up_proj"}
    covered = coverage(described("llama"), DEFAULT_PATTERNS, names)
    assert (covered.layers, covered.compressed_weights) == (1, 96 * 64)


def test_facts_are_plain() -> None:
    plain = coverage(described("llama"), ["q_proj"]).to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["share"] == pytest.approx(2 * 64 * 64 / (ATTENTION + FEED_FORWARD))
