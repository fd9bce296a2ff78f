"""The states' gradient on the CPU, in compiled loops."""

from usllm_kernels.compiled_operators import supports
from usllm_kernels.cpu.state_gradient import state_gradient_

__all__ = ["state_gradient_", "supports"]
