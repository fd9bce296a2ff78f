"""Query on the CPU: states, packed or not -> decoded weight, in compiled loops."""

from usllm_kernels.compiled_operators import supports
from usllm_kernels.cpu.codec import query

__all__ = ["query", "supports"]
