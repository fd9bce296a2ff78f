"""What a state costs and what it saves: the rate-distortion table that water-filling reads, from one of two lists.

``untrained``: the distortion of a choice (rows, K, width) is the relative squared error of the operator on Gaussian
weights, measured by projecting and querying a fixed random block once per group size.

``trained``: signs shared by L weights leave ``0.3634^(c / L)`` of the energy, less than independent weights would,
since training moves weights to where sharing costs least; unshared states of more bits leave what the best quantiser
of a Gaussian does (`docs/method.md` §5). Under it channels share before they are dropped.

The prices decide where bits go; they are never part of the stored format.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import torch

from usllm.sketch.allocation.problem import AllocationProblem
from usllm.sketch.classes import EMPTY, ChannelClass
from usllm.sketch.config import SketchConfig

WIDTHS = (1, 2, 3, 4, 8)
_LOADS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, 256, 512)  # members per state worth trying
_CHANNELS = 32
_TRAINED_LOADS = (1, 2, 3, 4, 6, 8, 16)
_SIGN = 0.3634  # of a Gaussian's energy that its sign, times one scale, leaves
_WIDER = {2: 0.1175, 3: 0.03454, 4: 0.01154, 8: 0.00008}


_Prices = tuple[tuple[ChannelClass, float], ...]


class Option(NamedTuple):
    """A choice with its price in bits and its distortion relative to storing nothing (1.0)."""

    choice: ChannelClass
    bits: int
    distortion: float


def convex_options(problem: AllocationProblem) -> list[Option]:
    """The lower convex hull of all choices by rising bits, "store nothing" first.

    Only these can solve ``min Σ distortion + λ bits`` for some λ; along them the gain per bit falls.
    """
    table = _PRICE_LISTS[problem.config.price_list](problem)
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


def _untrained(problem: AllocationProblem) -> _Prices:
    given = problem.config
    counts = SketchConfig(operator=given.operator, query=given.query, hash=given.hash, rounding=given.rounding)
    return tuple(price for rows in range(1, given.rows + 1) for price in _measured(problem.largest_group, rows, counts))


def _trained(problem: AllocationProblem) -> _Prices:
    group, exponent = problem.largest_group, problem.config.price_exponent
    signs = tuple(
        (ChannelClass(1, max(round(group / load), 1), 1), _SIGN ** (exponent / load)) for load in _TRAINED_LOADS
    )
    return signs + tuple((ChannelClass(1, group, bits), value) for bits, value in _WIDER.items())


_PRICE_LISTS: dict[str, Callable[[AllocationProblem], _Prices]] = {"untrained": _untrained, "trained": _trained}


@lru_cache(maxsize=256)
def _measured(group: int, rows: int, config: SketchConfig) -> _Prices:
    """Relative squared error of every choice of so many rows for groups of ``group`` weights."""
    from usllm.sketch.codec import project, query  # the codec needs plans, plans need allocations
    from usllm.sketch.plan import Plan

    weight = torch.randn(group, _CHANNELS, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    energy = float(weight.square().sum())
    channel_class = torch.zeros(_CHANNELS, dtype=torch.uint8)
    config = replace(config, rows=rows, group_size=group)
    table = []
    for states in sorted({max(round(group / load), 1) for load in _LOADS if load <= group}):
        if states == group and rows > 1:  # at K = G one row is already lossless
            continue
        for width in WIDTHS:
            choice = ChannelClass(rows, states, width)
            plan = Plan("distortion", (group, _CHANNELS), config, (choice,), channel_class)
            error = float((query(project(weight, plan), plan) - weight).square().sum())
            table.append((choice, error / energy))
    return tuple(table)
