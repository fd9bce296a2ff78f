"""Products from codes in output order on the CPU, in compiled loops."""

from usllm_kernels.cpu.plane_linear import plane_linear, plane_weight
from usllm_kernels.planes import Planes

__all__ = ["plane_linear", "plane_weight", "supports"]


def supports(planes: Planes) -> None:
    """All planes."""
