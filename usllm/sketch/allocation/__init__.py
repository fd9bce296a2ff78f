"""Rules over channels by name: how the bits of a layer are shared out over its input channels.

A new one is a file beside these with a function ``allocate``. It keeps to classes of the configured rows and width, or
has functions ``smallest`` and ``largest`` that name the classes of fewest and of most bits that it gives to channels.
"""

from collections.abc import Callable

from usllm.sketch.allocation.problem import AllocationProblem, AllocationTable
from usllm.sketch.classes import ChannelClass
from usllm.system.discovery import attributes

ALLOCATIONS: dict[str, Callable[[AllocationProblem], AllocationTable]] = attributes(__name__, __path__, "allocate")
SMALLEST: dict[str, Callable[[AllocationProblem], ChannelClass]] = attributes(__name__, __path__, "smallest")
LARGEST: dict[str, Callable[[AllocationProblem], ChannelClass]] = attributes(__name__, __path__, "largest")

__all__ = ["ALLOCATIONS", "LARGEST", "SMALLEST", "AllocationProblem", "AllocationTable", "ChannelClass"]
