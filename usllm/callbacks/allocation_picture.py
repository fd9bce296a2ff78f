"""Where the bits went: one line per layer, one column per input channel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from lightning.pytorch import Trainer

from usllm.callbacks.inspection import Inspection
from usllm.compress import LayerPlan, compressed_layers
from usllm.loggers import log_figure
from usllm.training.module import SketchFinetuner

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_COLUMNS = 1024
MAX_LABELS = 48


class AllocationPicture(Inspection):
    """Logs ``allocation``, the picture of :func:`allocation_figure`, whenever the allocation is a new one."""

    def __init__(self, every_n_validations: int = 1) -> None:
        super().__init__(every_n_validations)
        self._drawn: list[LayerPlan] = []

    def show(self, trainer: Trainer, module: SketchFinetuner, step: int) -> None:
        """Draw, unless nothing was allocated since the last picture."""
        plans = {
            name: layer.plan for name, layer in compressed_layers(module.network).items() if layer.plan is not None
        }
        now = list(plans.values())
        same = len(now) == len(self._drawn) and all(a is b for a, b in zip(now, self._drawn, strict=True))
        if not plans or same:
            return
        self._drawn = now
        log_figure(trainer.loggers, "allocation", allocation_figure(plans), step)


def allocation_grid(plans: Mapping[str, LayerPlan], max_columns: int = MAX_COLUMNS) -> np.ndarray:
    """Channel rates of all layers, float64 [layers, columns].

    The columns are input channels in their order; where there are more than ``max_columns``, neighbours are averaged.
    Layers with fewer channels end in NaN.
    """
    widest = max(plan.shape[1] for plan in plans.values())
    per_column = -(-widest // max_columns)
    grid = np.full((len(plans), -(-widest // per_column)), np.nan)
    for row, plan in enumerate(plans.values()):
        found = plan.channel_rates()
        assert found is not None
        rates = found.double().numpy()
        starts = np.arange(0, len(rates), per_column)
        grid[row, : len(starts)] = np.add.reduceat(rates, starts) / np.diff([*starts, len(rates)])
    return grid


def allocation_figure(plans: Mapping[str, LayerPlan]) -> Figure:
    """The grid as a picture, one panel for the layers of each width: bits per weight by colour, no states black."""
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure  # not pyplot: a Figure of its own draws with Agg and keeps no global state

    widths = sorted({plan.shape[1] for plan in plans.values()})
    groups = [{name: plan for name, plan in plans.items() if plan.shape[1] == width} for width in widths]
    grids = [allocation_grid(group) for group in groups]
    held = np.concatenate([grid[grid > 0] for grid in grids])
    low, high = (held.min(), held.max()) if held.size else (0.1, 1.0)
    # Equal rates make one colour; a logarithm of one value needs room around it.
    norm = LogNorm(low * 0.999, high * 1.001)
    colours = colormaps["viridis"].with_extremes(under="black")
    figure = Figure(figsize=(12, 1.4 + min(0.1 * max(map(len, groups)) + 0.8, 9)), layout="constrained")
    panels = figure.subplots(1, len(groups), squeeze=False, width_ratios=[grid.shape[1] ** 0.5 for grid in grids])[0]
    for axes, group, grid, width in zip(panels, groups, grids, widths, strict=True):
        shown = np.where(grid == 0, low * 1e-3, grid)
        image = axes.imshow(shown, aspect="auto", interpolation="nearest", cmap=colours, norm=norm)
        step = -(-len(group) // MAX_LABELS)
        axes.set_yticks(range(0, len(group), step), [_short(name) for name in list(group)[::step]], fontsize=6)
        per_column = -(-width // grid.shape[1])
        axes.set_xlabel("input channel" if per_column == 1 else f"input channel / {per_column}")
    bar = figure.colorbar(image, ax=panels, label="bits per weight of the channel", extend="min", format="{x:g}")
    bar.ax.yaxis.set_minor_formatter("{x:g}")
    return figure


def _short(name: str) -> str:
    return name.removeprefix("model.").removeprefix("layers.")
