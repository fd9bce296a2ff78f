"""The Dual-SVID start: singular vectors give the latents, rank-1 fits of their magnitudes the scales.

With ``W ≈ U' V'ᵀ``, ``U' = U √S`` and ``V' = V √S`` of the truncated singular value decomposition, signs are those of
``U'`` and ``V'``, and ``|U'| ≈ h l_Uᵀ``, ``|V'| ≈ g l_Vᵀ``, ``l = l_U ∘ l_V``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_POWER_ITERATIONS = 16  # of a matrix without negative entries, whose second singular value is far below the first


class Path(NamedTuple):
    """One pair of factors with its scales, fp32.

    Attributes:
        u: Latents of the output side, [out, rank].
        v: Latents of the input side, [in, rank].
        h: Output scales, [out].
        l: Scales in between, [rank].
        g: Input scales, [in].
    """

    u: Tensor
    v: Tensor
    h: Tensor
    l: Tensor  # noqa: E741  # its name in the formula
    g: Tensor

    def product(self) -> Tensor:
        """The weight that the signs and scales stand for, fp32 [out, in]."""
        return (self.h[:, None] * _signs(self.u) * self.l) @ (self.g[:, None] * _signs(self.v)).T


def dual_svid(weight: Tensor, rank: int) -> Path:
    """The start of one path.

    The sign of a latent is all that is seen of it. Its size says how far it is from changing: both factors are scaled
    to the root mean square of the weight, so that a learning rate means what it means for the weight itself.

    Args:
        weight: fp32 [out, in].
        rank: At most the smaller side of the weight.
    """
    left, right = truncated_svd(weight, rank)
    h, left_scale = rank_one(left.abs())
    g, right_scale = rank_one(right.abs())
    size = weight.square().mean().sqrt()
    u, v = (side * (size / side.square().mean().sqrt().clamp_min(1e-30)) for side in (left, right))
    return Path(u, v, h, left_scale * right_scale, g)


def truncated_svd(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """``U √S`` [out, rank] and ``V √S`` [in, rank], fp32.

    From the eigenvectors of the smaller Gram matrix in fp64, which takes half the time of a singular value
    decomposition and has no random numbers in it; fp64 makes up for the squared singular values.
    """
    if weight.shape[0] > weight.shape[1]:
        right, left = truncated_svd(weight.T, rank)
        return left, right
    wide = weight.double()
    squares, vectors = torch.linalg.eigh(wide @ wide.T)
    squares, vectors = squares[-rank:].flip(0).clamp_min(0), vectors[:, -rank:].flip(1)
    roots = squares.sqrt().sqrt()  # √S
    return (vectors * roots).float(), ((wide.T @ vectors) / roots.clamp_min(1e-30)).float()


def rank_one(magnitudes: Tensor) -> tuple[Tensor, Tensor]:
    """``a`` [n] and ``b`` [m] of one size, without negative entries, with ``a bᵀ ≈ magnitudes`` [n, m]."""
    b = torch.ones(magnitudes.shape[1], device=magnitudes.device) / magnitudes.shape[1] ** 0.5
    for _ in range(_POWER_ITERATIONS):
        a = magnitudes @ b
        a = a / a.norm().clamp_min(1e-30)
        b = magnitudes.T @ a
        size = b.norm()
        b = b / size.clamp_min(1e-30)
    root = size.sqrt()
    return a * root, b * root


def _signs(values: Tensor) -> Tensor:
    return torch.copysign(torch.ones_like(values), values)
