"""Signs times scales: ``F[i, k] = ±rows[i] * columns[k]``, one of the two thin matrices that a path multiplies with.

A path is ``y = h ∘ (sign(U) (l ∘ (sign(V)ᵀ (g ∘ x))))``. With ``F_V = diag(g) sign(V) diag(l)`` [in, rank] and
``F_U = diag(h) sign(U)`` [out, rank] that is ``y = F_U F_Vᵀ x``: scales are multiplied into matrices of the size of the
factors, never into activations. The sign is the sign bit, so that -0 is negative.

Backward, with ``D`` the gradient of ``F`` and ``s`` the signs:
``rows: Σ_k D s columns``, ``columns: Σ_i D s rows``, ``latent: D rows columns · d``, where ``d`` is 1, or
``slope (1 - tanh²(slope latent))``.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LARGEST_SCALE = torch.finfo(torch.float16).max


def stored_scale(scale: Tensor) -> Tensor:
    """A scale as it is stored, fp16; it saturates instead of becoming infinite."""
    return scale.detach().clamp(-_LARGEST_SCALE, _LARGEST_SCALE).half()


def scaled(signs: Tensor, rows: Tensor, columns: Tensor | None) -> Tensor:
    """``signs * rows[:, None] * columns``, in the place of ``signs``.

    Args:
        signs: ±1, fp32 [n, rank].
        rows: fp16 [n].
        columns: fp16 [rank]; ``None``: ones.
    """
    signs.mul_(rows.float()[:, None])
    return signs if columns is None else signs.mul_(columns.float())


class ScaledSigns(torch.autograd.Function):
    """``F`` from latents and scales, which it reads as they are stored; gradients as above."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        latent: Tensor,
        rows: Tensor,
        columns: Tensor | None,
        slope: float,
        dtype: torch.dtype,
    ) -> Tensor:
        kept = [latent, stored_scale(rows)] + ([] if columns is None else [stored_scale(columns)])
        ctx.save_for_backward(*kept)
        ctx.slope = slope  # type: ignore[attr-defined]
        return scaled(_signs(latent), kept[1], kept[2] if len(kept) > 2 else None).to(dtype)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, gradient: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None, None, None]:
        latent, stored_rows, *more = ctx.saved_tensors  # type: ignore[attr-defined]
        rows = stored_rows.float()
        gradient = gradient.float()
        signed = gradient * _signs(latent)
        if more:
            columns = more[0].float()
            of_rows, of_columns = signed @ columns, rows @ signed
            of_latent = (gradient * rows[:, None]).mul_(columns)
        else:
            of_rows, of_columns = signed.sum(1), None
            of_latent = gradient * rows[:, None]
        slope: float = ctx.slope  # type: ignore[attr-defined]
        if slope:
            of_latent.mul_(torch.tanh(latent * slope).square_().neg_().add_(1)).mul_(slope)
        return of_latent, of_rows, of_columns, None, None


def scaled_signs(latent: Tensor, rows: Tensor, columns: Tensor | None, slope: float, dtype: torch.dtype) -> Tensor:
    """``F`` [n, rank] in ``dtype``, computed in fp32, of latents [n, rank] and scales [n] and [rank], all fp32."""
    result: Tensor = ScaledSigns.apply(latent, rows, columns, slope, dtype)
    return result


def _signs(latent: Tensor) -> Tensor:
    return torch.copysign(torch.ones_like(latent, dtype=torch.float32), latent)
