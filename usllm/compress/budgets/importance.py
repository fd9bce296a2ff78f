"""Rates in proportion to a layer's importance, the mean E[a²] of its channels (`docs/method.md` §2)."""

from __future__ import annotations

from usllm.compress.budgets.problem import BudgetProblem

_SMALLEST_SHARE = 1 / 8  # of the mean rate: below this the tables leave no room for states


def share(problem: BudgetProblem) -> dict[str, int]:
    """Ceilings whose sum is the model's, in proportion to importance times weights.

    They are held between an eighth of the mean rate (or the least that works) and the most a layer can use; what the
    bounds cut off or add is shared out again.
    """
    layers, rate = problem.layers, problem.bits_per_weight
    low = {name: max(rate * _SMALLEST_SHARE * layer.weights, layer.least_bits) for name, layer in layers.items()}
    high = {name: max(float(layer.most_bits), low[name]) for name, layer in layers.items()}

    def bits(factor: float) -> dict[str, int]:
        return {
            name: int(min(max(factor * layer.importance * layer.weights, low[name]), high[name]))
            for name, layer in layers.items()
        }

    bottom, top = 0.0, 1.0
    smallest = min((layer.importance for layer in layers.values() if layer.importance > 0), default=1.0)
    ceiling = max(high[name] / layer.weights for name, layer in layers.items()) / max(smallest, 1e-30)
    while sum(bits(top).values()) < problem.bits and top < ceiling:
        top *= 2
    for _ in range(100):
        middle = (bottom + top) / 2
        bottom, top = (middle, top) if sum(bits(middle).values()) <= problem.bits else (bottom, middle)
    return bits(bottom)
