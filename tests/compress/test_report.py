"""The report against figures worked out by hand."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from usllm.compress import compress_, compressed_layers, compression_report, swap_linears_
from usllm.compress.methods.sketch import SketchPlan
from usllm.models.random_model import random_model
from usllm.sketch import SketchConfig

CONFIG = SketchConfig(bits_per_weight=2.0, rows=2, group_size=32)
# random_model: width 64, inner width 160, two layers, 4 heads and 2 key-value heads of 16, 264 tokens, tied embeddings
COMPRESSED = 2 * (64 * 64 + 2 * 32 * 64 + 3 * 160 * 64)
OTHERS = 264 * 64 + 2 * (64 * 64 + 2 * 64) + 64  # embeddings once, output projections, norms


def test_bits_are_the_sum_of_the_plans() -> None:
    model = random_model("llama")
    report = compress_(model, CONFIG)
    plans = {name: layer.plan for name, layer in compressed_layers(model).items()}
    assert all(plan is not None for plan in plans.values())
    assert {layer.name: layer.bits for layer in report.layers} == {n: p.total_bits for n, p in plans.items() if p}
    assert report.total_bits == sum(plan.total_bits for plan in plans.values() if plan)
    assert report.bits_per_weight == report.total_bits / COMPRESSED
    for layer in report.layers:
        assert sum(layer.sections.values()) == layer.bits
        assert layer.bits_per_weight == layer.bits / (layer.shape[0] * layer.shape[1])


def test_model_rate_counts_tied_embeddings_once_at_16_bits() -> None:
    report = compress_(random_model("llama"), CONFIG)
    assert (report.compressed_weights, report.other_parameters) == (COMPRESSED, OTHERS)
    assert report.model_bits == report.total_bits + 16 * OTHERS
    assert report.model_bits_per_weight == report.model_bits / (COMPRESSED + OTHERS)
    assert report.model_bytes == report.model_bits // 8  # sections are whole bytes


def test_untied_head_is_counted_too() -> None:
    model = random_model("llama")
    head = model.get_submodule("lm_head")
    head.weight = nn.Parameter(head.weight.detach().clone())  # type: ignore[assignment]
    assert compress_(model, CONFIG).other_parameters == OTHERS + 264 * 64


def test_biases_are_counted_with_what_is_left_alone() -> None:
    assert compress_(random_model("qwen2"), CONFIG).other_parameters == OTHERS + 2 * (64 + 2 * 32)


def test_precision_in_memory_does_not_enter() -> None:
    # A bf16 model takes the same bytes on disk as an fp32 one: latents are no part of it.
    counts = []
    for dtype in (torch.float32, torch.bfloat16):
        report = compress_(random_model("llama").to(dtype), CONFIG)
        counts.append((report.total_bits, report.model_bits, report.model_bytes))
    assert counts[0] == counts[1]


def test_occupancy_and_load_are_those_of_the_plans() -> None:
    model = random_model("llama")
    report = compress_(model, CONFIG)
    for layer in report.layers:
        plan = compressed_layers(model)[layer.name].plan
        assert plan is not None
        assert isinstance(plan, SketchPlan)
        shown = tuple(layer.value(name) for name in ("load_min", "load_mean", "load_max"))
        assert (layer.value("states"), layer.value("occupancy"), shown) == (
            plan.num_states,
            plan.occupancy(),
            plan.load(),
        )


@pytest.mark.parametrize("trained", [False, True], ids=["", "output scales trained"])
def test_error_weighs_channels_by_importance(trained: bool) -> None:
    model = nn.ModuleDict({"a": nn.Linear(48, 64)})
    importance = torch.rand(48) + 0.1
    config = replace(CONFIG, output_scale=True, train_output_scale=True) if trained else CONFIG
    report = compress_(model, config, {"a": importance}, ["a"])
    (layer,) = compressed_layers(model).values()
    latent = layer.weight.detach().double()
    weighted = ((layer.decoded_weight() - latent).square() * importance).sum() / (latent.square() * importance).sum()
    assert report.layers[0].relative_error == pytest.approx(float(weighted), rel=1e-5)
    assert report.layers[0].importance == pytest.approx(float(importance.double().mean()))


def test_error_is_that_of_the_states_not_of_a_fresh_projection() -> None:
    model = random_model("llama")
    before = compress_(model, CONFIG)
    with torch.no_grad():
        for layer in compressed_layers(model).values():
            layer.weight.neg_()
    after = compression_report(model)
    assert all(new.relative_error > old.relative_error for new, old in zip(after.layers, before.layers, strict=True))


def test_variation_is_that_of_the_layers_rates() -> None:
    model = nn.ModuleDict({"a": nn.Linear(320, 512), "b": nn.Linear(320, 512)})
    config = SketchConfig(bits_per_weight=1.0, layer_budget="importance")
    report = compress_(model, config, {"a": torch.ones(320), "b": torch.full((320,), 3.0)}, ["?"])
    low, high = (layer.bits_per_weight for layer in report.layers)
    assert report.allocation_variation == pytest.approx((high - low) / (high + low))
    assert report.allocation_variation == pytest.approx(0.5, abs=0.02)


def test_report_is_json_with_every_total() -> None:
    report = compress_(random_model("llama"), CONFIG)
    read = json.loads(json.dumps(report.to_dict()))
    assert read["model_bits_per_weight"] == report.model_bits_per_weight
    assert read["model_bytes"] == report.model_bytes
    assert [layer["name"] for layer in read["layers"]] == [layer.name for layer in report.layers]


def test_model_without_plans_has_no_report() -> None:
    model = random_model("llama")
    swap_linears_(model)
    with pytest.raises(RuntimeError, match="has no plan"):
        compression_report(model)


def test_classes_are_said_in_words() -> None:
    model = random_model("llama")
    report = compress_(model, CONFIG)
    for layer in report.layers:
        plan = compressed_layers(model)[layer.name].plan
        assert isinstance(plan, SketchPlan)
        channels = plan.channel_class.bincount(minlength=len(plan.classes)).tolist()
        words = layer.value("classes")
        for choice, count in zip(plan.classes, channels, strict=True):
            said = f"{count} x ({choice.rows} row" if choice.rows else f"{count} empty"
            assert said in words
