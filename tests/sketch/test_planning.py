"""What is refused before and after a rule has planned a layer."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from usllm.sketch import Plan, SketchConfig, bit_range, build_plan
from usllm.sketch.allocation import ALLOCATIONS, AllocationProblem, AllocationTable
from usllm.sketch.classes import EMPTY, ChannelClass
from usllm.sketch.planning import check_plan

CONFIG = SketchConfig(bits_per_weight=1.0)
SHAPE = (256, 64)


def rule(*classes: ChannelClass, channel_class: torch.Tensor | None = None) -> object:
    """A rule with one answer for every layer."""
    default = (torch.arange(SHAPE[1]) % len(classes)).to(torch.uint8)

    def allocate(problem: AllocationProblem) -> AllocationTable:
        return AllocationTable(classes, default if channel_class is None else channel_class)

    return allocate


BROKEN = {
    "over its ceiling": (rule(ChannelClass(3, 256, 4)), r"takes 197208 bits, its ceiling is 16384"),
    "seventeen classes": (rule(*(ChannelClass(1, k, 1) for k in range(1, 18))), "has 17 classes of channels, 1 to 16"),
    "classes of floats": (rule(EMPTY, channel_class=torch.zeros(64)), "is another one when it is read"),
    "more states than weights": (rule(EMPTY, ChannelClass(1, 257, 1)), "cannot be read from its own bytes"),
    "sixteen rows": (rule(EMPTY, ChannelClass(16, 1, 1)), "own bytes"),
    "a class that is not there": (
        rule(EMPTY, channel_class=torch.ones(64, dtype=torch.uint8)),
        "own bytes",
    ),
    "a width that no format has": (rule(EMPTY, ChannelClass(1, 1, 12)), "cannot be read from its own bytes"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_answer_of_a_rule_is_checked(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    allocate, message = BROKEN[name]
    monkeypatch.setitem(ALLOCATIONS, "broken", allocate)
    with pytest.raises(ValueError, match=rf"layer\.q: allocation 'broken' made a plan that .*{message}") as raised:
        build_plan(SHAPE, None, replace(CONFIG, allocation="broken"), "layer.q")
    assert "\n" not in str(raised.value)


def test_a_plan_that_keeps_all_passes_the_check() -> None:
    plan = build_plan(SHAPE, None, CONFIG, "layer")
    check_plan(plan, plan.total_bits)
    with pytest.raises(ValueError, match="its ceiling is"):
        check_plan(plan, plan.total_bits - 1)


@pytest.mark.parametrize("allocation", ["uniform", "proportional", "waterfill"])
@pytest.mark.parametrize("shape", [(4, 4), (256, 64), (1, 300), (300, 1), (7, 5), (1000, 3)])
@pytest.mark.parametrize("output_scale", [False, True])
def test_the_least_rate_works_and_less_does_not(allocation: str, shape: tuple[int, int], output_scale: bool) -> None:
    config = SketchConfig(bits_per_weight=1e-6, allocation=allocation, output_scale=output_scale)
    with pytest.raises(ValueError, match="too little") as raised:
        build_plan(shape, None, config, "layer")
    named = re.search(r"take ([0-9.e+-]+)\. Raise", str(raised.value))
    assert named
    least = float(named[1])
    assert build_plan(shape, None, replace(config, bits_per_weight=least), "layer").num_states
    with pytest.raises(ValueError, match="too little"):
        build_plan(shape, None, replace(config, bits_per_weight=least * 0.998), "layer")
    bits = bit_range(shape, config)[0]
    assert build_plan(shape, None, config, "layer", budget_bits=bits).total_bits <= bits
    with pytest.raises(ValueError, match="too little"):
        build_plan(shape, None, config, "layer", budget_bits=bits - 1)


@pytest.mark.parametrize("allocation", ["uniform", "proportional", "waterfill"])
def test_a_layer_has_no_use_for_more_than_its_most(allocation: str) -> None:
    config = SketchConfig(allocation=allocation)
    most = bit_range(SHAPE, config)[1]
    full = build_plan(SHAPE, None, config, "layer", budget_bits=most)
    assert full.total_bits == most
    assert build_plan(SHAPE, None, config, "layer", budget_bits=10 * most).total_bits == most


REFUSED = {
    "threshold above every channel": (
        {"min_importance": 3.0},
        {},
        r"layer: allocation\.min_importance=3 leaves no channel: the most important one has 1 times the mean",
    ),
    "shape without columns": ({}, {"shape": (4, 0)}, r"shape \(4, 0\) must have at least one row and one column"),
    "a side that no packed layer holds": ({}, {"shape": (1, 2**20 + 1)}, r"has a side above 1048576"),
    "importance of another size": ({}, {"importance": torch.ones(3)}, r"importance has shape \(3,\), expected \(64,\)"),
    "negative importance": ({}, {"importance": -torch.ones(64)}, "must be finite and not negative"),
    "unknown rule": ({"allocation": "more"}, {}, r"sketch\.allocation='more' is unknown: choose one of proportional"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line(name: str) -> None:
    fields, arguments, message = REFUSED[name]
    shape, importance = arguments.get("shape", SHAPE), arguments.get("importance")
    with pytest.raises(ValueError, match=message) as raised:
        build_plan(shape, importance, replace(CONFIG, **fields), "layer")
    assert "\n" not in str(raised.value)


def test_plans_are_plans_of_their_configuration() -> None:
    plan = build_plan(SHAPE, None, CONFIG, "layer", bits_per_weight=0.5)
    assert isinstance(plan, Plan) and plan.config == CONFIG
    assert 0.49 <= plan.bits_per_weight <= 0.5
