"""The truth about codes in output order: read one bit after another, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from usllm_kernels.planes import COLUMNS, Planes


def supports(planes: Planes) -> None:
    """All planes."""


def columns_weight(planes: Planes, dtype: torch.dtype = torch.float32) -> Tensor:
    """Decoded weight of the columns, [columns, out]: code times scale, times factor, each rounded, as ``dtype``."""
    if not planes.columns:
        return planes.scales.new_zeros(0, planes.shape[0], dtype=dtype)
    bits = torch.arange(COLUMNS, dtype=torch.int32, device=planes.words.device)
    signs = ((planes.words[..., None] >> bits) & 1) * 2 - 1  # [planes, blocks, columns / 32, 64, 32]
    weights = 2 ** torch.arange(len(signs), dtype=torch.int32, device=signs.device)
    whole = (signs * weights.view(-1, 1, 1, 1, 1)).sum(0).permute(1, 3, 0, 2).reshape(planes.columns, -1)
    codes = planes.levels.step * whole + planes.levels.shift
    values = codes.float() * planes.scales[:, None]
    factors = planes.factors.repeat_interleave(planes.columns // planes.groups, 0)
    return (values * factors)[:, : planes.shape[0]].to(dtype)


def plane_linear(x: Tensor, planes: Planes) -> Tensor:
    """``x Ŵᵀ`` of the planes' channels, [tokens, out], in fp32 or rounded to the type of ``x``.

    Args:
        x: [tokens, in].
        planes: Of the layer.
    """
    held = x.index_select(1, planes.channels.long()).float()
    return held @ columns_weight(planes)
