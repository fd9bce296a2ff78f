"""What crosses the seam between methods and everything above them: small values, and nothing that acts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Spec(NamedTuple):
    """A tensor before it exists.

    Attributes:
        shape: Its shape.
        dtype: Its type.
        role: ``latent`` or ``scale`` for what is trained, ``state`` for what is stored.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    role: str


class Fact(NamedTuple):
    """A figure about a planned layer, shown by its name.

    Attributes:
        value: A number, or a text where a number says nothing.
        unit: Such as ``bits``, ``weights per state``; empty for a share.
        least: Lowest value that is healthy, if there is one.
        drawn: Whether it is worth a picture over the layers.
    """

    value: float | int | str
    unit: str = ""
    least: float | None = None
    drawn: bool = False


class Encoded(NamedTuple):
    """What one pass from latents to states gives.

    Attributes:
        states: By name, scales in their stored precision.
        decoded: The weight that they decode to, [out, in], where it was asked for.
        change: Share of states that have changed since the pass before; fp32 scalar, 0 without one.
        error: ``‖decoded - latent‖² / ‖latent‖²``, channels weighted by E[a²], fp32 scalar; ``None`` where the latents
            are no weight to compare with.
        memory: What the next pass needs besides the states to tell what has changed; ``None`` where they say it.
    """

    states: dict[str, Tensor]
    decoded: Tensor | None
    change: Tensor
    error: Tensor | None
    memory: Tensor | None


@dataclass(frozen=True)
class Statistics:
    """What planning and starting a layer may know about it.

    Attributes:
        energy: E[a²] per input channel, [in].
        weight_energy: E[w²] per input channel, [in]; ``None`` takes all as equal.
        covariance: E[a aᵀ], [in, in], where the method needs it.
        gradient: E[g²] per output, [out], of the loss's gradient at the layer's output, where it is needed.
    """

    energy: Tensor | None
    weight_energy: Tensor | None = None
    covariance: Tensor | None = None
    gradient: Tensor | None = None


def compute_dtype(x: Tensor) -> torch.dtype:
    """What a product with ``x`` is computed in: autocast's type where it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
