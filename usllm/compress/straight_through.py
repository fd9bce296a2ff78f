"""The straight-through estimator: forward with the decoded weight, gradient to the latent one."""

from __future__ import annotations

import torch
from torch import Tensor


class StraightThrough(torch.autograd.Function):
    """Identity on ``decoded`` whose gradient goes to ``latent`` unchanged; no graph through the sketch."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, latent: Tensor, decoded: Tensor) -> Tensor:
        return decoded.view_as(decoded)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def straight_through(latent: Tensor, decoded: Tensor) -> Tensor:
    """Decoded weight [out, in] that hands its gradient to ``latent`` [out, in] (`docs/method.md` §2).

    The gradient arrives in the decoded weight's dtype and is cast to the latent's by autograd.
    """
    result: Tensor = StraightThrough.apply(latent, decoded)
    return result
