"""Projection and query in one on CUDA."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# Annotations mean something else to Triton.

from __future__ import annotations

import torch
from torch import Tensor

from usllm.sketch import Plan
from usllm.sketch.codec import States
from usllm_kernels.compiled_operators import supports
from usllm_kernels.ops.project.triton import project
from usllm_kernels.ops.project_query.reference import add_up_
from usllm_kernels.ops.project_query.triton_sums import error_sums
from usllm_kernels.ops.query.triton import query

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
    states = project(weight, plan, second_moment, winners, output_scale)
    decoded = query(states, plan, dtype)
    if sums is not None:
        if plan.blocks:
            sums.copy_(error_sums(weight, states, plan))
        else:
            add_up_(sums, weight, decoded)
    return states, decoded
