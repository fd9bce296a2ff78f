"""The paper's allocation: states in proportion to E[a²].

``K_j = min(G, μ I_j)`` with μ such that the budget is met: what the clip frees is shared out again. A layer stores at
most 16 different K, so each K_j is first taken down to a geometric ladder; the bits this frees lift the channels
with the largest remainder to the next rung until none fits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from usllm.sketch.allocation.problem import EMPTY, AllocationProblem, AllocationTable, ChannelClass, fill, table


def allocate(problem: AllocationProblem) -> AllocationTable:
    """States per channel in proportion to importance, clipped to [0, G]."""
    config = problem.config
    count = problem.max_classes()
    available = problem.available(count)
    ideal = _ideal_states(problem, available)
    rungs = _ladder(ideal, count - 1)
    levels = [EMPTY] + [ChannelClass(config.rows, rung, config.state_bits) for rung in rungs]
    heights = torch.tensor([0, *rungs], dtype=torch.float64)
    level = (torch.searchsorted(heights, ideal, right=True) - 1).clamp_min(0)
    costs = torch.tensor([problem.channel_bits(choice) for choice in levels])
    # Scales are paid by the channel, not by the state: take down the least important until all fits.
    for channel in torch.argsort(ideal, stable=True).tolist():
        if int(costs[level].sum()) <= available:
            break
        level[channel] = 0
    left = available - int(costs[level].sum())
    above = heights[(level + 1).clamp_max(len(rungs))]
    remainder = (ideal - heights[level]) / (above - heights[level]).clamp_min(1)
    order = torch.argsort(remainder, descending=True, stable=True)
    fill(problem, levels, level, [j for j in order.tolist() if problem.kept[j] and ideal[j] > 0], left)
    return table(levels, level)


def _ideal_states(problem: AllocationProblem, available: int) -> Tensor:
    """Real-valued states per channel that spend the budget, float64 [in]; channels under one state get none."""
    config = problem.config
    cap = problem.largest_group
    one = problem.channel_bits(ChannelClass(config.rows, 1, config.state_bits))
    scale_bits = problem.channel_bits(ChannelClass(config.rows, 1, 0))
    importance = problem.importance * problem.kept
    if not importance.any():
        importance = problem.kept.to(torch.float64)

    def states(mu: float) -> Tensor:
        wanted = (importance * mu).clamp_max(cap)
        return torch.where(wanted >= 0.5, wanted, 0.0)

    def cost(mu: float) -> float:
        wanted = states(mu)
        return float(wanted.sum() * (one - scale_bits) + (wanted > 0).sum() * scale_bits)

    low, high = 0.0, 1.0
    while cost(high) < available and high * float(importance[importance > 0].min()) < cap:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) <= available else (low, middle)
    return states(low)


def _ladder(ideal: Tensor, rungs: int) -> list[int]:
    """At most ``rungs`` whole numbers from the smallest to the largest positive ideal, about geometric."""
    positive = ideal[ideal > 0]
    if not len(positive):
        return [1]
    low, high = max(int(positive.min()), 1), max(round(float(positive.max())), 1)
    if high - low < rungs:
        return list(range(low, high + 1))
    for steps in range(4 * rungs, 1, -1):  # small rungs coincide after rounding: ask for more until they fill
        ladder = sorted({round(low * (high / low) ** (i / (steps - 1))) for i in range(steps)})
        if len(ladder) <= rungs:
            return ladder
    return [high]
