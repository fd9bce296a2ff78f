"""Reverse water-filling: states per group and state bits chosen together, where they reduce the error most.

Minimises ``Σ_j E[a_j²] E[w_j²] d(choice_j)`` under the bit ceiling, ``d`` the operator's measured distortion: the
discrete form of the rate-distortion solution, in which channels under the water level get nothing. `docs/method.md` §4
shows what letting the state bits vary is worth.
"""

from __future__ import annotations

import torch
from torch import Tensor

from usllm.sketch.allocation.distortion import Option, convex_options
from usllm.sketch.allocation.problem import AllocationProblem, AllocationTable, fill, table
from usllm.sketch.classes import EMPTY, ChannelClass

_NEGLIGIBLE = 0.01


def allocate(problem: AllocationProblem) -> AllocationTable:
    """Best choice per channel at the slope that spends the budget; the rest of the bits go by gain."""
    energy = problem.importance * problem.weight_energy * problem.kept
    if not energy.any():
        energy = problem.kept.to(torch.float64)
    levels, level, left = _fit(problem, energy, reserved=0)
    if left > _NEGLIGIBLE * problem.budget_bits:  # steps are coarse where channels are long: one class is cut to fit
        levels, level, left = _fit(problem, energy, reserved=1)
        _spend_rest(problem, levels, level, energy, left)
    return table(
        problem, levels, level, [j for j in energy.argsort(descending=True, stable=True).tolist() if energy[j] > 0]
    )


def _fit(problem: AllocationProblem, energy: Tensor, reserved: int) -> tuple[list[ChannelClass], Tensor, int]:
    """Classes by rising bits, the class of each channel, and the bits left, with room for ``reserved`` more classes."""
    options = convex_options(problem)
    most = max(problem.max_classes() - reserved, 2)
    while True:
        count = min(most, len(options))
        available = problem.available(count + reserved)
        level = _solve(options, energy, available)
        used = torch.unique(level).tolist()
        if len(used) <= count:
            break
        members = torch.bincount(level, minlength=len(options))
        del options[min(used[1:], key=lambda i: int(members[i]))]  # the class that fewest channels use
    # Filling may use the next option up, but no more classes than there is room for.
    options = options[: used[-1] + 2] if used[-1] + 2 <= count else [options[i] for i in used]
    available = problem.available(len(options) + reserved)
    level = _solve(options, energy, available)
    levels = [option.choice for option in options]
    left = available - sum(options[i].bits for i in level.tolist())
    gain = torch.cat([_slopes(options), torch.zeros(1, dtype=torch.float64)])[level] * energy
    order = torch.argsort(gain, descending=True, stable=True)
    left = fill(problem, levels, level, [j for j in order.tolist() if energy[j] > 0], left)
    return levels, level, left


def _spend_rest(
    problem: AllocationProblem, levels: list[ChannelClass], level: Tensor, energy: Tensor, left: int
) -> None:
    """Give the most important channel without states as many one-bit states as still fit; in place."""
    if EMPTY not in levels:
        return
    empty = levels.index(EMPTY)
    waiting = torch.where(level == empty, energy, -1.0)
    channel = int(waiting.argmax())
    states = problem.largest_group
    while states and problem.channel_bits(ChannelClass(1, states, 1)) > left:
        states -= 1
    if states and float(waiting[channel]) > 0:
        level[level > empty] += 1
        level[channel] = empty + 1  # levels rise in bits
        levels.insert(empty + 1, ChannelClass(1, states, 1))


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
