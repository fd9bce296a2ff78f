"""The question that a rule over layers answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class LayerDemand:
    """What a rule knows about one layer.

    Attributes:
        weights: Number of weights.
        importance: Mean E[a²] of its input channels.
        least_bits: Fewest bits that it can be stored in.
        most_bits: Most bits that it can make use of.
    """

    weights: int
    importance: float
    least_bits: int
    most_bits: int


@dataclass(frozen=True)
class BudgetProblem:
    """Bits to share out over layers.

    Attributes:
        layers: By stable name.
        bits_per_weight: Ceiling over all of them together.
    """

    layers: Mapping[str, LayerDemand]
    bits_per_weight: float

    @property
    def bits(self) -> int:
        """The ceiling in bits."""
        return int(self.bits_per_weight * sum(layer.weights for layer in self.layers.values()))


BudgetRule = Callable[[BudgetProblem], dict[str, int]]
"""From a problem to a ceiling in bits for each layer, by name."""
