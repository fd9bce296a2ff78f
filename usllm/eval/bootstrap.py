"""How certain a perplexity is: intervals from resampling the windows that it was measured on."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

RESAMPLES = 10_000
SHARE = 0.95
"""Of the resamples that lie inside an interval."""


def interval(losses: Sequence[float], against: Sequence[float] | None = None, *, seed: int = 0) -> tuple[float, float]:
    """Bounds of a perplexity, or of its ratio to another one, by bootstrap over windows.

    Windows of one text differ much and two models find the same ones hard, so a ratio is resampled in pairs: its
    interval is far narrower than those of the two perplexities.

    Args:
        losses: Mean loss of each window, nats per predicted token; windows are of equal length.
        against: Of another model on the same windows.
        seed: Of the resampling.

    Returns:
        The bounds of the middle 95 % of 10,000 resamples: of ``exp(mean(losses))``, or of
        ``exp(mean(losses - against))``.

    Raises:
        ValueError: There is no window, or the two were not measured on equally many.
    """
    values = torch.tensor(losses, dtype=torch.float64)
    if against is not None:
        other = torch.tensor(against, dtype=torch.float64)
        if other.shape != values.shape:
            raise ValueError(f"{len(losses)} windows against {len(against)}: pairs need the same ones")
        values = values - other
    if not len(values):
        raise ValueError("no window was measured")
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(values), (RESAMPLES, len(values)), generator=generator)
    means = values[chosen].mean(1).sort().values
    outside = (1 - SHARE) / 2
    low, high = (means[round(share * (RESAMPLES - 1))] for share in (outside, 1 - outside))
    return _exp(float(low)), _exp(float(high))


def _exp(value: float) -> float:
    return math.exp(value) if value <= 700 else math.inf
