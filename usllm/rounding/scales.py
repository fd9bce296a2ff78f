"""The scale of each output row, or of each group of its inputs, from the weights alone; stored as fp16."""

from __future__ import annotations

import torch
from torch import Tensor

from usllm.rounding.codes import largest_level, nearest_levels

CLIP_RATIOS = {
    1: (1.0, 0.7, 0.5, 0.35, 0.25, 0.15, 0.08),
    2: (1.0, 0.8, 0.6, 0.45, 0.32, 0.2),
    3: (1.0, 0.85, 0.7, 0.55, 0.4, 0.28),
    4: (1.0, 0.9, 0.8, 0.68, 0.55, 0.4),
    8: (1.0, 0.97, 0.93, 0.87, 0.8, 0.7),
}
"""By width: shares of a group's largest magnitude that its largest level may stand for. Each costs a training step a
few passes over the weight; twice as many and a second refinement change the error of a real model by 1 %.
"""
_LARGEST_SCALE = torch.finfo(torch.float16).max


def fit_scales(weight: Tensor, bits: int, size: int | None, kind: str) -> Tensor:
    """Scales, fp16 [rows, groups].

    Args:
        weight: fp32 [rows, columns].
        bits: Width of a code.
        size: Consecutive columns that share a scale; ``None``: all of them.
        kind: ``clipped``: the ratio of :data:`CLIP_RATIOS` with the least squared error. ``least_squares``: from there
            on, the scale that fits the codes best. One bit needs no search: its scale is E|w|.
    """
    rows, columns = weight.shape
    if size is None or size >= columns:
        scales = _fit(weight, bits, kind)[:, None]
    else:
        whole = columns // size * size
        scales = _fit(weight[:, :whole].reshape(-1, size), bits, kind).view(rows, -1)
        if whole < columns:
            scales = torch.cat([scales, _fit(weight[:, whole:], bits, kind)[:, None]], 1)
    return scales.clamp_max(_LARGEST_SCALE).half()


def _fit(weight: Tensor, bits: int, kind: str) -> Tensor:
    """fp32 [groups] of ``weight`` [groups, columns]."""
    magnitude = weight.abs()
    if bits == 1 and kind == "least_squares":
        return magnitude.mean(1, dtype=torch.float64).float()
    largest = magnitude.amax(1) / largest_level(bits)
    best, least = largest, None
    for ratio in CLIP_RATIOS[bits]:
        scale = largest * ratio
        product, square = _fit_sums(weight, scale, bits)
        wide = scale.double()
        error = wide * (wide * square - 2 * product)  # and the energy of the weights, the same for all ratios
        if least is None:
            least = error
        else:
            best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    if kind == "least_squares":
        product, square = _fit_sums(weight, best, bits)
        best = (product / square).float()
    return best


def _fit_sums(weight: Tensor, scale: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Σ weight·level and Σ level² of each group; fp64, so that the order of summation leaves no trace in fp16."""
    levels = nearest_levels(weight, scale[:, None], bits)
    product = (weight * levels).sum(1, dtype=torch.float64)
    return product, levels.square_().sum(1, dtype=torch.float64)
