"""Where the bits went: one line per layer, one column per input channel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from lightning.pytorch import Trainer

from usllm.callbacks.inspection import Inspection
from usllm.loggers import log_figure
from usllm.nn import sketched_layers
from usllm.sketch import Plan
from usllm.training.module import SketchFinetuner

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_COLUMNS = 1024
MAX_LABELS = 48


class AllocationPicture(Inspection):
    """Logs ``allocation``, the picture of :func:`allocation_figure`, whenever the allocation is a new one."""

    def __init__(self, every_n_validations: int = 1) -> None:
        super().__init__(every_n_validations)
        self._drawn: list[Plan] = []

    def show(self, trainer: Trainer, module: SketchFinetuner, step: int) -> None:
        """Draw, unless nothing was allocated since the last picture."""
        plans = {name: layer.plan for name, layer in sketched_layers(module.network).items() if layer.plan is not None}
        now = list(plans.values())
        same = len(now) == len(self._drawn) and all(a is b for a, b in zip(now, self._drawn, strict=True))
        if not plans or same:
            return
        self._drawn = now
        log_figure(trainer.loggers, "allocation", allocation_figure(plans), step)


def channel_rates(plan: Plan) -> np.ndarray:
    """Bits of states per weight of each input channel, float64 [in]; 0 for channels that hold none."""
    rates = np.zeros(plan.shape[1])
    for block in plan.blocks:
        rates[block.channels.numpy()] = block.states_per_channel * block.choice.bits / plan.shape[0]
    return rates


def allocation_grid(plans: Mapping[str, Plan], max_columns: int = MAX_COLUMNS) -> np.ndarray:
    """Channel rates of all layers, float64 [layers, columns].

    The columns are input channels in their order; where there are more than ``max_columns``, neighbours are averaged.
    Layers with fewer channels end in NaN.
    """
    widest = max(plan.shape[1] for plan in plans.values())
    per_column = -(-widest // max_columns)
    grid = np.full((len(plans), -(-widest // per_column)), np.nan)
    for row, plan in enumerate(plans.values()):
        rates = channel_rates(plan)
        starts = np.arange(0, len(rates), per_column)
        grid[row, : len(starts)] = np.add.reduceat(rates, starts) / np.diff([*starts, len(rates)])
    return grid


def allocation_figure(plans: Mapping[str, Plan]) -> Figure:
    """The grid as a picture: bits per weight by colour, channels without states black, no channel white."""
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure  # not pyplot: a Figure of its own draws with Agg and keeps no global state

    grid = allocation_grid(plans)
    held = grid[grid > 0]
    low, high = (held.min(), held.max()) if held.size else (0.1, 1.0)
    colours = colormaps["viridis"].with_extremes(bad="white", under="black")
    figure = Figure(figsize=(11, 1.6 + min(0.16 * len(plans), 14)), layout="constrained")
    axes = figure.subplots()
    # Equal rates make one colour; a logarithm of one value needs room around it.
    norm = LogNorm(low * 0.999, high * 1.001, clip=False)
    image = axes.imshow(
        np.where(grid == 0, low * 1e-3, grid), aspect="auto", interpolation="nearest", cmap=colours, norm=norm
    )
    step = -(-len(plans) // MAX_LABELS)
    names = list(plans)
    axes.set_yticks(range(0, len(names), step), [_short(name) for name in names[::step]], fontsize=6)
    widest = max(plan.shape[1] for plan in plans.values())
    per_column = -(-widest // grid.shape[1])
    axes.set_xlabel("input channel" if per_column == 1 else f"input channel / {per_column}")
    bar = figure.colorbar(image, label="bits per weight of the channel", extend="min", format="{x:g}")
    bar.ax.yaxis.set_minor_formatter("{x:g}")
    return figure


def _short(name: str) -> str:
    return name.removeprefix("model.").removeprefix("layers.")
