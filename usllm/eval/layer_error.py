"""How far a sketched layer's output is from the dense one's, before any training (`docs/method.md` §4)."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def relative_output_error(weight: Tensor, decoded: Tensor, moment: Tensor) -> float:
    """``tr(ΔΣΔᵀ) / tr(WΣWᵀ)`` with Δ = Ŵ - W: 1.0 is as bad as a layer of zeros.

    Args:
        weight: W, [out, in].
        decoded: Ŵ, [out, in].
        moment: Σ = E[a aᵀ] of the layer's input, [in, in].
    """
    difference = decoded - weight
    return _energy(difference, moment) / _energy(weight, moment)


@torch.no_grad()
def rate_distortion_bound(weight: Tensor, moment: Tensor, bits_per_weight: float) -> float:
    """Lowest ``tr(ΔΣΔᵀ) / tr(WΣWᵀ)`` that any code of this rate reaches on independent normal weights.

    Reverse water-filling over the eigenvalues of Σ (`docs/method.md` §4.5).

    Args:
        weight: W, [out, in]; only its mean energy enters.
        moment: Σ, [in, in].
        bits_per_weight: The rate.
    """
    spectrum = torch.linalg.eigvalsh(moment.double()).clamp_min(1e-30)
    low, high = 0.0, float(spectrum.max())
    for _ in range(100):
        level = (low + high) / 2
        rate = 0.5 * torch.log2((spectrum / level).clamp_min(1.0)).mean()
        low, high = (level, high) if rate > bits_per_weight else (low, level)
    variance = float(weight.double().square().mean()) * weight.shape[0]
    return float(torch.minimum(spectrum, torch.tensor(high)).sum()) * variance / _energy(weight, moment)


def _energy(matrix: Tensor, moment: Tensor) -> float:
    return float(((matrix.double() @ moment.double()) * matrix.double()).sum())
