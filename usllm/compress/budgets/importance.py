"""Rates in proportion to a layer's importance, the mean E[a²] of its channels (`docs/method.md` §2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from usllm.compress.budgets.problem import BudgetProblem
from usllm.system.errors import UserError

NEEDS = frozenset({"energy"})

_SMALLEST_SHARE = 1 / 8  # of the mean rate: with less, a layer is hardly one
_LARGEST_EXPONENT = 200.0  # of the factor, base 2: beyond it all layers have their most


def share(problem: BudgetProblem) -> dict[str, int]:
    """Ceilings in proportion to importance times weights, which together are the model's bits.

    They are held between an eighth of the mean rate (or the least that works) and the most a layer can use; what the
    bounds cut off or add is shared out again, so that bits are left over only where every layer has its most.

    Raises:
        UserError: The model's bits are fewer than the least of its layers; names the least rate.
    """
    layers, budget = problem.layers, problem.bits
    low = {name: layer.least_bits for name, layer in layers.items()}
    if sum(low.values()) > budget:
        least = sum(low.values()) / sum(layer.weights for layer in layers.values())
        raise UserError(
            f"sketch.bits_per_weight={problem.bits_per_weight:g} is too little for {len(layers)} layers that share it"
            f" by importance: the least they can be stored in takes {least * 1.0005:.4g}. Raise it to that"
        )
    high = {name: max(layer.most_bits, low[name]) for name, layer in layers.items()}
    eighth = int(problem.bits_per_weight * 2**20 * _SMALLEST_SHARE)  # of 2^20 weights, in bits
    wished = {name: min(max(eighth * layers[name].weights >> 20, low[name]), high[name]) for name in layers}
    if sum(wished.values()) <= budget:
        low = wished
    largest = max(layer.importance for layer in layers.values())
    shares = {
        name: layer.weights * (layer.importance / largest if largest > 0 else 1.0) for name, layer in layers.items()
    }

    def bits(factor: float) -> dict[str, int]:
        return {name: int(min(max(factor * shares[name], low[name]), high[name])) for name in layers}

    found = bits(_largest_factor(lambda factor: sum(bits(factor).values()) <= budget))
    return _with_rest(found, high, shares, budget)


def _largest_factor(fits: Callable[[float], bool]) -> float:
    """The largest factor that fits, to the precision of a float."""
    low, high = -_LARGEST_EXPONENT, _LARGEST_EXPONENT
    if fits(2.0**high):
        return 2.0**high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(2.0**middle) else (low, middle)
    return 2.0**low


def _with_rest(
    found: Mapping[str, int], high: Mapping[str, int], shares: Mapping[str, float], budget: int
) -> dict[str, int]:
    """What rounding, and layers of no importance, leave over goes to the most important layers with room for it."""
    left, raised = budget - sum(found.values()), dict(found)
    for name in sorted(found, key=lambda name: shares[name], reverse=True):
        more = min(left, high[name] - raised[name])
        raised[name] += more
        left -= more
    return raised
