"""Reverse water-filling: states per group and state bits chosen together, where they reduce the error most.

Minimises ``Σ_j E[a_j²] E[w_j²] d(choice_j)`` under the bit ceiling, ``d`` the operator's measured distortion: the
discrete form of the rate-distortion solution, in which channels under the water level get nothing. `method.md` §4
shows what letting the state bits vary is worth.
"""

from __future__ import annotations

import torch
from torch import Tensor

from usllm.sketch.allocation.distortion import Option, convex_options
from usllm.sketch.allocation.problem import AllocationProblem, AllocationTable, fill, table


def allocate(problem: AllocationProblem) -> AllocationTable:
    """Best choice per channel at the slope that spends the budget; the rest of the bits go by gain."""
    energy = problem.importance * problem.weight_energy * problem.kept
    if not energy.any():
        energy = problem.kept.to(torch.float64)
    options = convex_options(problem)
    while True:
        count = min(problem.max_classes(), len(options))
        available = problem.available(count)
        level = _solve(options, energy, available)
        used = torch.unique(level).tolist()
        if len(used) <= count:
            break
        members = torch.bincount(level, minlength=len(options))
        del options[min(used[1:], key=lambda i: int(members[i]))]  # the class that fewest channels use
    options = options[: used[-1] + 2]
    if len(options) > count:  # keep the classes in use: filling may not add one
        options = [options[i] for i in used]
        level = _solve(options, energy, available)
    bits = torch.tensor([option.bits for option in options])
    gain = torch.cat([_slopes(options), torch.zeros(1, dtype=torch.float64)])[level] * energy
    order = torch.argsort(gain, descending=True, stable=True)
    levels = [option.choice for option in options]
    fill(problem, levels, level, [j for j in order.tolist() if energy[j] > 0], available - int(bits[level].sum()))
    return table(levels, level)


def _slopes(options: list[Option]) -> Tensor:
    """Distortion saved per bit from each option to the next, float64 [options - 1], falling."""
    distortion = torch.tensor([option.distortion for option in options], dtype=torch.float64)
    bits = torch.tensor([option.bits for option in options], dtype=torch.float64)
    return -distortion.diff() / bits.diff()


def _solve(options: list[Option], energy: Tensor, available: int) -> Tensor:
    """Option of each channel, int64 [in], at the smallest λ whose choices fit into the available bits."""
    thresholds = 1.0 / _slopes(options)  # channel j takes step k where energy_j / λ >= threshold_k
    bits = torch.tensor([option.bits for option in options])

    def choose(log_lambda: float) -> Tensor:
        return torch.searchsorted(thresholds, energy * 2.0**-log_lambda, right=True)

    low, high = -200.0, 200.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (low, middle) if int(bits[choose(middle)].sum()) <= available else (middle, high)
    return choose(high)
