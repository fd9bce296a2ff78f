"""Eight-bit floating-point scales.

A scale is the top of an IEEE-754 float32: the exponent and the first ``mantissa`` bits. Stored is its distance from
a per-layer base exponent in one byte, so decoding is one shift and one add in integers, the same on every device.
With 3 mantissa bits a byte spans 32 octaves in steps of at most 12.5 %: enough for channel scales, whose error
curve is flat around the optimum. With 5 bits it spans 8 octaves in steps of 3 %, for output scales near one.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHANNEL_MANTISSA = 3
OUTPUT_MANTISSA = 5
SCALE_BITS = 8


def base_exponent(largest: Tensor, mantissa: int) -> Tensor:
    """Smallest base exponent whose byte range still reaches ``largest``; uint8 [1].

    It is at least 1, so that every scale is a positive normal number, also where all there is to scale is zero.
    """
    octaves = 256 >> mantissa
    top = _tops(largest.reshape(1), mantissa, up=True) >> mantissa
    return (top - (octaves - 1)).clamp(1, 254).to(torch.uint8)


def encode_scale(value: Tensor, base: Tensor, mantissa: int, up: bool = False) -> Tensor:
    """Codes of positive scales, uint8, shape of ``value``; rounded to nearest, or up so that nothing is clipped."""
    code = _tops(value, mantissa, up) - (base.to(torch.int32) << mantissa)
    return code.clamp(0, 255).to(torch.uint8)


def decode_scale(code: Tensor, base: Tensor, mantissa: int) -> Tensor:
    """Scales, float32, shape of ``code`` (any integer type)."""
    top = code.to(torch.int32) + (base.to(torch.int32) << mantissa)
    return (top << (23 - mantissa)).view(torch.float32)


def _tops(value: Tensor, mantissa: int, up: bool) -> Tensor:
    shift = 23 - mantissa
    offset = (1 << shift) - 1 if up else 1 << (shift - 1)
    return (value.to(torch.float32).contiguous().view(torch.int32) + offset) >> shift
