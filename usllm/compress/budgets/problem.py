"""The question that a rule over layers answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LayerDemand:
    """What a rule knows about one layer.

    Attributes:
        weights: Number of weights.
        importance: Mean E[a²] of its input channels.
        least_bits: Fewest bits that it can be stored in.
        most_bits: Most bits that it can make use of.
        sensitivity: What the square of a weight costs the model's loss when nothing of it is stored, by input channel:
            E[a²] · E[w²] · the mean E[g²] of the outputs, [in]; ``None`` where no rule asked for it.
    """

    weights: int
    importance: float
    least_bits: int
    most_bits: int
    sensitivity: Tensor | None = None


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
