"""A rule over layers: bits in proportion to the square root of importance."""

import math

from usllm.compress.budgets import BUDGETS, BudgetProblem


def share(problem: BudgetProblem) -> dict[str, int]:
    """Shares of the budget, each at least what the layer needs."""
    wanted = {name: math.sqrt(layer.importance) * layer.weights for name, layer in problem.layers.items()}
    spare = problem.bits - sum(layer.least_bits for layer in problem.layers.values())
    total = sum(wanted.values())
    return {
        name: layer.least_bits + int(max(spare, 0) * wanted[name] / total) for name, layer in problem.layers.items()
    }


BUDGETS["square_root"] = share
