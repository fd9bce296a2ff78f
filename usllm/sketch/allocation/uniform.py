"""Uniform allocation: every channel gets the same number of states, up to one (the paper's ablation)."""

from __future__ import annotations

import torch

from usllm.sketch.allocation.problem import AllocationProblem, AllocationTable, fill, table
from usllm.sketch.classes import ChannelClass


def allocate(problem: AllocationProblem) -> AllocationTable:
    """K or K + 1 states per row and group; the channels with one more are spread evenly over the layer."""
    config = problem.config
    channels = problem.kept.nonzero().flatten()
    everyone = len(channels) == problem.shape[1]
    available = problem.available(2 if everyone else 3)

    def choice(states: int) -> ChannelClass:
        return ChannelClass(config.rows if states else 0, states, config.state_bits if states else 0)

    share = available / max(len(channels), 1)
    low, high = 0, problem.largest_group
    while low < high:  # the most states that all channels can have
        middle = (low + high + 1) // 2
        low, high = (middle, high) if problem.channel_bits(choice(middle)) <= share else (low, middle - 1)
    levels = [choice(0), choice(low), choice(low + 1)] if low else [choice(0), choice(1)]
    if low == problem.largest_group:
        levels = levels[:2]
    level = torch.zeros(problem.shape[1], dtype=torch.int64)
    if low:
        level[channels] = 1
    left = available - len(channels) * problem.channel_bits(choice(low))
    step = problem.channel_bits(levels[-1]) - problem.channel_bits(choice(low))
    if step:
        extra = min(left // step, len(channels))
        spread = torch.arange(extra) * len(channels) // max(extra, 1)
        fill(problem, levels, level, channels[spread].tolist(), left)
    return table(problem, levels, level, channels.tolist())
