"""The truth about projection: :func:`usllm.sketch.project`, in plain torch."""

from __future__ import annotations

from torch import Tensor

from usllm import sketch
from usllm.sketch import Plan
from usllm.sketch.codec import States


def supports(plan: Plan) -> None:
    """Every plan."""


def project(
    weight: Tensor,
    plan: Plan,
    second_moment: Tensor | None = None,
    winners: Tensor | None = None,
    output_scale: Tensor | None = None,
) -> States:
    """States of a latent weight [out, in]."""
    return sketch.project(weight, plan, second_moment, winners=winners, output_scale=output_scale)
