"""Symmetric codes of 1 to 8 bits: a code ``c`` of ``b`` bits stands for the odd integer ``2c - (2^b - 1)``.

These levels, {-1, 1} for one bit and {-3, -1, 1, 3} for two, are evenly spaced, symmetric and use every code; a weight
is its level times its scale, which therefore is half the distance between two levels. All arithmetic is elementwise
fp32, so that every device and every reader gets the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SMALLEST_SCALE = 2.0**-26  # below fp16's smallest; only keeps a division by the scale 0 away


def largest_level(bits: int) -> int:
    """The level of the largest code."""
    return (1 << bits) - 1


def groups_of(columns: int, size: int | None) -> int:
    """Groups of ``size`` inputs in a row; the last one may be shorter."""
    return 1 if size is None else -(-columns // size)


def over_columns(scales: Tensor, columns: int, size: int | None) -> Tensor:
    """Scales [rows, groups] as something that multiplies a weight [rows, columns], fp32."""
    wide = scales.float()
    if size is None or wide.shape[1] == 1:
        return wide
    return wide.repeat_interleave(size, 1)[:, :columns]


def nearest_levels(weight: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Level of each weight, fp32 [rows, columns]; 0 goes to the level 1.

    Args:
        weight: fp32 [rows, columns].
        scales: Not negative, fp32, [rows, columns] or [rows, 1].
        bits: Width of a code.
    """
    half = 1 << (bits - 1)
    # floor(w / 2s) in one division; times two plus one is exact
    levels = torch.div(weight, 2 * scales.clamp_min(_SMALLEST_SCALE)).floor_().clamp_(-half, half - 1)
    return levels.mul_(2).add_(1)


def to_codes(levels: Tensor, bits: int) -> Tensor:
    """Codes, uint8, of levels fp32."""
    return ((levels + largest_level(bits)) * 0.5).to(torch.uint8)


def to_levels(codes: Tensor, bits: int) -> Tensor:
    """Levels, fp32, of codes uint8."""
    return codes.float().mul_(2).sub_(largest_level(bits))
