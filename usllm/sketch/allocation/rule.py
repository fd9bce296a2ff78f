"""What an allocation rule is: a module with these three functions."""

from __future__ import annotations

from typing import Protocol

from usllm.sketch.allocation.problem import AllocationProblem, AllocationTable
from usllm.sketch.classes import ChannelClass


class AllocationRule(Protocol):
    """One way to share the bits of a layer out over its input channels. Rules are pure functions of the problem."""

    @staticmethod
    def allocate(problem: AllocationProblem) -> AllocationTable:
        """Classes of all channels, within the budget; called where a table of two classes and the smallest fit."""
        ...

    @staticmethod
    def smallest(problem: AllocationProblem) -> ChannelClass:
        """The class of fewest bits that a channel with states gets."""
        ...

    @staticmethod
    def largest(problem: AllocationProblem) -> ChannelClass:
        """The class of most bits: a layer whose kept channels all have it has no use for more."""
        ...
