"""The paper's allocation: states in proportion to E[a²].

``K_j = min(G, μ I_j)`` with μ such that the budget is met: what the clip frees is shared out again. A layer stores at
most 16 different K, so each K_j is first taken down to the nearest of the fifteen that lose least; the bits this
frees lift the channels with the largest remainder to the next until none fits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from usllm.sketch.allocation.problem import AllocationProblem, AllocationTable, fill, table
from usllm.sketch.classes import EMPTY, ChannelClass


def allocate(problem: AllocationProblem) -> AllocationTable:
    """States per channel in proportion to importance, clipped to [0, G]."""
    count = problem.max_classes()
    while True:
        found = _allocate(problem, count)
        if count == 2 or len(found.classes) > count // 2:
            return found
        count //= 2  # a smaller table would have done: its bits go to states


def _allocate(problem: AllocationProblem, count: int) -> AllocationTable:
    config = problem.config
    available = problem.available(count)
    ideal = _ideal_states(problem, available)
    empty = bool((ideal == 0).any())
    rungs = _ladder(ideal, problem.importance, count - empty, problem.largest_group)
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
    order_of_kept = [j for j in order.tolist() if problem.kept[j] and ideal[j] > 0]
    fill(problem, levels, level, order_of_kept, left)
    return table(problem, levels, level, order_of_kept)


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


def _ladder(ideal: Tensor, importance: Tensor, rungs: int, cap: int) -> list[int]:
    """The at most ``rungs`` whole numbers that cost least when every channel is taken down to the next of them.

    The cost of a channel is its importance times the states it loses; solved exactly by dynamic programming over the
    distinct values.
    """
    wanted = ideal.floor().clamp_min(1)[ideal > 0]
    values, which = torch.unique(wanted, return_inverse=True)
    if not len(values):
        return [1]
    if len(values) <= rungs:  # room for the rung above, commonest values first: what is left over can go there
        common = torch.bincount(which).argsort(descending=True, stable=True)
        above = [int(values[i]) + 1 for i in common.tolist() if values[i] < cap]
        return sorted({int(value) for value in values} | set(above[: rungs - len(values)]))
    weight = torch.zeros_like(values).scatter_add_(0, which, importance[ideal > 0])
    mass = torch.cat([values.new_zeros(1), weight.cumsum(0)])
    moment = torch.cat([values.new_zeros(1), (weight * values).cumsum(0)])
    # loss[a, b]: values a … b taken down to value a
    loss = (moment[1:] - moment[:-1, None]) - values[:, None] * (mass[1:] - mass[:-1, None])
    loss.masked_fill_(torch.ones_like(loss, dtype=torch.bool).tril(-1), torch.inf)
    best, first = loss[0], []
    for _ in range(rungs - 1):
        before = torch.cat([best.new_full((1,), torch.inf), best[:-1]])
        best, start = (before[:, None] + loss).min(0)
        first.append(start)
    ladder, last = [], len(values) - 1
    for start in reversed(first):
        lowest = int(start[last])
        ladder.append(int(values[lowest]))
        last = lowest - 1
    return [int(values[0]), *reversed(ladder)]
