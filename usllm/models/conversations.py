"""Whether conversations that lie side by side in a sequence are kept apart by a model, as their positions ask for."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

_HALF = 8
"""Tokens of each of two conversations."""
_LEAK = 1e-5
"""Of the largest output: the least change that is one."""


@torch.no_grad()
def kept_apart(forward: Callable[[Mapping[str, Tensor]], Tensor], tokens: int) -> bool:
    """Whether the second of two conversations comes out the same whatever the first one says.

    Positions that restart are how a model is told; families with attention over masks made by transformers follow them,
    recurrent layers and masks of a family's own may not.

    Args:
        forward: from ``input_ids`` and ``position_ids`` int64 [2, n] to what the model makes of them, [2, n, width].
        tokens: of its vocabulary.
    """
    ids = torch.arange(4 * _HALF).view(2, -1) % tokens
    ids[1, _HALF:] = ids[0, _HALF:]
    positions = torch.arange(_HALF).repeat(2, 2)
    found = forward({"input_ids": ids, "position_ids": positions})[:, _HALF:].float()
    return bool((found[0] - found[1]).abs().max() <= _LEAK * found.abs().max())
