"""The truth about products with the sketch: decode, then multiply, in plain torch."""

from __future__ import annotations

from torch import Tensor

from usllm.sketch import Plan
from usllm.sketch.codec import States
from usllm_kernels.ops.query.reference import query


def supports(plan: Plan) -> None:
    """Every plan."""


def sketch_linear(x: Tensor, states: States, plan: Plan) -> Tensor:
    """``x Ŵᵀ``, [tokens, out], in the dtype of ``x`` [tokens, in]."""
    return x @ query(states, plan, x.dtype).t()


def input_gradient(gradient: Tensor, states: States, plan: Plan) -> Tensor:
    """``dy Ŵ``, [tokens, in], in the dtype of ``gradient`` [tokens, out]."""
    return gradient @ query(states, plan, gradient.dtype)
