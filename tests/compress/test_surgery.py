"""Surgery on whole models: what is swapped, what survives, how bits are shared out, and how plans are restored."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from usllm.compress import (
    DEFAULT_PATTERNS,
    CompressedLinear,
    allocate_,
    compress_,
    compressed_layers,
    compression_report,
    load_plans_,
    reproject_,
    save_plans,
    swap_linears_,
)
from usllm.models.random_model import random_model
from usllm.sketch import SketchConfig
from usllm.system.errors import UserError

CONFIG = SketchConfig(bits_per_weight=2.0, rows=2, group_size=32)
ARCHITECTURES = ("llama", "qwen2", "qwen3")


def model_of(architecture: str) -> nn.Module:
    """A random model whose biases, where it has any, are not zero."""
    model = random_model(architecture).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(generator=generator)
    return model


def uneven_importance(layers: Iterable[CompressedLinear]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {layer.name: torch.rand(layer.in_features, generator=generator) + 0.1 for layer in layers}


def logits(model: nn.Module) -> Tensor:
    ids = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        result: Tensor = model(input_ids=ids, use_cache=False).logits
    return result


def linears_of(sizes: dict[str, tuple[int, int]]) -> nn.Module:
    """Layers without a bias, ``(out, in)`` by name, under names that the default patterns do not match."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.ModuleDict({name: nn.Linear(i, o, bias=False) for name, (o, i) in sizes.items()})


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_only_the_named_linears_are_swapped(architecture: str) -> None:
    model = model_of(architecture)
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    compress_(model, CONFIG)
    left = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    fused = {"qkv_proj", "gate_up_proj"}  # the other form of the same projections
    assert {name.rpartition(".")[2] for name in linears - left} == set(DEFAULT_PATTERNS) - fused
    assert {name.rpartition(".")[2] for name in left} == {"o_proj", "lm_head"}
    assert set(compressed_layers(model)) == linears - left


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compressed_model_is_the_dense_one_at_its_decoded_weights(architecture: str) -> None:
    # Grouped-query attention, biases and norms are all in the logits.
    model, reference = model_of(architecture), model_of(architecture)
    dense = logits(model)
    compress_(model, CONFIG)
    with torch.no_grad():
        for name, layer in compressed_layers(model).items():
            reference.get_submodule(name).weight.copy_(layer.decoded_weight())
    assert torch.equal(logits(model), logits(reference))
    assert not torch.equal(logits(model), dense)


def test_swapped_model_without_plans_computes_as_before() -> None:
    model = model_of("qwen2")
    dense = logits(model)
    swap_linears_(model)
    assert torch.equal(logits(model), dense)


def test_biases_are_the_same_parameters_afterwards() -> None:
    model = model_of("qwen2")
    biases = {name: parameter for name, parameter in model.named_parameters() if name.endswith("bias")}
    assert len(biases) == 6  # q, k and v of two layers
    compress_(model, CONFIG)
    after = dict(model.named_parameters())
    assert all(after[name] is bias for name, bias in biases.items())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tied_embeddings_stay_tied_and_learn_together(architecture: str) -> None:
    model = model_of(architecture)
    compress_(model, CONFIG)
    embedding, head = model.get_submodule("model.embed_tokens"), model.get_submodule("lm_head")
    assert embedding.weight is head.weight
    parameters = list(model.parameters())
    assert len(parameters) == len({id(parameter) for parameter in parameters})
    ids = torch.randint(0, 256, (2, 9))
    model(input_ids=ids, labels=ids).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert embedding.weight is head.weight
    assert all(layer.weight.grad is not None and layer.weight.grad.any() for layer in compressed_layers(model).values())


def test_gradients_of_a_model_do_not_change_with_gradient_checkpointing() -> None:
    gradients = []
    ids = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(4))
    for checkpointing in (False, True):
        model = model_of("llama").train()
        compress_(model, CONFIG)
        if checkpointing:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)(  # its newer name
                {"use_reentrant": False}
            )
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@pytest.mark.parametrize(
    ("pattern", "count"), [("q_proj", 2), ("*.layers.1.*", 7), ("model.layers.0.mlp.up_proj", 1), ("[kv]_proj", 4)]
)
def test_patterns_match_the_last_part_or_the_full_name(pattern: str, count: int) -> None:
    assert len(swap_linears_(model_of("llama"), [pattern])) == count


def test_model_without_a_match_is_refused_naming_its_linears() -> None:
    with pytest.raises(UserError) as raised:
        compress_(model_of("llama"), CONFIG, patterns=["c_attn"])
    message = str(raised.value)
    assert "model.patterns=['c_attn'] matches no linear layer of LlamaForCausalLM" in message
    assert "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj" in message


def test_tied_weight_is_refused_and_nothing_was_swapped() -> None:
    model = model_of("llama")
    with pytest.raises(UserError, match="matches lm_head, whose weight is tied"):
        compress_(model, CONFIG, patterns=["q_proj", "lm_head"])
    assert not compressed_layers(model)


def test_linear_under_two_names_is_refused() -> None:
    shared = nn.Linear(64, 64)
    with pytest.raises(UserError, match="tied"):
        swap_linears_(nn.ModuleDict({"a": shared, "b": shared}), ["*"])


def test_untied_head_may_be_sketched() -> None:
    model = model_of("llama")
    head = model.get_submodule("lm_head")
    head.weight = nn.Parameter(head.weight.detach().clone())  # type: ignore[assignment]
    assert "lm_head" in swap_linears_(model, ["lm_head"])


def test_missing_importance_is_refused_naming_a_layer() -> None:
    model = model_of("llama")
    layers = swap_linears_(model)
    importance = uneven_importance(layers.values())
    del importance["model.layers.0.mlp.up_proj"]
    with pytest.raises(UserError, match=r"no importance was measured for model\.layers\.0\.mlp\.up_proj"):
        allocate_(model, CONFIG, importance)


def test_rate_without_room_for_the_tables_is_refused_naming_the_layer() -> None:
    with pytest.raises(UserError, match=r"model\.layers\.0\.self_attn\.q_proj: 0\.01 bits per weight is too little"):
        compress_(model_of("llama"), SketchConfig(bits_per_weight=0.01))


def test_without_importance_all_channels_count_the_same() -> None:
    model, explicit = model_of("llama"), model_of("llama")
    compress_(model, CONFIG)
    ones = {name: torch.ones(layer.in_features) for name, layer in compressed_layers(model).items()}
    compress_(explicit, CONFIG, ones)
    for ours, theirs in zip(compressed_layers(model).values(), compressed_layers(explicit).values(), strict=True):
        assert torch.equal(ours.importance, torch.ones(ours.in_features))
        assert all(torch.equal(ours.states[name], theirs.states[name]) for name in theirs.states)


def test_importance_decides_which_channels_get_states() -> None:
    model = linears_of({"a": (512, 320)})
    importance = torch.where(torch.arange(320) < 32, 100.0, 0.01)
    compress_(model, SketchConfig(bits_per_weight=0.5, rows=1), {"a": importance}, ["a"])
    (layer,) = compressed_layers(model).values()
    assert torch.equal(layer.importance, importance)
    errors = (layer.decoded_weight() - layer.weight).square().sum(0) / layer.weight.square().sum(0)
    assert errors[:32].max() < 0.2 < 0.9 < errors[32:].min()


SIZES = {"a": (512, 320), "b": (640, 512), "c": (512, 320), "d": (320, 640)}


@pytest.mark.parametrize("budget", ["equal", "importance"])
@pytest.mark.parametrize("rate", [0.5, 2.0])
def test_layer_budgets_keep_the_model_s_total(budget: str, rate: float) -> None:
    model = linears_of(SIZES)
    levels = dict(zip(SIZES, (0.5, 1.0, 2.0, 1.5), strict=True))
    channels = {name: torch.logspace(-1, 1, shape[1]) for name, shape in SIZES.items()}
    importance = {name: levels[name] * values / values.mean() for name, values in channels.items()}
    report = compress_(model, SketchConfig(bits_per_weight=rate, layer_budget=budget), importance, ["?"])
    assert 0.98 * rate <= report.bits_per_weight <= rate
    rates = {layer.name: layer.bits_per_weight for layer in report.layers}
    if budget == "equal":
        assert all(0.98 * rate <= value <= rate for value in rates.values())
    else:  # in proportion to importance
        assert [rates[name] / rates["a"] for name in "bcd"] == pytest.approx([2, 4, 3], rel=0.03)


def test_reprojection_covers_every_layer() -> None:
    model = model_of("llama")
    compress_(model, CONFIG)
    with torch.no_grad():
        for layer in compressed_layers(model).values():
            layer.weight.copy_(layer.weight.roll(1, 0))
    changed = reproject_(model)
    assert list(changed) == list(compressed_layers(model))
    assert all(float(change.winner_change) > 0 for change in changed.values())
    assert all(float(change.winner_change) == 0 for change in reproject_(model).values())


@pytest.mark.parametrize("allocation", ["uniform", "proportional", "waterfill"])
def test_states_and_plans_survive_a_checkpoint(allocation: str, tmp_path: Path) -> None:
    config = SketchConfig(bits_per_weight=2.0, rows=2, group_size=32, allocation=allocation, output_scale=True)
    model = model_of("qwen2")
    layers = swap_linears_(model)
    allocate_(model, config, uneven_importance(layers.values()))
    with torch.no_grad():
        for layer in layers.values():
            layer.weight.mul_(1.5)  # states lag behind their latents, as between two projections
    torch.save({"plans": save_plans(model), "state_dict": model.state_dict()}, tmp_path / "file.ckpt")

    saved = torch.load(tmp_path / "file.ckpt", weights_only=True)
    restored = random_model("qwen2").eval()
    swap_linears_(restored)
    load_plans_(restored, saved["plans"], config)
    restored.load_state_dict(saved["state_dict"])
    assert torch.equal(logits(restored), logits(model))
    assert compression_report(restored) == compression_report(model)
    for ours, theirs in zip(compressed_layers(restored).values(), layers.values(), strict=True):
        assert all(torch.equal(ours.states[name], theirs.states[name]) for name in theirs.states)
    reproject_(model)
    reproject_(restored)
    assert torch.equal(logits(restored), logits(model))


def test_plans_take_under_half_a_percent_of_a_large_layer() -> None:
    model = linears_of({"a": (1024, 1024)})
    compress_(model, SketchConfig(bits_per_weight=0.5), {"a": torch.rand(1024)}, ["a"])
    size = sum(tensor.numel() * tensor.element_size() for tensor in save_plans(model)["a"].values())
    assert size < 0.005 * 1024 * 1024 * 2  # of the layer at 16 bits


def test_plans_of_another_model_are_refused_naming_a_layer() -> None:
    model = model_of("llama")
    compress_(model, CONFIG)
    plans = save_plans(model)
    other = model_of("llama")
    swap_linears_(other, ["q_proj"])
    with pytest.raises(UserError, match=r"first difference: model\.layers\.0\.mlp\.down_proj"):
        load_plans_(other, plans, CONFIG)


def test_checkpoint_from_before_calibration_leaves_the_model_dense() -> None:
    model = model_of("llama")
    swap_linears_(model)
    assert save_plans(model) == {}
    dense = logits(model)
    load_plans_(model, save_plans(copy.deepcopy(model)), CONFIG)
    assert torch.equal(logits(model), dense)
