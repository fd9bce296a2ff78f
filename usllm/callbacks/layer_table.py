"""One row per layer: what it costs, how its states are used, and how well they hold its weights."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import nn

from usllm.callbacks.inspection import Inspection
from usllm.callbacks.sketch_reprojection import SketchReprojection
from usllm.compress import Reprojection, SketchedLinear, sketched_layers
from usllm.loggers import log_scalars, log_table
from usllm.training.module import SketchFinetuner

COLUMNS = (
    "layer",
    "out",
    "in",
    "bits_per_weight",
    "importance",
    "occupancy",
    "load_mean",
    "load_max",
    "projection_error",
    "winner_change",
)


class LayerTable(Inspection):
    """Logs ``layers``, a table with the rows of :func:`layer_rows`, and its extremes as numbers.

    The numbers, for every logger: ``layers/projection_error_max``, ``layers/winner_change_max``,
    ``layers/occupancy_min``, ``layers/load_max``.
    """

    media_only = False

    def show(self, trainer: Trainer, module: SketchFinetuner, step: int) -> None:
        """Log the table and its extremes."""
        changes = next((c.last for c in trainer.callbacks if isinstance(c, SketchReprojection)), {})  # type: ignore[attr-defined]
        rows = layer_rows(module.network, changes)
        if not rows:
            return
        columns = {name: [row[i] for row in rows] for i, name in enumerate(COLUMNS)}
        winner_changes = [value for value in columns["winner_change"] if value is not None]
        extremes = {
            "layers/projection_error_max": max(columns["projection_error"]),
            "layers/winner_change_max": max(winner_changes, default=None),
            "layers/occupancy_min": min(columns["occupancy"]),
            "layers/load_max": max(columns["load_max"]),
        }
        log_scalars(trainer.loggers, extremes, step)
        log_table(trainer.loggers, "layers", COLUMNS, rows, step)


def layer_rows(model: nn.Module, changes: dict[str, Reprojection]) -> list[list[Any]]:
    """One row of ``COLUMNS`` per layer with a plan, in module order.

    ``importance`` is the mean E[a²] of the input channels, ``load`` counts weights per state, ``projection_error`` is
    ``‖Ŵ - W‖² / ‖W‖²`` with channels weighted by E[a²], ``winner_change`` the share of buckets whose winning weight the
    last projection changed (``None`` before there was one).

    Args:
        changes: what the last projection of each layer found; a layer that is missing is decoded.
    """
    rows = []
    for name, layer in sketched_layers(model).items():
        if (plan := layer.plan) is None:
            continue
        change = changes.get(name)
        error = float(_projection_error(layer) if change is None else change.relative_error)
        _, load_mean, load_max = plan.load()
        churn = None if change is None else float(change.winner_change)
        importance = float(layer.importance.double().mean())
        rows.append(
            [name, *plan.shape, plan.bits_per_weight, importance, plan.occupancy(), load_mean, load_max, error, churn]
        )
    return rows


@torch.no_grad()
def _projection_error(layer: SketchedLinear) -> torch.Tensor:
    latent = layer.latent_weight()
    error = (layer.decoded_weight() - latent).square().sum(0) @ layer.importance
    return error / (latent.square().sum(0) @ layer.importance).clamp_min(1e-30)
