"""Products from codes in output order on the CPU, in compiled loops."""

from usllm_kernels.cpu.plane_linear import columns_weight, plane_linear
from usllm_kernels.planes import Planes

__all__ = ["columns_weight", "plane_linear", "supports"]


def supports(planes: Planes) -> None:
    """All planes."""
