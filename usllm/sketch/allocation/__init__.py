"""Rules over channels by name: how the bits of a layer are shared out over its input channels.

A new one is a file beside these with the functions of :class:`usllm.sketch.allocation.rule.AllocationRule`.
"""

from usllm.sketch.allocation.problem import AllocationProblem, AllocationTable
from usllm.sketch.allocation.rule import AllocationRule
from usllm.system.discovery import modules_with

ALLOCATIONS: dict[str, AllocationRule] = modules_with(__name__, __path__, "allocate")

__all__ = ["ALLOCATIONS", "AllocationProblem", "AllocationRule", "AllocationTable"]
