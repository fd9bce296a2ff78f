"""Share the model's bits out over its layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from usllm.sketch.config import SketchConfig

_SMALLEST_SHARE = 1 / 8  # of the mean rate: below this the tables leave no room for states


def layer_rates(
    sizes: Mapping[str, int], layer_importance: Mapping[str, float], config: SketchConfig
) -> dict[str, float]:
    """Bits per weight of each layer.

    Args:
        sizes: Weights per layer.
        layer_importance: Mean E[a²] of the layer's channels (`docs/method.md` §2).
        config: ``layer_budget`` is ``equal`` or ``importance``.

    Returns:
        Rates whose size-weighted mean is ``config.bits_per_weight``. With ``importance`` they are in proportion to
        it, held between an eighth of the mean and what fully stored states take; the excess is shared out again.
    """
    rate = config.bits_per_weight
    if config.layer_budget == "equal":
        return dict.fromkeys(sizes, rate)
    low, high = rate * _SMALLEST_SHARE, max(float(config.rows * config.state_bits + 1), rate)
    budget = rate * sum(sizes.values())

    def rates(factor: float) -> dict[str, float]:
        return {name: min(max(factor * layer_importance[name], low), high) for name in sizes}

    def spent(factor: float) -> float:
        return sum(sizes[name] * r for name, r in rates(factor).items())

    bottom, top = 0.0, 1.0
    ceiling = high / max(min((v for v in layer_importance.values() if v > 0), default=1.0), 1e-30)
    while spent(top) < budget and top < ceiling:
        top *= 2
    for _ in range(100):
        middle = (bottom + top) / 2
        bottom, top = (middle, top) if spent(middle) <= budget else (bottom, middle)
    return rates(bottom)
