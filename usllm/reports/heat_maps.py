"""What each layer of each run looks like: one strip per run, decoder blocks across, projections down."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from usllm.reports.labels import labels
from usllm.reports.runs import Layer, Run
from usllm.reports.style import new_figure, shortened, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

STRIPS = 12
"""Runs in one figure; more go into further figures."""
_PROJECTIONS = ("q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down")
_WIDE = 48  # blocks from which one strip takes the whole width


@dataclass(frozen=True)
class Quantity:
    """What a heat map shows.

    Attributes:
        key: Short name, for files.
        title: What it is, with its unit.
        value: From a layer; ``None`` where it is not known.
        colours: Name of the colour map.
        limits: Ends of the colour scale; ``None`` takes the values' own.
    """

    key: str
    title: str
    value: Callable[[Layer], float | None]
    colours: str = "viridis"
    limits: tuple[float, float] | None = None


ERROR = Quantity(
    "error",
    "Relative error of the decoded weights, channels weighted by E[a²]; 1 is as bad as zeros",
    lambda layer: layer.relative_error,
    "magma_r",
    (0.0, 1.0),
)
RATE = Quantity("bpw", "Bits per weight, metadata included", lambda layer: layer.bits_per_weight, "viridis")


def fact(name: str) -> Quantity:
    """A figure of the layers' method, by its name."""
    return Quantity(name, name.replace("_", " ").capitalize(), lambda layer: layer.facts.get(name))


def quantities(runs: Sequence[Run]) -> list[Quantity]:
    """What is worth a figure: the error always; rates, and what a method calls worth one, where they differ."""
    found = [ERROR]
    rates = [[layer.bits_per_weight for layer in run.layers] for run in runs if run.layers]
    if any(max(values) > 1.05 * min(values) for values in rates):
        found.append(RATE)
    layers = [layer for run in runs for layer in run.layers]
    for name in dict.fromkeys(name for layer in layers for name in layer.drawn):
        values = [layer.facts[name] for layer in layers if name in layer.facts]
        if values and max(values) > min(values) + 0.01 * abs(max(values)):
            found.append(fact(name))
    return found


@styled
def heat_maps(runs: Sequence[Run], quantity: Quantity) -> list[Figure]:
    """One strip per run that has layers, on one colour scale, in as many figures as it takes."""
    with_layers = [run for run in runs if run.layers]
    values = [v for run in with_layers for layer in run.layers if (v := _finite(quantity.value(layer))) is not None]
    if not values:
        return []
    limits = quantity.limits or (min(values), max(values))
    names = labels(runs)
    parts = [with_layers[first : first + STRIPS] for first in range(0, len(with_layers), STRIPS)]
    return [_figure(part, [names[run.name] for run in part], quantity, limits, max(values)) for part in parts]


def grid(
    layers: Sequence[Layer], value: Callable[[Layer], float | None]
) -> tuple[list[str], list[int], list[list[float]]]:
    """Values by projection and block, ``nan`` where a block has no such layer.

    Returns:
        Projections, blocks, and values as rows by projection.
    """
    order = {name: place for place, name in enumerate(_PROJECTIONS)}
    projections = sorted({layer.projection for layer in layers}, key=lambda name: (order.get(name, len(order)), name))
    blocks = sorted({layer.block for layer in layers})
    found = {(layer.projection, layer.block): _finite(value(layer)) for layer in layers}
    rows = [[_or_nan(found.get((projection, block))) for block in blocks] for projection in projections]
    return projections, blocks, rows


def _figure(
    runs: Sequence[Run], names: Sequence[str], quantity: Quantity, limits: tuple[float, float], most: float
) -> Figure:
    grids = [grid(run.layers, quantity.value) for run in runs]
    columns = 1 if len(runs) == 1 or max(len(blocks) for _, blocks, _ in grids) > _WIDE else 2
    rows = -(-len(runs) // columns)
    height = 0.17 * max(len(projections) for projections, _, _ in grids) + 0.42
    figure, axes = new_figure(9.6, rows * height + 0.75, rows, columns)
    for panel, name, (projections, blocks, values) in zip(axes, names, grids, strict=False):
        image = _strip(panel, projections, blocks, values, quantity, limits)
        panel.set_title(shortened(name, 60), fontsize=9, fontweight="normal", pad=3)
    for panel in axes[len(runs) :]:
        panel.remove()
    for panel in axes[max(0, len(runs) - columns) : len(runs)]:
        panel.set_xlabel("decoder block", labelpad=1)
    extend = "max" if most > limits[1] else "neither"
    bar = figure.colorbar(image, ax=axes[: len(runs)], fraction=0.025, pad=0.015, extend=extend, aspect=30)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=2, labelsize=8.5)
    return figure


def _strip(
    axes: Axes,
    projections: Sequence[str],
    blocks: Sequence[int],
    values: Sequence[Sequence[float]],
    quantity: Quantity,
    limits: tuple[float, float],
) -> AxesImage:
    low, high = limits
    image = axes.imshow(
        values,
        cmap=quantity.colours,
        vmin=low,
        vmax=high if high > low else low + 1,
        aspect="auto",
        interpolation="none",
    )
    axes.set_yticks(range(len(projections)), projections, fontsize=7.5)
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100) if len(blocks) / step <= 16 or step == 100)
    places = range(0, len(blocks), step)
    axes.set_xticks(places, [str(blocks[place]) for place in places], fontsize=7.5)
    axes.tick_params(length=0, pad=2)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return image


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value
