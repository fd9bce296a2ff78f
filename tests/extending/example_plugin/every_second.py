"""A rule over channels: every second input channel gets states, all of them alike."""

import torch

from usllm.sketch.allocation import ALLOCATIONS, AllocationProblem, AllocationTable
from usllm.sketch.classes import EMPTY


def allocate(problem: AllocationProblem) -> AllocationTable:
    """The most states that every second of the channels that may hold some can have."""
    channels = problem.kept.nonzero().flatten()[::2]
    chosen = torch.zeros(problem.shape[1], dtype=torch.uint8)
    chosen[channels] = 1
    choice = problem.widest(problem.one_state, problem.available(2) // len(channels))
    return AllocationTable((EMPTY, choice), chosen)


ALLOCATIONS["every_second"] = allocate
