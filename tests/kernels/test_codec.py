"""project, query and project_query of every backend against the reference, bit for bit."""

from __future__ import annotations

import pytest
import torch
from cases import case, every_case, products_of, slow_interpreted

from usllm import sketch
from usllm.sketch import SketchConfig, build_plan
from usllm_kernels import packed_states, project, project_query, query, sketch_linear

pytestmark = pytest.mark.usefixtures("poisoned")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@every_case
def test_states_and_winners(name: str, backend: str, device: torch.device) -> None:
    layer = case(name, device)
    keeps = layer.plan.operator.keeps_member
    winners = [layer.weight.new_zeros(layer.plan.num_states, dtype=torch.int16) if keeps else None for _ in range(2)]
    expected = sketch.project(layer.weight, layer.plan, layer.moment, winners=winners[0])
    states = project(layer.weight, layer.plan, layer.moment, winners=winners[1], backend=backend)
    assert set(states) == set(expected)
    assert all(torch.equal(states[key], expected[key]) for key in expected)
    assert not keeps or torch.equal(*winners)


@pytest.mark.parametrize("size", [0.0, 1e-42, *slow_interpreted(1e18), 1e38])
@pytest.mark.parametrize("name", ["mixed-widths", *slow_interpreted("mean", "countmin", "random-buckets", "16-bit")])
def test_states_of_weights_near_the_ends_of_float32(name: str, size: float, backend: str, device: torch.device) -> None:
    layer = case(name, device)
    weight = (layer.weight * size).clamp(-3.4e38, 3.4e38)
    expected = sketch.project(weight, layer.plan, layer.moment)
    states = project(weight, layer.plan, layer.moment, backend=backend)
    assert all(torch.equal(states[key], expected[key]) for key in expected)
    assert bool(torch.isfinite(sketch.query(states, layer.plan)).all())


@every_case
def test_decoded_weight_from_states_and_from_their_packed_form(name: str, backend: str, device: torch.device) -> None:
    layer = case(name, device)
    expected = sketch.query(layer.states, layer.plan)
    for dtype in DTYPES:
        for states in (layer.states, layer.packed):
            decoded = query(states, layer.plan, dtype, backend=backend)
            assert decoded.dtype == dtype
            assert torch.equal(decoded, expected.to(dtype))


@products_of
def test_both_in_one(name: str, backend: str, device: torch.device) -> None:
    layer = case(name, device)
    expected = sketch.query(layer.states, layer.plan)
    sums = torch.empty(2, layer.plan.shape[1], device=device)
    states, decoded = project_query(
        layer.weight, layer.plan, layer.moment, dtype=torch.bfloat16, sums=sums, backend=backend
    )
    assert all(torch.equal(states[key], layer.states[key]) for key in layer.states)
    assert torch.equal(decoded, expected.bfloat16())
    torch.testing.assert_close(sums[0], (expected - layer.weight).square().sum(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(sums[1], layer.weight.square().sum(0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scale", [*slow_interpreted(1.0, 2.0**-30), 2.0**30])
def test_output_scales_that_are_given_are_stored_in_place_of_fitted_ones(
    scale: float, backend: str, device: torch.device
) -> None:
    layer = case("mixed-widths", device)
    given = torch.rand(layer.plan.shape[0], generator=torch.Generator().manual_seed(0)).add(0.5).mul(scale).to(device)
    expected = sketch.project(layer.weight, layer.plan, output_scale=given)
    found = [project(layer.weight, layer.plan, output_scale=given, backend=backend)]
    states, decoded = project_query(layer.weight, layer.plan, output_scale=given, backend=backend)
    for each in (*found, states):
        assert all(torch.equal(each[key], expected[key]) for key in expected)
    assert torch.equal(decoded, sketch.query(expected, layer.plan))
    stored = sketch.scale.decode_scale(expected["output_scales"], expected["output_scale_base"], 5)
    torch.testing.assert_close(stored, given.clamp(2.0**-20, 2.0**20), rtol=2.0**-6, atol=0)


@pytest.mark.parametrize("view", ["transposed", *slow_interpreted("strided", "columns", "bf16")])
def test_weights_that_are_not_contiguous_float32(view: str, backend: str, device: torch.device) -> None:
    source = torch.randn(80, 80, generator=torch.Generator().manual_seed(0)).to(device)
    weight = {
        "transposed": source.t()[:30, :14],
        "strided": source[::3, :14],
        "columns": source[:30, ::6],
        "bf16": source[:30, :14].bfloat16(),
    }[view]
    plan = build_plan((weight.shape[0], weight.shape[1]), None, SketchConfig(bits_per_weight=3.0), "layer")
    expected, states = sketch.project(weight, plan), project(weight, plan, backend=backend)
    assert all(torch.equal(states[key], expected[key]) for key in expected)


def test_gradient_of_the_decoded_weight_goes_straight_to_the_latent_one(backend: str, device: torch.device) -> None:
    layer = case("plain", device)
    weight = layer.weight.clone().requires_grad_()
    _, decoded = project_query(weight, layer.plan, dtype=torch.bfloat16, backend=backend)
    gradient = torch.randn_like(layer.weight).bfloat16()
    decoded.backward(gradient)
    assert weight.grad is not None and torch.equal(weight.grad, gradient.float())


@every_case
def test_packed_layer_is_read_where_it_lies(name: str) -> None:
    from usllm.sketch.layer_bytes import pack_layer

    layer = case(name)
    packed = pack_layer(layer.plan, layer.states)
    found = packed_states(packed, layer.plan)
    assert all(torch.equal(found[key], layer.packed[key]) for key in layer.packed)
    inside = range(packed.data_ptr(), packed.data_ptr() + len(packed) + 1)
    assert all(value.data_ptr() in inside for value in found.values() if value.numel())


def test_a_weight_of_another_shape_is_refused(backend: str, device: torch.device) -> None:
    layer = case("plain", device)
    with pytest.raises(ValueError, match=r"\(36, 13\).*\(37, 13\)"):
        project(layer.weight[1:], layer.plan, backend=backend)


@pytest.mark.slow
def test_more_than_two_to_the_31_weights(backend: str, device: torch.device) -> None:
    if backend == "torch" or (backend == "triton" and device.type == "cpu"):
        pytest.skip("takes too long")
    shape = (1 << 15, (1 << 16) + 8)
    importance = torch.zeros(shape[1])
    importance[:8] = importance[-8:] = 1.0
    plan = build_plan(shape, importance, SketchConfig(bits_per_weight=0.001, rows=1), "layer")
    span, channel = plan.spans[-1], shape[1] - 1
    block = next(block for block in plan.blocks if channel in block.channels)
    k, group = min(block.choice.states, span.size), span.groups - 1
    end = block.first_state + block.num_states
    # The last channel of the last group, whose weights and states lie behind every other.
    weight = torch.zeros(shape, device=device)
    last = torch.randn(span.size, generator=torch.Generator().manual_seed(0))
    weight[-span.size :, channel] = last.to(device)
    turn = plan.rotation(span) + group * shape[1] + channel
    bucket = plan.placement(block.choice, span.size).buckets[0].long()  # by position in hash order
    ordered = last[(torch.arange(span.size) + turn) % span.size]
    kept = torch.stack([ordered[bucket == b][ordered[bucket == b].abs().argmin()] for b in range(k)])

    states = project(weight, plan, backend=backend)
    del weight
    scale = sketch.channel_scales(states, plan)[channel].cpu()
    codes = states["codes"][end - k : end].cpu()
    limit = 2 ** (block.choice.bits - 1) - 1
    assert torch.equal(codes, (kept / scale).clamp(-limit, limit).to(torch.int8))
    assert codes.any()

    expected = (codes[bucket[(torch.arange(span.size) - turn) % span.size]] * scale).bfloat16()
    decoded = query(states, plan, torch.bfloat16, backend=backend)
    assert torch.equal(decoded[-span.size :, channel].cpu(), expected)
    assert not decoded[-1, 8:-8].any()
    del decoded
    for tokens in (1, 20, 200):
        x = torch.zeros(tokens, shape[1], dtype=torch.bfloat16, device=device)
        x[-1, channel] = 1.0
        y = sketch_linear(x, states, plan, backend=backend)
        assert torch.equal(y[-1, -span.size :].cpu(), expected)
        assert not y[:-1].any()
