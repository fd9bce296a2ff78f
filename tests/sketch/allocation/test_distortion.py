"""The two price lists of water-filling."""

from __future__ import annotations

from dataclasses import asdict, replace
from itertools import product

import pytest
import torch

from usllm.sketch import SketchConfig, build_plan
from usllm.sketch.allocation.distortion import convex_options
from usllm.sketch.allocation.problem import AllocationProblem
from usllm.sketch.classes import EMPTY

TRAINED = SketchConfig(
    bits_per_weight=0.5,
    rows=1,
    operator="mean",
    state_bits=1,
    rounding="nearest",
    allocation="waterfill",
    price_list="trained",
)


def problem_of(shape: tuple[int, int], energy: torch.Tensor, config: SketchConfig) -> AllocationProblem:
    ones = torch.ones(shape[1], dtype=torch.float64)
    budget = int(config.bits_per_weight * shape[0] * shape[1])
    return AllocationProblem("layer", shape, config, energy.double(), ones, ones > 0, budget)


def test_trained_prices_are_those_that_training_showed() -> None:
    """`docs/method.md` §5: signs shared by L leave 0.3634^(1.5 / L); wider ones what a Gaussian's quantiser does."""
    options = convex_options(problem_of((512, 8), torch.ones(8), TRAINED))
    prices = {(option.choice.states, option.choice.bits): option.distortion for option in options if option.choice.rows}
    expected = {(512, 1): 0.3634**1.5, (256, 1): 0.3634**0.75, (171, 1): 0.3634**0.5, (128, 1): 0.3634**0.375}
    expected |= {(85, 1): 0.3634**0.25, (64, 1): 0.3634 ** (1.5 / 8), (32, 1): 0.3634 ** (1.5 / 16)}
    expected |= {(512, 2): 0.1175, (512, 3): 0.03454, (512, 4): 0.01154, (512, 8): 0.00008}
    assert prices.items() <= {key: pytest.approx(value) for key, value in expected.items()}.items()
    assert {(256, 1), (171, 1), (512, 3), (512, 8)} <= set(prices)
    assert options[0].choice == EMPTY


@pytest.mark.parametrize("rate", [0.2, 0.4, 0.8, 1.5, 3.0])
@pytest.mark.parametrize("seed", range(6))
def test_trained_water_filling_is_near_the_best_of_all_answers(seed: int, rate: float) -> None:
    """Brute force over every class of every channel of a small layer, within what the plan spends."""
    energy = torch.rand(4, generator=torch.Generator().manual_seed(seed)) ** 4 + 1e-3
    problem = problem_of((600, 4), energy, replace(TRAINED, bits_per_weight=rate))
    options = convex_options(problem)
    distortion = {option.choice: option.distortion for option in options}
    group = problem.largest_group
    plan = build_plan((600, 4), energy, problem.config, "layer")
    chosen = [plan.classes[i] for i in plan.channel_class.tolist()]
    known = [  # a class cut to fit is not in the list, but its load has a price
        distortion.get(choice, 0.3634 ** (1.5 * choice.states / group) if choice.bits == 1 else 1.0)
        for choice in chosen
    ]
    found = float(sum(e * d for e, d in zip(energy.tolist(), known, strict=True)))
    bits = sum(problem.channel_bits(choice) for choice in chosen)
    best = min(
        sum(e * option.distortion for e, option in zip(energy.tolist(), answer, strict=True))
        for answer in product(options, repeat=4)
        if sum(option.bits for option in answer) <= bits
    )
    assert found <= 1.2 * best


def test_trained_prices_share_where_untrained_ones_drop() -> None:
    importance = torch.rand(576, generator=torch.Generator().manual_seed(0)) + 0.1
    stored = {}
    for price_list in ("untrained", "trained"):
        plan = build_plan((576, 576), importance, replace(TRAINED, price_list=price_list), "layer")
        assert 0.495 <= plan.bits_per_weight <= 0.5
        stored[price_list] = plan.num_active / 576
        shares = torch.tensor([0 < choice.states < 288 for choice in plan.classes])[plan.channel_class.long()]
        assert (int(shares.sum()) > 200) == (price_list == "trained")  # one channel's class may be cut to fit
    assert stored["trained"] > 1.3 * stored["untrained"]


def test_a_larger_exponent_shares_more() -> None:
    importance = torch.logspace(-2, 0, 256)
    held = []
    for exponent in (1.0, 1.5, 3.0):
        plan = build_plan((512, 256), importance, replace(TRAINED, price_exponent=exponent), "layer")
        held.append(plan.num_active)
    assert held[0] < held[1] < held[2]


REFUSED = {
    "unknown": ({"price_list": "paid"}, r"sketch\.price_list='paid' is unknown: choose one of untrained, trained"),
    "another rule": ({"allocation": "uniform"}, r"sketch\.price_list='trained' is read by waterfill alone"),
    "rows": ({"rows": 3}, r"sketch\.rows=3: price_list='trained' knows one row alone.* set sketch\.rows=1"),
    "exponent of 0": ({"price_exponent": 0.0}, r"sketch\.price_exponent=0\.0 must be above 0"),
    "exponent that is no number": ({"price_exponent": float("nan")}, r"sketch\.price_exponent=nan must be above 0"),
    "exponent without effect": (
        {"price_list": "untrained", "price_exponent": 2.0},
        r"sketch\.price_exponent=2\.0 is of price_list='trained' alone",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name: str) -> None:
    fields, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        replace(TRAINED, **fields)


def test_a_configuration_stored_before_there_were_price_lists_is_one_of_untrained_prices() -> None:
    older = asdict(SketchConfig(allocation="waterfill"))
    del older["price_list"], older["price_exponent"]
    assert SketchConfig(**older) == SketchConfig(allocation="waterfill", price_list="untrained")
