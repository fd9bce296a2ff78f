import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import layers
from torch import Tensor

from usllm.sketch import Plan, SketchConfig, build_plan, project
from usllm.sketch.layout import spans


def heavy_importance(channels: int) -> Tensor:
    return torch.rand(channels, generator=torch.Generator().manual_seed(0)).pow(8) + 1e-4


@given(layers())
@settings(max_examples=150, deadline=None)
def test_bits_are_under_the_ceiling_and_equal_what_is_stored(layer: tuple[Tensor, Plan, Tensor]) -> None:
    weight, plan, importance = layer
    assert plan.total_bits <= plan.config.bits_per_weight * weight.numel()
    states = project(weight, plan, importance)
    widths = torch.tensor([c.bits for c in plan.classes])
    stored = sum(block.num_states * int(widths[number]) for number, block in enumerate_blocks(plan))
    sections = plan.bit_breakdown()
    assert sections["states"] == -(-stored // 8) * 8
    assert sections["scales"] == 8 * states["scales"].numel()
    assert sections["output_scale"] == 8 * states.get("output_scales", torch.empty(0)).numel()
    assert states["codes"].numel() == plan.num_states
    assert all(bits % 8 == 0 for bits in sections.values())
    assert plan.total_bits == sum(sections.values())


def enumerate_blocks(plan: Plan) -> list[tuple[int, object]]:
    numbers = [number for number, choice in enumerate(plan.classes) if choice.rows and choice.states]
    return list(zip(numbers, plan.blocks, strict=True))


@pytest.mark.parametrize(
    "shape", [(576, 576), (192, 576), (1536, 576), (576, 1536), (2048, 64), (130, 512), (4096, 128)]
)
@pytest.mark.parametrize("rate", [0.25, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("allocation", ["uniform", "proportional", "waterfill"])
@pytest.mark.parametrize("rows", [1, 3])
def test_at_least_98_percent_of_the_rate_is_used(
    shape: tuple[int, int], rate: float, allocation: str, rows: int
) -> None:
    config = SketchConfig(bits_per_weight=rate, rows=rows, allocation=allocation)
    plan = build_plan(shape, heavy_importance(shape[1]), config, "layer")
    assert 0.98 * rate <= plan.bits_per_weight <= rate


@pytest.mark.parametrize("shape", [(192, 576), (320, 640), (512, 512), (1536, 576)])
@pytest.mark.parametrize("rate", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("allocation", ["uniform", "proportional", "waterfill"])
def test_at_least_98_percent_of_the_rate_is_used_where_all_channels_matter_alike(
    shape: tuple[int, int], rate: float, allocation: str
) -> None:
    plan = build_plan(shape, None, SketchConfig(bits_per_weight=rate, allocation=allocation), "layer")
    assert 0.98 * rate <= plan.bits_per_weight <= rate


@given(layers(hash="balanced"))
@settings(max_examples=50, deadline=None)
def test_balanced_plans_have_full_occupancy(layer: tuple[Tensor, Plan, Tensor]) -> None:
    plan = layer[1]
    assert plan.occupancy() == 1.0
    low, mean, high = plan.load()
    assert low <= mean <= high
    assert plan.num_states == 0 or low >= 1


@given(st.integers(1, 3000), st.integers(1, 4096))
@settings(deadline=None)
def test_groups_cover_the_channel_and_differ_by_at_most_one(out_features: int, group_size: int) -> None:
    runs = spans(out_features, group_size)
    sizes = [run.size for run in runs for _ in range(run.groups)]
    assert sum(sizes) == out_features
    assert len(sizes) == -(-out_features // group_size)
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= group_size
    starts = [run.start + g * run.size for run in runs for g in range(run.groups)]
    assert starts == [sum(sizes[:i]) for i in range(len(sizes))]


def test_a_plan_of_a_large_layer_is_under_half_a_percent_of_it() -> None:
    plan = build_plan((4096, 4096), heavy_importance(4096), SketchConfig(), "layer")
    weight = torch.zeros(4096, 4096)
    stored = sum(t.numel() * t.element_size() for t in plan.to_tensors().values())
    assert stored < 0.005 * weight.nbytes
    project(weight, plan)  # fills everything that a plan keeps
    assert len(pickle.dumps(plan.__dict__)) < 0.005 * weight.nbytes


@given(layers())
@settings(max_examples=30, deadline=None)
def test_a_restored_plan_is_the_same_plan(layer: tuple[Tensor, Plan, Tensor]) -> None:
    weight, plan, importance = layer
    restored = Plan.from_tensors(plan.to_tensors(), plan.shape, plan.config, plan.name)
    assert restored.total_bits == plan.total_bits
    first, second = project(weight, plan, importance), project(weight, restored, importance)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("importance", "message"),
    [(torch.ones(3), "shape"), (torch.full((32,), float("nan")), "finite"), (-torch.ones(32), "not negative")],
)
def test_unusable_importance_is_refused_with_the_layers_name(importance: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"layer.*{message}"):
        build_plan((64, 32), importance, SketchConfig(bits_per_weight=2.0), "layer")


def test_a_rate_too_small_for_the_tables_says_what_they_take() -> None:
    with pytest.raises(ValueError, match=r"tiny\.q.*0\.5 bits per weight is too little.*take 9\."):
        build_plan((4, 4), None, SketchConfig(), "tiny.q")
