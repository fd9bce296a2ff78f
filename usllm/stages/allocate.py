"""Allocate: from statistics to plans, under one budget over all layers."""

from __future__ import annotations

from typing import ClassVar

from usllm.compress import plan_layers
from usllm.stages.base import Stage, Work


class Allocate(Stage):
    """Plans all layers; a function of statistics, shapes and weight energies, so that there is no state to keep."""

    name: ClassVar[str] = "allocate"
    after: ClassVar[tuple[str, ...]] = ("calibrate",)

    def run(self, work: Work) -> None:
        """Fill ``work.bits`` and ``work.plans``.

        Raises:
            UserError: A layer's bits leave no room.
        """
        work.bits, work.plans = plan_layers(work.model, work.compressor, work.statistics)
