"""What a state costs and what it saves: the rate-distortion table that water-filling reads.

The distortion of a choice (rows, K, width) is the relative squared error of the operator on Gaussian weights,
measured by projecting and querying a fixed random block once per group size. The result decides where bits go; it
is never part of the stored format.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch

from usllm.sketch.allocation.problem import AllocationProblem
from usllm.sketch.classes import EMPTY, ChannelClass

if TYPE_CHECKING:
    from usllm.sketch.config import SketchConfig

WIDTHS = (1, 2, 3, 4, 8)
_LOADS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, 256, 512)  # members per state worth trying
_CHANNELS = 32


class Option(NamedTuple):
    """A choice with its price in bits and its distortion relative to storing nothing (1.0)."""

    choice: ChannelClass
    bits: int
    distortion: float


def convex_options(problem: AllocationProblem) -> list[Option]:
    """The lower convex hull of all choices by rising bits, "store nothing" first.

    Only these can solve ``min Σ distortion + λ bits`` for some λ; along them the gain per bit falls.
    """
    table = _distortions(
        problem.largest_group, replace(problem.config, bits_per_weight=1.0, min_importance=0.0, seed=0)
    )
    options = [Option(choice, problem.channel_bits(choice), value) for choice, value in table]
    hull = [Option(EMPTY, 0, 1.0)]
    for option in sorted(options, key=lambda o: (o.bits, o.distortion)):
        if option.distortion >= hull[-1].distortion:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-2], option):
            hull.pop()
        hull.append(option)
    return hull


def _slope(below: Option, above: Option) -> float:
    return (below.distortion - above.distortion) / max(above.bits - below.bits, 1)


@lru_cache(maxsize=64)
def _distortions(group: int, config: SketchConfig) -> tuple[tuple[ChannelClass, float], ...]:
    """Relative squared error of every choice for groups of ``group`` weights."""
    from usllm.sketch.codec import project, query  # the codec needs plans, plans need allocations
    from usllm.sketch.plan import Plan

    weight = torch.randn(group, _CHANNELS, generator=torch.Generator().manual_seed(0))
    energy = float(weight.square().sum())
    channel_class = torch.zeros(_CHANNELS, dtype=torch.uint8)
    single = replace(config, output_scale=False, group_size=group)
    table = []
    for states in sorted({max(round(group / load), 1) for load in _LOADS if load <= group}):
        for rows in range(1, config.rows + 1 if states < group else 2):  # at K = G one row is already lossless
            for width in WIDTHS:
                choice = ChannelClass(rows, states, width)
                plan = Plan("distortion", (group, _CHANNELS), single, (choice,), channel_class)
                error = float((query(project(weight, plan), plan) - weight).square().sum())
                table.append((choice, error / energy))
    return tuple(table)
