"""Everything a user may choose about rounding, checked in one place."""

from __future__ import annotations

import math
from dataclasses import dataclass

WIDTHS = (1, 2, 3, 4, 8)
DEFAULT_WIDTH = 4
SCALES = ("least_squares", "clipped")
MAX_GROUP_SIZE = 1 << 20


@dataclass(frozen=True)
class RoundingConfig:
    """Configuration of rounding for every compressed layer.

    Attributes:
        bits: Width of a code: 1, 2, 3, 4 or 8. ``None`` takes the widest that ``bits_per_weight`` leaves room for, 4
            where that is ``None`` too.
        bits_per_weight: Ceiling on the bits per weight of each layer, scales and metadata included; ``None``: whatever
            the width takes.
        group_size: Consecutive inputs of an output row that share a scale; ``None``: all of them.
        scales: ``least_squares`` or ``clipped``, the largest magnitude times a ratio with the least squared error.
        layer_budget: ``equal``: all layers have the same ceiling.

    Raises:
        ValueError: With all problems in one message, each naming the key, the value and the way out.
    """

    bits: int | None = None
    bits_per_weight: float | None = None
    group_size: int | None = None
    scales: str = "least_squares"
    layer_budget: str = "equal"

    def __post_init__(self) -> None:
        problems = self.problems()
        if problems:
            raise ValueError("\n".join(problems))

    def problems(self) -> list[str]:
        """All problems of this configuration, each with key, value and way out."""
        found = []
        rate, bits, size = self.bits_per_weight, self.bits, self.group_size
        widths = bits is None or (type(bits) is int and bits in WIDTHS)
        if not widths:
            found.append(f"sketch.bits={bits!r} is unknown: choose one of {', '.join(map(str, WIDTHS))}, or null")
        if rate is not None and not (_is_number(rate) and 0 < rate <= 16):
            found.append(f"sketch.bits_per_weight={rate!r} must be above 0 and at most 16, or null: give sketch.bits")
        elif rate is not None and widths and rate <= (bits or 1):
            found.append(
                f"sketch.bits_per_weight={rate!r} leaves no room for {bits or 1} bits a weight and scales: raise it or "
                "leave it at null and give the width by sketch.bits"
            )
        if size is not None and not (type(size) is int and 1 <= size <= MAX_GROUP_SIZE):
            found.append(f"sketch.group_size={size!r} must be a whole number from 1 to {MAX_GROUP_SIZE}, or null")
        if self.scales not in SCALES:
            found.append(f"sketch.scales={self.scales!r} is unknown: choose one of {', '.join(SCALES)}")
        if self.layer_budget != "equal":
            found.append(
                f"sketch.layer_budget={self.layer_budget!r}: rounding has one width for all layers; leave it at equal"
            )
        return found


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
