"""Uniform allocation: every channel gets the same number of states, up to one (the paper's ablation).

What is left over then, less than one state more in one channel, may make one channel differ: :func:`filling.table`.
"""

from __future__ import annotations

import torch

from usllm.sketch.allocation.filling import table
from usllm.sketch.allocation.problem import AllocationProblem, AllocationTable
from usllm.sketch.classes import EMPTY


def allocate(problem: AllocationProblem) -> AllocationTable:
    """K or K + 1 states per row and group; the channels with one more are spread evenly over the layer."""
    channels = problem.kept.nonzero().flatten()
    some_empty = len(channels) < problem.shape[1]
    low = problem.widest(
        problem.one_state, problem.available(3 if some_empty else 2) // len(channels)
    )  # all kept channels have it
    levels = [low, problem.one_state._replace(states=min(low.states + 1, problem.largest_group))]
    if some_empty and low != EMPTY:
        levels.insert(0, EMPTY)
    level = torch.zeros(problem.shape[1], dtype=torch.int64)
    level[channels] = len(levels) - 2
    base, above = (problem.channel_bits(choice) for choice in levels[-2:])
    if above > base:
        extra = min((problem.available(len(levels)) - len(channels) * base) // (above - base), len(channels))
        level[channels[torch.arange(extra) * len(channels) // max(extra, 1)]] += 1
    return table(problem, levels, level, channels.tolist(), problem.one_state)
