"""The compiled loops against the torch reference, bit for bit."""

from __future__ import annotations

import pytest
import torch
from cases import assert_product, stream
from hypothesis import given, settings
from strategies import layers
from torch import Tensor

from usllm import sketch
from usllm.sketch import Plan, SketchConfig, build_plan
from usllm_kernels import project, project_query, query, sketch_linear

pytest.importorskip("numba")

from usllm_kernels.cpu import linear  # needs numba


def assert_equal(weight: Tensor, plan: Plan, moment: Tensor | None = None) -> None:
    keeps = plan.operator.keeps_member
    winners = [torch.full((plan.num_states,), -1, dtype=torch.int16) if keeps else None for _ in range(2)]
    expected = sketch.project(weight, plan, moment, winners=winners[0])
    states = project(weight, plan, moment, winners=winners[1], backend="numba")
    assert set(states) == set(expected)
    assert all(torch.equal(states[name], expected[name]) for name in expected)
    assert not keeps or torch.equal(*winners)
    decoded = sketch.query(expected, plan)
    assert torch.equal(query(states, plan, backend="numba"), decoded)
    assert_products_equal(states, plan, decoded.bfloat16())
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        sums = torch.empty(2, plan.shape[1])
        again, fused = project_query(weight, plan, moment, dtype=dtype, sums=sums, backend="numba")
        assert all(torch.equal(again[name], expected[name]) for name in expected)
        assert torch.equal(fused, decoded.to(dtype))
        latent = weight.float()
        torch.testing.assert_close(sums[0], (decoded - latent).square().sum(0), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(sums[1], latent.square().sum(0), rtol=1e-4, atol=1e-6)


def assert_products_equal(states: sketch.States, plan: Plan, decoded: Tensor) -> None:
    """Products that pick out one channel hold its weights, unpacked or packed, of few tokens and of many."""
    channels = torch.linspace(0, plan.shape[1] - 1, 3).long()
    for codes in (states["codes"], stream(states, plan)):
        for tokens in (3, 9):
            x = torch.zeros(tokens, plan.shape[1], dtype=torch.bfloat16)
            x[range(3), channels] = 1.0
            y = sketch_linear(x, {**states, "codes": codes}, plan, backend="numba")
            assert torch.equal(y[:3], decoded[:, channels].t())
            assert not y[3:].any()


@given(layers())
@settings(max_examples=150, deadline=None)
def test_any_layer(layer: tuple[Tensor, Plan, Tensor]) -> None:
    assert_equal(*layer)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"rows": 1},
        {"rows": 2},
        {"query": "signed_max"},
        {"operator": "countmin"},
        {"operator": "mean"},
        {"operator": "mean", "state_bits": 16, "rows": 4},
        {"allocation": "waterfill", "output_scale": True},
        {"hash": "uniform"},
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(1300, 70), (577, 33), (8, 300), (3, 2000), (700, 1)], ids=str)
def test_shapes_of_two_group_sizes_and_of_groups_shorter_than_a_tile(
    shape: tuple[int, int], fields: dict[str, object]
) -> None:
    generator = torch.Generator().manual_seed(0)
    importance = torch.rand(shape[1], generator=generator) ** 6 + 1e-6
    rate = 16.0 if min(shape) < 10 else 2.0
    plan = build_plan(shape, importance, SketchConfig(bits_per_weight=rate, **fields), "layer")  # type: ignore[arg-type]
    assert_equal(torch.randn(shape, generator=generator), plan, importance)


@pytest.mark.parametrize("view", ["transposed", "strided", "columns", "bf16"])
def test_weights_that_are_not_contiguous_float32(view: str) -> None:
    source = torch.randn(300, 300)
    weight = {
        "transposed": source.t()[:90, :70],
        "strided": source[::3, :70],
        "columns": source[:90, ::2],
        "bf16": source[:90, :70].bfloat16(),
    }[view]
    plan = build_plan(tuple(weight.shape), None, SketchConfig(bits_per_weight=2.0), "layer")
    assert_equal(weight, plan)


def test_equal_magnitudes_and_zeros() -> None:
    weight = torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0, -2.0]).repeat(100, 20)
    for operator in ("absmaxmin", "countmin", "mean"):
        plan = build_plan((100, 120), None, SketchConfig(bits_per_weight=2.0, operator=operator), "layer")
        assert_equal(weight, plan)
        assert_equal(torch.zeros_like(weight), plan)


def test_channels_without_states_decode_to_zero() -> None:
    importance = torch.zeros(40)
    importance[3] = 1.0
    plan = build_plan((64, 40), importance, SketchConfig(bits_per_weight=1.0), "layer")
    weight = torch.randn(64, 40)
    decoded = project_query(weight, plan, backend="numba")[1]
    assert bool((decoded[:, 3] != 0).any())
    assert not decoded[:, torch.arange(40) != 3].any()
    assert not decoded.signbit()[:, torch.arange(40) != 3].any()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_every_thread_count_gives_the_same_bits(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(530, 40, generator=torch.Generator().manual_seed(0))
    config = SketchConfig(bits_per_weight=2.0, group_size=100)
    plan = build_plan((530, 40), torch.rand(40, generator=torch.Generator().manual_seed(1)) + 0.1, config, "layer")
    sums, expected = torch.empty(2, 40), torch.empty(2, 40)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        project_query(weight, plan, sums=expected, backend="numba")
        torch.set_num_threads(threads)
        assert_equal(weight, plan)
        project_query(weight, plan, sums=sums, backend="numba")
        monkeypatch.setattr(linear, "_LEAST_SHARED", 0)
        x = torch.randn(3, 40)
        y = sketch_linear(x, project(weight, plan), plan, backend="numba")
        assert_product(y, x, query(project(weight, plan), plan).t())
    finally:
        torch.set_num_threads(before)
    assert torch.equal(sums, expected)
