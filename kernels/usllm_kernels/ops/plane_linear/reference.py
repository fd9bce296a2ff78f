"""The truth about codes in output order: read one bit after another, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from usllm_kernels.planes import COLUMNS, Planes


def supports(planes: Planes) -> None:
    """All planes."""


def plane_weight(planes: Planes, dtype: torch.dtype = torch.float32) -> Tensor:
    """Decoded weight [out, in]: a channel's signs, times scales, added up, times factor, each rounded, as ``dtype``."""
    outputs, inputs = planes.shape
    channels = torch.zeros(inputs, outputs, dtype=torch.float32, device=planes.words.device)
    each = planes.columns // planes.groups
    for group, factor in enumerate(planes.factors):
        part = slice(group * each, (group + 1) * each)
        where = planes.channels[part].long()
        signs = _signs(planes)[part] * planes.scales[part, None] + planes.offsets[part, None]
        of_group = torch.zeros_like(channels).index_add_(0, where, signs)
        channels += of_group * factor[:outputs]
    return channels.t().to(dtype)


def plane_linear(x: Tensor, planes: Planes) -> Tensor:
    """``x Ŵᵀ``, [tokens, out], in fp32 or rounded to the type of ``x``.

    Args:
        x: [tokens, in].
        planes: Of the layer.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        return x.to(wide) @ plane_weight(planes).to(wide).t()


def _signs(planes: Planes) -> Tensor:
    """fp32 [columns, out]."""
    places = torch.arange(COLUMNS, dtype=torch.int32, device=planes.words.device)
    signs = ((planes.words[..., None] >> places) & 1) * 2 - 1  # [blocks, columns / 32, 64, 32]
    return signs.permute(1, 3, 0, 2).flatten(0, 1).flatten(1)[:, : planes.shape[0]].float()
