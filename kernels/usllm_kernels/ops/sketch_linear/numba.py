"""Products with the decoded weight on the CPU, in compiled loops."""

from usllm_kernels.compiled_operators import supports
from usllm_kernels.cpu.linear import input_gradient, sketch_linear

__all__ = ["input_gradient", "sketch_linear", "supports"]
