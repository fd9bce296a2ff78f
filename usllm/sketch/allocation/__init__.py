"""Rules over channels by name: how the bits of a layer are shared out over its input channels.

A new one is a file beside these with a function ``allocate``.
"""

from collections.abc import Callable

from usllm.sketch.allocation.layers import layer_rates
from usllm.sketch.allocation.problem import AllocationProblem, AllocationTable
from usllm.sketch.classes import ChannelClass
from usllm.system.discovery import attributes

ALLOCATIONS: dict[str, Callable[[AllocationProblem], AllocationTable]] = attributes(__name__, __path__, "allocate")

__all__ = ["ALLOCATIONS", "AllocationProblem", "AllocationTable", "ChannelClass", "layer_rates"]
