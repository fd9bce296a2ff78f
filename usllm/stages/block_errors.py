"""How far a block's output is from its target: what reconstruction minimises, and what it reports."""

from __future__ import annotations

import torch
from torch import Tensor

ENERGY_FLOOR = 0.05
"""Of the median energy of a batch's targets: the least that a token's error is divided by."""


def relative_error(output: Tensor, target: Tensor) -> Tensor:
    """Mean over tokens of the squared error over the target's energy, fp32 scalar.

    Args:
        output: [sequences, context, hidden].
        target: Of the same shape.
    """
    difference = (output.float() - target.float()).square().sum(-1)
    energy = target.float().square().sum(-1)
    return (difference / energy.clamp_min(ENERGY_FLOOR * energy.median())).mean()


@torch.no_grad()
def increment_error(student: Tensor, dense: Tensor) -> float:
    """``‖Δ_student - Δ_dense‖ / ‖Δ_dense‖`` of what a block adds to the stream, over all tokens.

    Near 1 the block might as well be left out, however small the error of the stream that runs past it.

    Args:
        student: What the compressed block adds to its own stream, [sequences, context, hidden].
        dense: What the dense block adds to the dense stream, of the same shape.
    """
    error = torch.linalg.vector_norm(student.float() - dense.float())
    return float(error / torch.linalg.vector_norm(dense.float()).clamp_min(1e-30))
