"""One row per layer: what it costs, how its states are used, and how well they hold its weights."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import nn

from usllm.callbacks.inspection import Inspection
from usllm.callbacks.sketch_reprojection import SketchReprojection
from usllm.compress import CompressedLinear, Reprojection, compressed_layers
from usllm.loggers import log_scalars, log_table
from usllm.training.module import SketchFinetuner

FIRST_COLUMNS = ("layer", "out", "in", "bits_per_weight", "importance")
LAST_COLUMNS = ("projection_error", "winner_change")


class LayerTable(Inspection):
    """Logs ``layers``, the table of :func:`layer_table`, and its extremes as numbers.

    The numbers, for every logger: ``layers/projection_error_max``, ``layers/winner_change_max``, and of the method's
    facts those with a limit (the sketch: ``layers/occupancy_min``) and maxima (``layers/load_max``).
    """

    media_only = False

    def show(self, trainer: Trainer, module: SketchFinetuner, step: int) -> None:
        """Log the table and its extremes."""
        changes = next((c.last for c in trainer.callbacks if isinstance(c, SketchReprojection)), {})  # type: ignore[attr-defined]
        columns, rows = layer_table(module.network, changes)
        if not rows:
            return
        known = {name: [row[i] for row in rows if row[i] is not None] for i, name in enumerate(columns)}
        extremes = {f"layers/{name}_max": max(known[name], default=None) for name in LAST_COLUMNS}
        plan = next(layer.plan for layer in compressed_layers(module.network).values() if layer.plan is not None)
        for name, fact in plan.facts().items():
            if fact.least is not None:
                extremes[f"layers/{name}_min"] = min(known[name], default=None)
            elif name.endswith("_max"):
                extremes[f"layers/{name}"] = max(known[name], default=None)
        log_scalars(trainer.loggers, extremes, step)
        log_table(trainer.loggers, "layers", columns, rows, step)


def layer_table(model: nn.Module, changes: dict[str, Reprojection]) -> tuple[tuple[str, ...], list[list[Any]]]:
    """Columns, and one row per layer with a plan, in module order.

    Between ``FIRST_COLUMNS`` and ``LAST_COLUMNS`` stand the facts of the method. ``importance`` is the mean E[a²] of
    the input channels, ``projection_error`` is ``‖Ŵ - W‖² / ‖W‖²`` with channels weighted by E[a²] (``None`` where
    latents are no weight), ``winner_change`` the share of states that the last projection changed (``None`` before
    there was one).

    Args:
        changes: what the last projection of each layer found; a layer that is missing is decoded.
    """
    rows = []
    facts: tuple[str, ...] = ()
    for name, layer in compressed_layers(model).items():
        if (plan := layer.plan) is None:
            continue
        change, found = changes.get(name), plan.facts()
        facts = facts or tuple(found)
        error = _projection_error(layer) if change is None else float(change.relative_error)
        churn = None if change is None else float(change.winner_change)
        importance = float(layer.importance.double().mean())
        values = [found[fact].value for fact in facts]
        rows.append([name, *plan.shape, plan.bits_per_weight, importance, *values, error, churn])
    return (*FIRST_COLUMNS, *facts, *LAST_COLUMNS), rows


@torch.no_grad()
def _projection_error(layer: CompressedLinear) -> float | None:
    if "weight" not in layer.latents:
        return None
    latent = layer.latent_weight()
    error = (layer.decoded_weight() - latent).square().sum(0) @ layer.importance
    return float(error / (latent.square().sum(0) @ layer.importance).clamp_min(1e-30))
