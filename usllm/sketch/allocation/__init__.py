"""Allocation rules by name. A new one is a file beside these and a line in this table."""

from usllm.sketch.allocation import proportional, uniform, waterfill
from usllm.sketch.allocation.problem import AllocationProblem, AllocationTable
from usllm.sketch.allocation.rule import AllocationRule

ALLOCATIONS: dict[str, AllocationRule] = {
    "uniform": uniform,
    "proportional": proportional,
    "waterfill": waterfill,
}

__all__ = ["ALLOCATIONS", "AllocationProblem", "AllocationRule", "AllocationTable"]
