"""Allocation rules by name. A new one is a file beside these and a line in this table."""

from collections.abc import Callable

from usllm.sketch.allocation import proportional, uniform, waterfill
from usllm.sketch.allocation.layers import layer_rates
from usllm.sketch.allocation.problem import AllocationProblem, AllocationTable
from usllm.sketch.classes import ChannelClass

ALLOCATIONS: dict[str, Callable[[AllocationProblem], AllocationTable]] = {
    "uniform": uniform.allocate,
    "proportional": proportional.allocate,
    "waterfill": waterfill.allocate,
}

__all__ = ["ALLOCATIONS", "AllocationProblem", "AllocationTable", "ChannelClass", "layer_rates"]
