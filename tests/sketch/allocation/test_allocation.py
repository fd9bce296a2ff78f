import pytest
import torch

from usllm.sketch import SketchConfig, build_plan, project, query


def states_of(plan: object) -> torch.Tensor:
    return torch.tensor([plan.classes[i].states for i in plan.channel_class.tolist()])  # type: ignore[attr-defined]


def test_uniform_gives_every_channel_the_same_states_up_to_one() -> None:
    plan = build_plan((512, 100), torch.rand(100), SketchConfig(allocation="uniform"), "layer")
    states = states_of(plan)
    assert int(states.max()) - int(states.min()) <= 1
    more = (states == states.max()).nonzero().flatten().float()
    if 1 < len(more) < 100:  # spread over the layer, not at its front
        assert 30 < float(more.mean()) < 70


def test_proportional_follows_importance_until_the_clip() -> None:
    importance = torch.linspace(1, 8, 256)
    plan = build_plan((512, 256), importance, SketchConfig(bits_per_weight=1.0, rows=1), "layer")
    ratio = states_of(plan) / importance
    assert float(ratio.max() / ratio.mean()) < 1.45
    assert float(ratio.mean() / ratio.min()) < 1.45


def test_proportional_clips_at_the_group_and_shares_the_excess_out_again() -> None:
    importance = torch.ones(256)
    importance[0] = 1e6
    plan = build_plan((512, 256), importance, SketchConfig(rows=1), "layer")
    states = states_of(plan)
    assert int(states[0]) == 512
    assert int(states[1:].min()) > 0
    assert plan.bits_per_weight > 0.49


def test_channels_under_the_threshold_get_nothing_and_the_rest_everything() -> None:
    importance = torch.cat([torch.full((50,), 1e-3), torch.ones(50)])
    for allocation in ("uniform", "proportional", "waterfill"):
        config = SketchConfig(bits_per_weight=1.0, allocation=allocation, min_importance=0.1)
        plan = build_plan((512, 100), importance, config, "layer")
        assert int(states_of(plan)[:50].sum()) == 0
        assert plan.bits_per_weight > 0.97


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("rate", [0.3, 0.5, 1.0, 3.0])
def test_waterfill_has_the_lowest_weighted_error(rate: float, rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(384, 256, generator=generator)
    importance = torch.rand(256, generator=generator).pow(5) + 1e-4
    errors = {}
    for allocation in ("uniform", "proportional", "waterfill"):
        config = SketchConfig(bits_per_weight=rate, rows=rows, allocation=allocation)
        energy = weight.square().mean(0)
        plan = build_plan((384, 256), importance, config, "layer", weight_energy=energy)
        errors[allocation] = float(((query(project(weight, plan), plan) - weight).square() * importance).sum())
    assert errors["waterfill"] < errors["proportional"] < errors["uniform"] * 1.05


def test_waterfill_widens_states_with_importance() -> None:
    importance = torch.logspace(-6, 0, 128)
    plan = build_plan((512, 128), importance, SketchConfig(bits_per_weight=1.0, allocation="waterfill"), "layer")
    bits = torch.tensor([plan.classes[i].states * plan.classes[i].bits for i in plan.channel_class.tolist()])
    assert bool((bits.diff() >= 0).all())
    assert int(bits[0]) == 0 < int(bits[-1])
