"""Projection and query in one on the CPU, in compiled loops."""

from __future__ import annotations

import torch
from torch import Tensor

from usllm.sketch import Plan
from usllm.sketch.codec import States
from usllm_kernels.compiled_operators import supports
from usllm_kernels.cpu import codec

__all__ = ["project_query", "supports"]


def project_query(
    weight: Tensor,
    plan: Plan,
    second_moment: Tensor | None,
    dtype: torch.dtype,
    winners: Tensor | None,
    sums: Tensor | None,
    output_scale: Tensor | None = None,
) -> tuple[States, Tensor]:
    """States, and the decoded weight [out, in]."""
    return codec.project_query(weight.float(), plan, second_moment, dtype, winners, sums, output_scale)
