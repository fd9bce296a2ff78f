"""Reverse water-filling: states per group and state bits chosen together, where they reduce the error most.

Minimises ``Σ_j E[a_j²] E[w_j²] d(choice_j)`` under the bit ceiling, ``d`` the operator's measured distortion: the
discrete form of the rate-distortion solution, in which channels under the water level get nothing. `docs/method.md` §4
shows what letting the state bits vary is worth.
"""

from __future__ import annotations

import torch
from torch import Tensor

from usllm.sketch.allocation.distortion import Option, convex_options
from usllm.sketch.allocation.filling import fill, table
from usllm.sketch.allocation.problem import AllocationProblem, AllocationTable
from usllm.sketch.classes import ChannelClass


def smallest(problem: AllocationProblem) -> ChannelClass:
    """One state of one bit per group."""
    return ChannelClass(1, 1, 1)


def largest(problem: AllocationProblem) -> ChannelClass:
    """The choice of least distortion."""
    return convex_options(problem)[-1].choice


def allocate(problem: AllocationProblem) -> AllocationTable:
    """Best choice per channel at the slope that spends the budget; the rest of the bits go by gain."""
    energy = problem.importance * problem.weight_energy * problem.kept
    if not energy.any():
        energy = problem.kept.to(torch.float64)
    found = _allocate(problem, energy, own=0)
    if problem.left_over(found) > problem.negligible_bits:  # steps are coarse where channels are long
        found = min(found, _allocate(problem, energy, own=1), key=problem.left_over)
    return found


def _allocate(problem: AllocationProblem, energy: Tensor, own: int) -> AllocationTable:
    """The answer with room in its table for ``own`` classes more."""
    options = _fitting_options(problem, energy, own)
    available = problem.available(len(options))
    level = _solve(options, energy, available)
    levels = [option.choice for option in options]
    gain = torch.cat([_slopes(options), torch.zeros(1, dtype=torch.float64)])[level] * energy
    by_gain = torch.argsort(gain, descending=True, stable=True).tolist()
    left = available - sum(options[i].bits for i in level.tolist())
    fill(problem, levels, level, [j for j in by_gain if energy[j] > 0], left)
    by_energy = torch.argsort(energy, descending=True, stable=True).tolist()
    return table(problem, levels, level, [j for j in by_energy if energy[j] > 0], smallest(problem))


def _fitting_options(problem: AllocationProblem, energy: Tensor, own: int) -> list[Option]:
    """The options to choose among, "store nothing" first: as many as there is room for in the table."""
    options = convex_options(problem)
    most = max(problem.max_classes() - own, 2)
    while True:
        count = min(most, len(options))
        level = _solve(options, energy, problem.available(count))
        used = torch.unique(level).tolist()
        if len(used) <= count:
            break
        members = torch.bincount(level, minlength=len(options))
        del options[min(used[1:], key=lambda i: int(members[i]))]  # the class that fewest channels use
    # Filling may use the next option up, but no more classes than there is room for.
    up = min(used[-1] + 2, len(options))
    return options[:up] if up <= count else [options[i] for i in used]


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
