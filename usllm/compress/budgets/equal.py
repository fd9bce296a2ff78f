"""The same rate for every layer."""

from __future__ import annotations

from usllm.compress.budgets.problem import BudgetProblem

NEEDS: frozenset[str] = frozenset()


def share(problem: BudgetProblem) -> dict[str, int]:
    """``bits_per_weight`` for each layer."""
    return {name: int(problem.bits_per_weight * layer.weights) for name, layer in problem.layers.items()}
