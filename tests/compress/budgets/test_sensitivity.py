"""Rates by what the loss says: one water level for all layers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from usllm.compress.budgets import BudgetProblem, LayerDemand
from usllm.compress.budgets.sensitivity import share
from usllm.system.errors import UserError


def demand(costs: list[float], out: int = 100, most: float = 8.0) -> LayerDemand:
    weights = out * len(costs)
    sensitivity = torch.tensor(costs, dtype=torch.float64)
    return LayerDemand(weights, 1.0, weights // 100, int(most * weights), sensitivity)


costs = st.lists(st.floats(1e-8, 1e8), min_size=1, max_size=20)


@given(st.lists(costs, min_size=1, max_size=6), st.floats(0.05, 8.0))
def test_the_models_bits_are_used_to_the_last_one_and_bounds_hold(layers: list[list[float]], rate: float) -> None:
    demands = {str(number): demand(values) for number, values in enumerate(layers)}
    problem = BudgetProblem(demands, rate)
    found = share(problem)
    assert sum(found.values()) == min(problem.bits, sum(layer.most_bits for layer in demands.values()))
    assert all(layer.least_bits <= found[name] <= layer.most_bits for name, layer in demands.items())


def test_four_times_the_cost_is_worth_one_bit_more() -> None:
    found = share(BudgetProblem({"a": demand([4.0] * 8), "b": demand([1.0] * 8)}, 2.0))
    assert found["a"] - found["b"] == pytest.approx(800, abs=20)  # half an octave of the square root, 800 weights


def test_channels_under_the_water_get_nothing() -> None:
    even, steep = demand([1.0] * 16), demand([1e6] + [1e-6] * 15)
    found = share(BudgetProblem({"even": even, "steep": steep}, 1.0))
    assert found["even"] > found["steep"] > steep.least_bits


def test_too_few_bits_are_refused_with_the_least_rate() -> None:
    with pytest.raises(UserError, match="the least they can be stored in takes"):
        share(BudgetProblem({"a": demand([1.0])}, 0.001))
