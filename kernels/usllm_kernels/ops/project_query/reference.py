"""The truth about projection and query in one: one after the other, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from usllm import sketch
from usllm.sketch import Plan
from usllm.sketch.codec import States


def supports(plan: Plan) -> None:
    """Every plan."""


def project_query(
    weight: Tensor,
    plan: Plan,
    second_moment: Tensor | None,
    dtype: torch.dtype,
    winners: Tensor | None,
    sums: Tensor | None,
    output_scale: Tensor | None = None,
) -> tuple[States, Tensor]:
    """States, and the decoded weight [out, in], computed in fp32 and rounded to ``dtype``."""
    states = sketch.project(weight, plan, second_moment, winners=winners, output_scale=output_scale)
    decoded = sketch.query(states, plan)
    if sums is not None:
        add_up_(sums, weight, decoded)
    return states, decoded.to(dtype)


def add_up_(sums: Tensor, weight: Tensor, decoded: Tensor) -> None:
    """Over the outputs, the squared error of the decoded weight, and the squared weight, into fp32 [2, in]."""
    latent = weight.float()
    sums[0] = (decoded - latent).square_().sum(0)
    sums[1] = latent.square().sum(0)
