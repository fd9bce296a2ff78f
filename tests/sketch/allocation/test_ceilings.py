"""Every rule keeps its ceiling and uses it, whatever the layer."""

from __future__ import annotations

import pytest
import torch
from random_plans import IMPORTANCES, Layer, check, importance_of, plan_or_least_rate, random_layer

from usllm.sketch import SketchConfig, build_plan
from usllm.sketch.allocation import ALLOCATIONS

PLANS, PLANS_OF_A_SLOW_TEST = 20_000, 200  # few enough for its time on a machine that others use


def plan_and_check(seeds: range) -> int:
    """How many of the layers were planned; the others were refused with a rate that works."""
    planned = 0
    for seed in seeds:
        layer = random_layer(seed)
        plan = plan_or_least_rate(layer)
        if plan is not None:
            check(layer, plan)
            planned += 1
    return planned


def test_random_layers_keep_and_use_their_ceilings() -> None:
    assert plan_and_check(range(80)) > 30


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, PLANS, PLANS_OF_A_SLOW_TEST))
def test_twenty_thousand_random_layers(first: int) -> None:
    assert plan_and_check(range(first, first + PLANS_OF_A_SLOW_TEST)) > 80


# What went wrong once, one row each: shape, importance, configuration.
FAULTS = {
    "seventeen classes": ((1536, 576), "heavy", {"bits_per_weight": 0.15}),
    "near equal importance, low rate": ((576, 576), "nearly equal", {"bits_per_weight": 0.07}),
    "half a state for every channel": ((576, 1536), "equal", {"bits_per_weight": 0.04}),
    "one channel above all": ((576, 1536), "one", {"bits_per_weight": 0.0658, "group_size": 256}),
    "uniform with a threshold": ((512, 100), "uniform", {"allocation": "uniform", "min_importance": 0.9}),
    "a threshold of exactly the mean": ((512, 100), "equal", {"min_importance": 1.0}),
    "the widest states or none": (
        (2048, 256),
        "one",
        {"bits_per_weight": 0.65, "group_size": 64, "allocation": "waterfill", "output_scale": True},
    ),
    "no channel fits whole": ((4096, 64), "equal", {"bits_per_weight": 0.02, "allocation": "waterfill"}),
    "one channel": ((64, 1), "equal", {"bits_per_weight": 12.0}),
    "a table of three classes takes nearly all that is left over": (
        (256, 398),
        "heavy",
        {"bits_per_weight": 0.10065, "rows": 15, "group_size": 64, "state_bits": 8, "min_importance": 0.1},
    ),
    "a table of two classes does not fit": ((8, 2), "equal", {"bits_per_weight": 12.6, "rows": 1}),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_of_before(name: str) -> None:
    shape, kind, fields = FAULTS[name]
    importance = importance_of(kind, shape[1], torch.Generator().manual_seed(0))
    layer = Layer(shape, importance, SketchConfig(**fields))
    plan = plan_or_least_rate(layer)
    assert plan is not None
    check(layer, plan)


@pytest.mark.parametrize("rate", [0.03, 0.05, 0.1, 0.5, 2.0])
@pytest.mark.parametrize("kind", IMPORTANCES)
@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_almost_all_bits_are_used(allocation: str, kind: str, rate: float) -> None:
    importance = importance_of(kind, 576, torch.Generator().manual_seed(0))
    config = SketchConfig(bits_per_weight=rate, allocation=allocation)
    plan = build_plan((576, 576), importance, config, "layer")
    assert 0.98 * rate <= plan.bits_per_weight <= rate


def test_channels_of_equal_importance_get_alike_before_one_gets_wide_states() -> None:
    importance = importance_of("one", 256, torch.Generator())
    config = SketchConfig(bits_per_weight=0.65, allocation="waterfill", group_size=64, rows=1)
    plan = build_plan((2048, 256), importance, config, "layer")
    bits = torch.tensor([choice.bits for choice in plan.classes])[plan.channel_class.long()]
    assert int((bits[1:] > 1).sum()) == 0
    assert int((bits[1:] == 1).sum()) > 150
