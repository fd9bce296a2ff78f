"""A rule over channels: every second input channel gets states, all of them alike."""

import sys

import torch

from usllm.sketch.allocation import ALLOCATIONS, AllocationProblem, AllocationTable
from usllm.sketch.allocation.uniform import largest, smallest  # noqa: F401 (a rule has three functions)
from usllm.sketch.classes import EMPTY


def allocate(problem: AllocationProblem) -> AllocationTable:
    """The most states that every second channel can have."""
    chosen = (torch.arange(problem.shape[1]) % 2 == 0).to(torch.uint8)
    choice = problem.widest(smallest(problem), problem.available(2) // int(chosen.sum()))
    return AllocationTable((EMPTY, choice), chosen)


ALLOCATIONS["every_second"] = sys.modules[__name__]
