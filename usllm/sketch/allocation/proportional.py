"""The paper's allocation: states in proportion to E[a²].

``K_j = min(G, μ I_j)`` with μ such that the budget is met: what the clip frees is shared out again. A layer stores at
most 16 different K, so each K_j is first taken down to the nearest of the few that lose least; the bits this frees lift
the channels with the largest remainder to the next until none fits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from usllm.sketch.allocation.filling import fill, table
from usllm.sketch.allocation.problem import AllocationProblem, AllocationTable
from usllm.sketch.classes import EMPTY

_LEAST_SHARE = 1e-12  # of the largest importance: below it channels wait alike


def allocate(problem: AllocationProblem) -> AllocationTable:
    """States per channel in proportion to importance, clipped to [0, G]."""
    count = problem.max_classes()
    while True:
        found = _allocate(problem, count, own=0)
        if problem.left_over(found) > problem.negligible_bits and count > 2:
            found = min(found, _allocate(problem, count, own=1), key=problem.left_over)
        if count == 2 or len(found.classes) > count // 2:
            return found
        count //= 2  # a smaller table would have done: its bits go to states


def _allocate(problem: AllocationProblem, count: int, own: int) -> AllocationTable:
    """The answer with at most ``count`` classes, ``own`` of them kept for a channel whose class is cut to fit."""
    importance = problem.importance * problem.kept
    if not importance.any():
        importance = problem.kept.to(torch.float64)
    share = torch.where(importance > 0, (importance / importance.max()).clamp_min(_LEAST_SHARE), 0.0)
    available = problem.available(count)
    mu = _states_per_share(problem, share, available)
    wanted = _whole(problem, share * mu)
    some_empty = bool((wanted == 0).any())
    rungs = _rungs(wanted, share, count - some_empty - own, problem.largest_group)
    levels = [problem.one_state._replace(states=rung) for rung in rungs]
    heights = torch.tensor(rungs, dtype=torch.float64)
    if some_empty:
        levels, heights = [EMPTY, *levels], torch.cat([heights.new_zeros(1), heights])
    level = torch.searchsorted(heights, wanted, right=True) - 1
    left = available - sum(problem.channel_bits(levels[i]) for i in level.tolist())
    above = heights[(level + 1).clamp_max(len(levels) - 1)]
    remainder = (share * mu - heights[level]) / (above - heights[level]).clamp_min(1)
    order = [j for j in torch.argsort(remainder, descending=True, stable=True).tolist() if share[j] > 0]
    fill(problem, levels, level, order, left)
    return table(problem, levels, level, order, problem.one_state)


def _whole(problem: AllocationProblem, wanted: Tensor) -> Tensor:
    """Whole states per channel, float64 [in]: none below a half, at least one above it."""
    return torch.where(wanted >= 0.5, wanted.clamp(1, problem.largest_group).floor(), 0.0)


def _states_per_share(problem: AllocationProblem, share: Tensor, available: int) -> float:
    """The largest μ, up to where all channels are full, whose whole states fit into the available bits."""
    scale_bits = problem.channel_bits(problem.one_state._replace(bits=0))
    state_bits = problem.channel_bits(problem.one_state) - scale_bits

    def fits(mu: float) -> bool:
        states = _whole(problem, share * mu)
        return float(states.sum() * state_bits + (states > 0).sum() * scale_bits) <= available

    low, high = 0.0, 2 * problem.largest_group / float(share[share > 0].min())
    for _ in range(120):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _rungs(wanted: Tensor, share: Tensor, count: int, cap: int) -> list[int]:
    """At most ``count`` numbers of states, rising, that channels are taken down to and lifted through."""
    values, which = torch.unique(wanted[wanted > 0], return_inverse=True)
    waiting = bool(((wanted == 0) & (share > 0)).any())  # for one state, where bits are left
    if not len(values):
        return [1]
    if len(values) + waiting > count:
        first = [1] if waiting and count > 1 else []
        return sorted({*first, *_ladder(values, which, share[wanted > 0], count - len(first))})
    # Room for the rung above, commonest values first: what is left over can go there.
    common = torch.bincount(which).argsort(descending=True, stable=True)
    found = {int(value) for value in values} | ({1} if waiting else set())
    for above in (int(values[i]) + 1 for i in common.tolist() if values[i] < cap):
        if len(found) < count:
            found.add(above)
    return sorted(found)


def _ladder(values: Tensor, which: Tensor, share: Tensor, rungs: int) -> list[int]:
    """The ``rungs`` of the values that cost least when every channel is taken down to the next of them.

    The cost of a channel is its share of importance times the states it loses; solved exactly by dynamic programming
    over the distinct values.

    Args:
        values: Distinct numbers of states, rising, float64 [values].
        which: Each channel's place among them, int64 [channels].
        share: Importance of each channel, float64 [channels].
        rungs: How many to keep.
    """
    weight = torch.zeros_like(values).scatter_add_(0, which, share)
    mass = torch.cat([values.new_zeros(1), weight.cumsum(0)])
    moment = torch.cat([values.new_zeros(1), (weight * values).cumsum(0)])
    # loss[a, b]: values a … b taken down to value a
    loss = (moment[1:] - moment[:-1, None]) - values[:, None] * (mass[1:] - mass[:-1, None])
    loss.masked_fill_(torch.ones_like(loss, dtype=torch.bool).tril(-1), torch.inf)
    best, first = loss[0], []
    for _ in range(min(rungs, len(values)) - 1):
        before = torch.cat([best.new_full((1,), torch.inf), best[:-1]])
        best, start = (before[:, None] + loss).min(0)
        first.append(start)
    ladder, last = [], len(values) - 1
    for start in reversed(first):
        lowest = int(start[last])
        ladder.append(int(values[lowest]))
        last = lowest - 1
    return [int(values[0]), *reversed(ladder)]
