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


class ScaleGradient(torch.autograd.Function):
    """Identity on outputs that gives their scales, of which only the stored bytes are computed with, a gradient."""

    @staticmethod
    def forward(output: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def setup_context(
        ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor
    ) -> None:
        ctx.save_for_backward(output, inputs[2])  # type: ignore[arg-type]

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        output, bias = ctx.saved_tensors  # type: ignore[attr-defined]
        scaled = output.float() if bias is None else output.float() - bias.float()
        return gradient, (gradient.float() * scaled).flatten(0, -2).sum(0), None


def scale_gradient(output: Tensor, gain: Tensor, bias: Tensor | None = None) -> Tensor:
    """Outputs that hand their gradient on, and give ``gain``, [out], its own.

    ``d loss / d gain[o] = Σ_tokens (d loss / d output[o]) · (output[o] - bias[o])``. In the ramp of a reconstruction,
    where part of an output is still the latent weight's, the gain learns what would suit the whole of it.

    Args:
        output: [..., out]; without the bias it is in proportion to ``exp(gain)``.
        gain: Logarithm of the outputs' scales.
        bias: That was added to the outputs, [out], or none.
    """
    result: Tensor = ScaleGradient.apply(output, gain, bias)
    return result
