"""Logarithmic axes with round numbers on them: rates, sizes, perplexities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def plain_number(value: float) -> str:
    """A number on a logarithmic axis: 0.25, 20, 5,000, 10⁶."""
    if value >= 1e6 and math.isclose(math.log10(value), round(math.log10(value)), abs_tol=1e-9):
        return "10" + str(round(math.log10(value))).translate(_SUPERSCRIPTS)
    if value >= 1e6:
        exponent = math.floor(math.log10(value))
        return f"{value / 10**exponent:g}·10" + str(exponent).translate(_SUPERSCRIPTS)
    return f"{value:,.10g}"


def rate_axis(axes: Axes, rates: Sequence[float]) -> None:
    """Bits per weight across, halved and doubled from tick to tick."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axes.set_xscale("log", base=2)
    if rates:
        low, high = math.floor(math.log2(min(rates) * 1.01)), math.ceil(math.log2(max(rates) * 0.99))
        ticks = [2.0**power for power in range(low, high + 1)]
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.set_xlim(min(*rates, ticks[0]) / 1.25, max(*rates, ticks[-1]) * 1.25)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: plain_number(value)))


def byte_axis(axes: Axes, sizes: Sequence[float]) -> None:
    """Bytes across."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    from usllm.runs.report import human_bytes

    axes.set_xscale("log")
    if sizes:
        low, high = min(sizes), max(sizes)
        margin = max(1.12, (high / low) ** 0.08)
        axes.set_xlim(low / margin, high * margin)
        axes.xaxis.set_major_locator(FixedLocator(_ticks(low / margin, high * margin)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: human_bytes(round(value)).replace(".0 ", " ")))


def perplexity_axis(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic upright axis with room for ``values`` and as many named ticks as fit."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_yscale("log")
    if values:
        low, high = min(values), max(values)
        margin = max(1.25, (high / low) ** 0.07)
        axes.set_ylim(low / margin, high * margin)
        decades = math.log10(high / low) if high > low else 0.0
        steps = (1.0,) if decades > 3 else (1.0, 2.0, 5.0) if decades > 0.5 else tuple(n / 2 for n in range(2, 20))
        axes.yaxis.set_major_locator(LogLocator(subs=steps, numticks=20))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: plain_number(float(f"{value:.6g}"))))


def across(axes: Axes, value: float) -> float:
    """Where ``value`` lies on the logarithmic axis, from 0 (left) to 1."""
    low, high = (math.log(limit) for limit in axes.get_xlim())
    return (math.log(value) - low) / (high - low)


def _ticks(low: float, high: float) -> list[float]:
    """At most six round numbers between ``low`` and ``high``, the most that fit."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 1.25, 1.5, 1.75, 2, 2.5, 3, 4, 5, 6, 7, 8, 9), (1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        ticks = [step * 10**power for power in decades for step in steps if low <= step * 10**power <= high]
        if len(ticks) <= 6:
            return ticks
    return ticks
