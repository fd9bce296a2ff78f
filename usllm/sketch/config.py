"""Everything a user may choose about a sketch, checked in one place."""

from __future__ import annotations

import math
from dataclasses import dataclass

from usllm.sketch.hash import HASHES
from usllm.sketch.operators import OPERATORS
from usllm.system.plugins import unknown_name

STATE_BITS = (1, 2, 3, 4, 8, 16)
PRICE_LISTS = ("untrained", "trained")
PRICE_EXPONENT = 1.5
STRAIGHT_THROUGH = ("latent", "state")
MAX_GROUP_SIZE = 4096
MAX_ROWS = 15  # a class entry stores the rows in four bits


@dataclass(frozen=True)
class SketchConfig:
    """Configuration of the sketch of every compressed layer.

    Attributes:
        bits_per_weight: Ceiling on the bits per weight of the compressed layers; states of all rows, scales,
            tables and metadata included.
        rows: Hash functions per group. ``waterfill`` may spend fewer on a channel, the others use all.
        group_size: Largest number of weights G that may collide; consecutive output rows of one input channel.
        operator: How a bucket becomes a state: ``absmaxmin`` (the paper), ``countmin`` or ``mean``.
        query: Which candidate ``absmaxmin`` decodes over several rows: ``magnitude_max`` or ``signed_max``.
        hash: ``balanced`` (a keyed bijection, equal loads), ``uniform`` (independent random buckets) or ``shared``
            (balanced, the same in all channels: outputs that collide in one do so in all).
        state_bits: Width of a state. ``waterfill`` chooses 1 to 8 bits per channel itself and ignores it.
        rounding: ``toward_zero`` keeps the underestimate property through quantisation; ``nearest`` is closer.
            One-bit states are sign times scale under either.
        output_scale: One scale for each output row, the least-squares one of each projection.
        train_output_scale: Start with these scales, then train them as parameters of their own.
        allocation: How states are shared out over input channels.
        layer_budget: ``equal`` gives each layer ``bits_per_weight``; ``importance`` gives layers shares in
            proportion to the mean importance of their channels, ``sensitivity`` what the loss's gradients ask for
            (:mod:`usllm.compress.budgets`); the model's total is kept.
        min_importance: Channels whose E[a²] is below this share of the layer's mean get no states.
        seed: Seed of every hash.
        price_list: What ``waterfill`` takes for the error of a choice: ``untrained``, measured on random weights, or
            ``trained``, what is left after training, where shared signs stand for more; that list has one row alone.
        straight_through: What the optimizer sees: ``latent``, each latent the gradient of its own decoded weight, as
            published, or ``state``, all members of a bucket their mean: states are trained, latents carry them.
        price_exponent: Of ``trained``: signs shared by L weights leave ``0.3634^(price_exponent / L)`` of the energy.

    Raises:
        ValueError: With all problems in one message, each naming the key, the value and the way out.
    """

    bits_per_weight: float = 0.5
    rows: int = 3
    group_size: int = 512
    operator: str = "absmaxmin"
    query: str = "magnitude_max"
    hash: str = "balanced"
    state_bits: int = 4
    rounding: str = "toward_zero"
    output_scale: bool = False
    train_output_scale: bool = False
    allocation: str = "proportional"
    layer_budget: str = "equal"
    min_importance: float = 0.0
    seed: int = 0
    price_list: str = "untrained"
    price_exponent: float = PRICE_EXPONENT
    straight_through: str = "latent"

    def __post_init__(self) -> None:
        problems = self.problems()
        if problems:
            raise ValueError("\n".join(problems))

    def problems(self) -> list[str]:
        """All problems of this configuration, each with key, value and way out."""
        found = []

        def choice(key: str, choices: tuple[object, ...]) -> None:
            value = getattr(self, key)
            if value not in choices:
                found.append(f"sketch.{key}={value!r} is unknown: choose one of {', '.join(map(str, choices))}")

        def whole(key: str, low: int, high: int) -> None:
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                found.append(f"sketch.{key}={value!r} must be a whole number from {low} to {high}")

        rate = self.bits_per_weight
        if not math.isfinite(rate) or rate <= 0:
            found.append(
                f"sketch.bits_per_weight={rate!r} must be a finite number above 0: give the ceiling in bits, as 0.5"
            )
        whole("rows", 1, MAX_ROWS)
        whole("group_size", 1, MAX_GROUP_SIZE)
        whole("seed", 0, 2**32 - 1)
        if self.operator not in OPERATORS:
            found.append(unknown_name("sketch.operator", self.operator, OPERATORS, "operator"))
        choice("query", ("magnitude_max", "signed_max"))
        choice("hash", tuple(HASHES))
        choice("state_bits", STATE_BITS)
        choice("rounding", ("toward_zero", "nearest"))
        choice("straight_through", STRAIGHT_THROUGH)
        if self.straight_through == "state" and not hasattr(OPERATORS.get(self.operator), "derivative"):
            found.append(
                f"sketch.straight_through='state' needs an operator that has derivative(): {self.operator!r} has none,"
                " leave it at latent"
            )
        if self.train_output_scale and not self.output_scale:
            found.append("sketch.train_output_scale=True has no scale to train: set sketch.output_scale=true")
        if self.query != "magnitude_max" and self.operator != "absmaxmin":
            found.append(f"sketch.query={self.query!r} is a variant of absmaxmin: leave it at magnitude_max")
        if not math.isfinite(self.min_importance) or self.min_importance < 0:
            found.append(f"sketch.min_importance={self.min_importance!r} must be 0 (keep all channels) or above")
        return found + self._price_problems()

    def _price_problems(self) -> list[str]:
        found = []
        if self.price_list not in PRICE_LISTS:
            choices = ", ".join(PRICE_LISTS)
            found.append(f"sketch.price_list={self.price_list!r} is unknown: choose one of {choices}")
        trained = self.price_list == "trained"
        if trained and self.allocation != "waterfill":
            found.append(f"sketch.price_list='trained' is read by waterfill alone, not by {self.allocation!r}")
        if trained and self.rows != 1:
            found.append(
                f"sketch.rows={self.rows!r}: price_list='trained' knows one row alone, which trains best at equal bits;"
                " set sketch.rows=1"
            )
        if not math.isfinite(self.price_exponent) or not 0 < self.price_exponent <= 100:
            found.append(f"sketch.price_exponent={self.price_exponent!r} must be above 0 and at most 100")
        elif not trained and self.price_exponent != PRICE_EXPONENT:
            found.append(
                f"sketch.price_exponent={self.price_exponent!r} is of price_list='trained' alone: leave it at"
                f" {PRICE_EXPONENT}"
            )
        return found
