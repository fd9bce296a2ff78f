"""Rates by what the model's loss says: one trade of error for bits over all layers (`docs/method.md` §5).

A weight's error costs the loss ``E[a²] · E[g²]`` times its square, ``a`` the layer's input, ``g`` the loss's gradient
at its output. With ``D(r) = E[w²] · 2^(-2r)`` left at ``r`` bits a weight, the least cost under a total is reverse
water-filling over channels: all that lie above one water level keep an error at that level, the others get nothing.
Only the layers' totals are taken from it; how a layer shares them out is its method's rule.
"""

from __future__ import annotations

import torch
from torch import Tensor

from usllm.compress.budgets.problem import BudgetProblem
from usllm.system.errors import UserError

NEEDS = frozenset({"energy", "gradient"})

_SMALLEST_SHARE = 16  # the mean rate over this is the least that a layer gets
_RANGE = 400.0  # of the water level, base 2, around 1


def share(problem: BudgetProblem) -> dict[str, int]:
    """Ceilings in bits whose water level is the same in all layers, and which together are the model's bits.

    Raises:
        UserError: The model's bits are fewer than the least of its layers; names the least rate.
    """
    layers, budget = problem.layers, problem.bits
    least = {name: layer.least_bits for name, layer in layers.items()}
    if sum(least.values()) > budget:
        rate = sum(least.values()) / sum(layer.weights for layer in layers.values())
        raise UserError(
            f"sketch.bits_per_weight={problem.bits_per_weight:g} is too little for {len(layers)} layers that share it"
            f" by sensitivity: the least they can be stored in takes {rate * 1.0005:.4g}. Raise it to that"
        )
    most = {name: max(layer.most_bits, least[name]) for name, layer in layers.items()}
    smallest = int(problem.bits_per_weight * 2**20) // _SMALLEST_SHARE  # of 2^20 weights, in bits
    wished = {name: min(max(smallest * layers[name].weights >> 20, least[name]), most[name]) for name in layers}
    low = wished if sum(wished.values()) <= budget else least
    levels = {name: _in_octaves(layer.sensitivity, layer.weights) for name, layer in layers.items()}

    def bits(water: float) -> dict[str, int]:
        found = {}
        for name, (octaves, each) in levels.items():
            stored = least[name] + int(0.5 * float((octaves - water).clamp_min(0).sum()) * each)
            found[name] = min(max(stored, low[name]), most[name])
        return found

    dry, flooded = -_RANGE, _RANGE  # too many bits, few enough
    for _ in range(100):
        middle = (dry + flooded) / 2
        dry, flooded = (dry, middle) if sum(bits(middle).values()) <= budget else (middle, flooded)
    return _with_rest(bits(flooded), most, budget)


def _in_octaves(sensitivity: Tensor | None, weights: int) -> tuple[Tensor, float]:
    """Base-2 logarithm of each channel's cost of error, and the weights of a channel."""
    costs = torch.ones(1, dtype=torch.float64) if sensitivity is None else sensitivity.double().cpu()
    return costs.clamp_min(2.0**-_RANGE).log2(), weights / len(costs)


def _with_rest(found: dict[str, int], most: dict[str, int], budget: int) -> dict[str, int]:
    """What rounding leaves over goes to the first layers with room for it."""
    left = budget - sum(found.values())
    for name in found:
        more = min(left, most[name] - found[name])
        found[name] += more
        left -= more
    return found
