"""Bits over layers by importance: between least and most, and all of the model's."""

from __future__ import annotations

import random

import pytest

from usllm.compress.budgets import BUDGETS, BudgetProblem, LayerDemand
from usllm.system.errors import UserError

share = BUDGETS["importance"]


def problem_of(rate: float, *layers: tuple[int, float, int, int]) -> BudgetProblem:
    return BudgetProblem({f"layer{i}": LayerDemand(*layer) for i, layer in enumerate(layers)}, rate)


@pytest.mark.parametrize("seed", range(200))
def test_ceilings_add_up_to_the_models_and_stay_between_least_and_most(seed: int) -> None:
    draw = random.Random(seed)
    layers = []
    for _ in range(draw.randint(1, 12)):
        weights, least = int(2 ** draw.uniform(8, 24)), draw.randint(100, 4000)
        most = max(int(weights * draw.choice((0.5, 4.0, 13.0))), least)
        layers.append((weights, draw.choice((0.0, draw.random(), 10 ** draw.uniform(-9, 9))), least, most))
    problem = problem_of(2 ** draw.uniform(-6, 4), *layers)
    if sum(layer.least_bits for layer in problem.layers.values()) > problem.bits:
        with pytest.raises(UserError, match="too little"):
            share(problem)
        return
    bits = share(problem)
    assert all(layer.least_bits <= bits[name] <= layer.most_bits for name, layer in problem.layers.items())
    assert sum(bits.values()) == min(problem.bits, sum(layer.most_bits for layer in problem.layers.values()))


def test_bits_follow_importance_times_weights() -> None:
    bits = share(problem_of(0.5, (1 << 20, 1.0, 0, 1 << 30), (1 << 20, 2.0, 0, 1 << 30), (1 << 21, 1.0, 0, 1 << 30)))
    assert bits["layer1"] == pytest.approx(2 * bits["layer0"], rel=1e-4)
    assert bits["layer2"] == pytest.approx(2 * bits["layer0"], rel=1e-4)


def test_no_layer_gets_less_than_an_eighth_of_the_mean_rate() -> None:
    bits = share(problem_of(0.8, (1 << 20, 1e-9, 0, 1 << 30), (1 << 20, 1.0, 0, 1 << 30)))
    assert bits["layer0"] == pytest.approx(0.1 * 2**20, abs=2)


def test_the_rate_that_the_refusal_names_works() -> None:
    layers = (1000, 1.0, 900, 10_000), (5000, 2.0, 700, 10_000)
    with pytest.raises(UserError, match=r"sketch\.bits_per_weight=0\.1 is too little for 2 layers .* takes 0\.2668"):
        share(problem_of(0.1, *layers))
    assert share(problem_of(0.2668, *layers))["layer0"] == 900
