"""Everything a user may choose about binary factors, checked in one place."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class LittleBitConfig:
    """Configuration of the factors of every compressed layer.

    Attributes:
        bits_per_weight: Ceiling on the bits per weight of the compressed layers; signs of both factors, scales and
            metadata included. It decides the rank.
        paths: 1, or 2: the second pair of factors fits what the first one leaves; both have the same rank.
        slope: The gradient of a sign at ``u`` is ``slope * (1 - tanh²(slope * u))``; 0 passes it on unchanged.
        layer_budget: ``equal`` gives each layer ``bits_per_weight``; ``importance`` gives layers shares in
            proportion to the mean importance of their channels, the model's total kept.

    Raises:
        ValueError: With all problems in one message, each naming the key, the value and the way out.
    """

    bits_per_weight: float = 0.5
    paths: int = 1
    slope: float = 0.0
    layer_budget: str = "equal"

    def __post_init__(self) -> None:
        problems = self.problems()
        if problems:
            raise ValueError("\n".join(problems))

    def problems(self) -> list[str]:
        """All problems of this configuration, each with key, value and way out."""
        found = []
        if not (_is_number(self.bits_per_weight) and self.bits_per_weight > 0):
            found.append(
                f"sketch.bits_per_weight={self.bits_per_weight!r} must be a finite number above 0: "
                "give the ceiling in bits, as 0.5"
            )
        if type(self.paths) is not int or self.paths not in (1, 2):
            found.append(f"sketch.paths={self.paths!r} is unknown: choose one of 1, 2")
        if not (_is_number(self.slope) and self.slope >= 0):
            found.append(f"sketch.slope={self.slope!r} must be 0 (the gradient passes unchanged) or above")
        return found


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
