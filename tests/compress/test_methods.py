"""What every compression method keeps, built in or plugged in: drawn from the registry."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from every_method import cases, compressor_of, planned, random, shapes
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from usllm.compress import (
    CompressedLinear,
    Statistics,
    allocate_,
    as_compressor,
    compress_,
    compressed_layers,
    load_plans_,
    save_plans,
    swap_linears_,
    to_section,
)
from usllm.compress.registry import from_section
from usllm.system.errors import PackedFormatError, UserError


@cases
@given(shape=shapes, seed=st.integers(0, 9))
@settings(max_examples=15, deadline=None)
def test_stored_layer_is_the_planned_one(name: str, options: dict[str, Any], shape: tuple[int, int], seed: int) -> None:
    compressor = compressor_of(name, options)
    plan, weight, statistics = planned(compressor, shape, seed)
    latents = plan.start(weight, statistics)
    encoded = plan.encode(latents, statistics.energy, decode_dtype=torch.float32)
    packed = plan.pack(encoded.states)
    least, most = compressor.byte_bounds(shape)
    assert packed.dtype == torch.uint8
    assert packed.device.type == "cpu"
    assert len(packed) * 8 == plan.total_bits == sum(plan.sections().values())
    assert least <= len(packed) <= most
    rate = compressor.options.bits_per_weight
    assert rate is None or plan.bits_per_weight <= rate
    assert compressor.least_bits(shape) <= plan.total_bits <= compressor.most_bits(shape)

    again = from_section(json.loads(json.dumps(to_section(compressor))))
    assert again == compressor
    read = again.read(packed, shape, "layer")
    restored = again.restore(plan.to_tensors(), shape, "layer")
    states = read.unpack(packed)
    for other, held in ((read, states), (restored, encoded.states)):
        assert torch.equal(other.decode(held), plan.decode(encoded.states))
        assert other.sections() == plan.sections()
        assert other.facts() == plan.facts()
        assert other.state_specs() == plan.state_specs()
        assert other.latent_specs() == plan.latent_specs()
    assert encoded.decoded is not None
    assert torch.equal(encoded.decoded, plan.decode(encoded.states))
    assert torch.equal(plan.decode_latents(latents, statistics.energy), plan.decode(encoded.states))


@cases
def test_latents_and_states_are_as_announced(name: str, options: dict[str, Any]) -> None:
    plan, weight, statistics = planned(compressor_of(name, options), (33, 41))
    latents = plan.start(weight, statistics)
    states = plan.encode(latents, statistics.energy).states
    for specs, tensors in ((plan.latent_specs(), latents), (plan.state_specs(), states)):
        assert {key: (tuple(t.shape), t.dtype) for key, t in tensors.items()} == {
            key: (spec.shape, spec.dtype) for key, spec in specs.items()
        }
    assert all(spec.dtype == torch.float32 for spec in plan.latent_specs().values())


@cases
def test_encode_tells_what_has_changed(name: str, options: dict[str, Any]) -> None:
    plan, weight, statistics = planned(compressor_of(name, options), (33, 41))
    latents = plan.start(weight, statistics)
    first = plan.encode(latents, statistics.energy)
    assert float(first.change) == 0
    same = plan.encode(latents, statistics.energy, before=first.states, memory=first.memory)
    assert float(same.change) == 0
    turned = {key: value.flip(0) for key, value in latents.items()}
    other = plan.encode(turned, statistics.energy, before=first.states, memory=first.memory)
    assert 0 < float(other.change) <= 1


class Model(nn.Module):
    """Two layers; one is compressed."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.up_proj, self.head = nn.Linear(41, 33), nn.Linear(33, 5)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.up_proj(x).tanh())
        return result


def compressed(name: str, options: dict[str, Any]) -> tuple[Model, CompressedLinear]:
    model = Model()
    compress_(model, compressor_of(name, options))
    return model, compressed_layers(model)["up_proj"]


@cases
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_product_of_a_packed_layer_is_that_of_training_bit_for_bit(
    name: str, options: dict[str, Any], precision: str
) -> None:
    _, layer = compressed(name, options)
    assert layer.plan is not None
    states = layer.plan.unpack(layer.plan.pack(layer.current_states()))
    x = random(3, 7, 41)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"), torch.no_grad():
        trained = layer(x)
        decoded = None
        if "cpu" in layer.plan.decodes_on:
            decoded = layer.plan.decode(states, torch.bfloat16 if precision == "bf16" else torch.float32)
        assert torch.equal(layer.plan.linear(x, states, {}, layer.bias, decoded=decoded), trained)
    assert trained.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)


@cases
@pytest.mark.parametrize("shape", [(33, 41), (130, 70)])
def test_codes_in_output_order_hold_the_same_weight(name: str, options: dict[str, Any], shape: tuple[int, int]) -> None:
    plan, weight, statistics = planned(compressor_of(name, options), shape)
    states = plan.encode(plan.start(weight, statistics), statistics.energy).states
    if plan.expanded_bytes() is None:
        with pytest.raises(NotImplementedError, match="no expanded layout"):
            plan.expand(states)
        return
    expanded = plan.expand(plan.unpack(plan.pack(states)))
    assert expanded.nbytes == plan.expanded_bytes()
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(expanded.weight(dtype), plan.decode(states, dtype))
    x, decoded = random(40, shape[1]), plan.decode(states)
    for tokens in (1, 40):
        torch.testing.assert_close(expanded.linear(x[:tokens]), x[:tokens] @ decoded.t(), rtol=1e-4, atol=1e-4)


@cases
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_latent_learns_and_the_loss_falls(name: str, options: dict[str, Any], precision: str) -> None:
    model, layer = compressed(name, options)
    optimizer = torch.optim.Adam(layer.parameters(), lr=3e-3)
    x, target = random(64, 41), random(64, 5, seed=2)
    losses = []
    for _ in range(30):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        gradients = [latent.grad for latent in layer.latents.values()]
        assert all(g is not None and g.dtype == torch.float32 and bool(g.isfinite().all()) for g in gradients)
        assert all(bool((g != 0).any()) for g in gradients if g is not None)
        optimizer.step()
        if layer.plan is not None and layer.plan.stored_states:
            layer.reproject()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


@cases
def test_continued_from_a_checkpoint_it_computes_the_same_bits(name: str, options: dict[str, Any]) -> None:
    model, layer = compressed(name, options)
    with torch.no_grad():
        for latent in layer.latents.values():
            latent.mul_(1.01)
    if layer.plan is not None and layer.plan.stored_states:
        layer.reproject()
    saved = copy.deepcopy({"plans": save_plans(model), "state_dict": model.state_dict()})
    other = Model()
    swap_linears_(other)
    load_plans_(other, saved["plans"], compressor_of(name, options))
    other.load_state_dict(saved["state_dict"])
    x = random(4, 41)
    assert torch.equal(other(x), model(x))
    for key, state in compressed_layers(other)["up_proj"].current_states().items():
        assert torch.equal(state, layer.current_states()[key])


@cases
def test_latents_lie_in_memory_as_restored_ones_do(name: str, options: dict[str, Any]) -> None:
    """Sums over columns round otherwise where a matrix lies by columns: a resumed run would get other gradients."""
    for shape in ((40, 24), (24, 40)):
        layer = CompressedLinear(nn.Linear(shape[1], shape[0]), "layer")
        plan, weight, statistics = planned(compressor_of(name, options), shape)
        layer.set_plan(plan, statistics.energy, plan.start(weight, statistics))
        assert all(latent.is_contiguous() for latent in layer.latents.values())


@cases
def test_plan_of_another_rate_takes_the_place_of_the_one_that_was_prepared(name: str, options: dict[str, Any]) -> None:
    """``fit(ckpt_path=…)`` prepares first and then restores: latents may have other shapes by then."""
    saved, _ = compressed(name, options)
    rate = {"bits": 2} if name == "rounding" else {"bits_per_weight": 2.5}
    model, _ = compressed(name, options | rate)
    load_plans_(model, save_plans(saved), compressor_of(name, options))
    model.load_state_dict(saved.state_dict())
    x = random(4, 41)
    assert torch.equal(model(x), saved(x))


@cases
def test_layer_that_was_started_is_started_again_only_where_its_weight_is_still_there(
    name: str, options: dict[str, Any]
) -> None:
    model, layer = compressed(name, options)
    if "weight" in layer.latents:
        before = layer.decoded_weight()
        allocate_(model, compressor_of(name, options))
        assert torch.equal(layer.decoded_weight(), before)
    else:
        with pytest.raises(RuntimeError, match="up_proj: its latents are"):
            allocate_(model, compressor_of(name, options))


@cases
def test_options_are_enough_to_find_the_method(name: str, options: dict[str, Any]) -> None:
    compressor = compressor_of(name, options)
    assert as_compressor(compressor.options) == compressor
    assert as_compressor(compressor) is compressor
    with pytest.raises(UserError, match=f"method {name}: was stored as version 99"):
        from_section(to_section(compressor) | {"version": 99})
    with pytest.raises(ValueError, match="surprise"):
        type(compressor).from_format({**compressor.format, "surprise": 1}, {})


@cases
def test_rate_of_no_bits_is_refused_before_anything_is_made(name: str, options: dict[str, Any]) -> None:
    compressor = compressor_of(name, options)
    with pytest.raises(ValueError, match=r"sketch\.bits_per_weight"):
        compressor.plan((33, 41), "layer", Statistics(torch.ones(41), torch.ones(41)), 8)


@cases
def test_every_byte_counts_or_is_checked(name: str, options: dict[str, Any]) -> None:
    """A layer with one bit flipped is refused, or it is another layer: no bit is without a meaning."""
    plan, weight, statistics = planned(compressor_of(name, options), (20, 21))
    states = plan.encode(plan.start(weight, statistics), statistics.energy).states
    packed, decoded = plan.pack(states), plan.decode(states)
    for byte in range(len(packed)):
        damaged = packed.clone()
        damaged[byte] ^= 1 << (byte % 8)
        try:
            read = plan.compressor.read(damaged, (20, 21), "layer")
        except PackedFormatError:
            continue
        assert not torch.equal(read.decode(read.unpack(damaged)), decoded)
