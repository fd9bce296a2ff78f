"""A rule over channels: every second input channel gets states, all of them alike."""

import torch

from usllm.sketch.allocation import ALLOCATIONS, AllocationProblem, AllocationTable
from usllm.sketch.classes import EMPTY, ChannelClass


def allocate(problem: AllocationProblem) -> AllocationTable:
    """The most states that every second channel can have."""
    chosen = (torch.arange(problem.shape[1]) % 2 == 0).to(torch.uint8)
    choice = problem.widest(
        ChannelClass(problem.config.rows, 1, problem.config.state_bits), problem.available(2) // int(chosen.sum())
    )
    return AllocationTable((EMPTY, choice), chosen)


ALLOCATIONS["every_second"] = allocate
