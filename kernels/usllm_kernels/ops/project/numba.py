"""Projection on the CPU: latent weight -> states, in compiled loops."""

from __future__ import annotations

from torch import Tensor

from usllm.sketch import Plan
from usllm.sketch.codec import States
from usllm_kernels.compiled_operators import supports
from usllm_kernels.cpu import codec

__all__ = ["project", "supports"]


def project(
    weight: Tensor,
    plan: Plan,
    second_moment: Tensor | None = None,
    winners: Tensor | None = None,
    output_scale: Tensor | None = None,
) -> States:
    """States of a latent weight [out, in] of any strides and float type."""
    return codec.project(weight.float(), plan, second_moment, winners, output_scale)
