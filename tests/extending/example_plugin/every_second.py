"""A rule over channels: every second input channel gets states, all of them alike."""

import torch

from usllm.sketch.allocation import ALLOCATIONS, AllocationProblem, AllocationTable
from usllm.sketch.classes import EMPTY, ChannelClass


def allocate(problem: AllocationProblem) -> AllocationTable:
    """The most states that every second channel can have."""
    chosen = torch.arange(problem.shape[1]) % 2 == 0
    share = problem.available(2) // int(chosen.sum())
    states = problem.largest_group
    config = problem.config
    while states and problem.channel_bits(ChannelClass(config.rows, states, config.state_bits)) > share:
        states -= 1
    if not states:
        return AllocationTable((EMPTY,), torch.zeros(problem.shape[1], dtype=torch.uint8))
    return AllocationTable((EMPTY, ChannelClass(config.rows, states, config.state_bits)), chosen.to(torch.uint8))


ALLOCATIONS["every_second"] = allocate
