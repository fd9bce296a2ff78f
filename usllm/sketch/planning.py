"""Planning: from the shape, the statistics and the budget of one layer to its plan."""

from __future__ import annotations

import torch
from torch import Tensor

from usllm.sketch.allocation import ALLOCATIONS, AllocationProblem
from usllm.sketch.config import SketchConfig
from usllm.sketch.plan import Plan


def build_plan(
    shape: tuple[int, int],
    importance: Tensor | None,
    config: SketchConfig,
    name: str,
    *,
    weight_energy: Tensor | None = None,
    bits_per_weight: float | None = None,
) -> Plan:
    """Share the bits of one layer out over its channels.

    Args:
        shape: ``(out, in)`` of the weight.
        importance: E[a²] of each input channel, [in]; ``None`` takes all channels as equal.
        config: The sketch configuration.
        name: Stable layer name.
        weight_energy: E[w²] of each input channel, [in]; used by ``waterfill``; ``None`` takes all as equal.
        bits_per_weight: Ceiling for this layer; ``None`` takes the configuration's.

    Raises:
        ValueError: Shape or importance do not fit, or the ceiling leaves no room for the tables alone.
    """
    out_features, in_features = shape
    if out_features < 1 or in_features < 1:
        raise ValueError(f"{name}: shape {tuple(shape)} must have at least one row and one column")
    values = _channel_values(importance, in_features, name, "importance")
    kept = values >= config.min_importance * values.mean() if config.min_importance else torch.ones_like(values) > 0
    rate = config.bits_per_weight if bits_per_weight is None else bits_per_weight
    problem = AllocationProblem(
        name=name,
        shape=(out_features, in_features),
        config=config,
        importance=values,
        weight_energy=_channel_values(weight_energy, in_features, name, "weight_energy"),
        kept=kept,
        budget_bits=int(rate * out_features * in_features),
    )
    if problem.available(2) < 0:
        least = (problem.budget_bits - problem.available(2)) / (out_features * in_features)
        raise ValueError(
            f"{name}: {rate:g} bits per weight is too little for a {out_features}x{in_features} layer: its tables"
            f" alone take {least:.3g}. Raise sketch.bits_per_weight or leave the layer out of model.patterns"
        )
    if config.allocation not in ALLOCATIONS:
        raise ValueError(f"sketch.allocation={config.allocation!r} is unknown: choose one of {', '.join(ALLOCATIONS)}")
    classes, channel_class = ALLOCATIONS[config.allocation](problem)
    return Plan(name, (out_features, in_features), config, classes, channel_class)


def _channel_values(values: Tensor | None, channels: int, name: str, what: str) -> Tensor:
    if values is None:
        return torch.ones(channels, dtype=torch.float64)
    if values.shape != (channels,):
        raise ValueError(f"{name}: {what} has shape {tuple(values.shape)}, expected ({channels},)")
    values = values.detach().to("cpu", torch.float64)
    if not bool(torch.isfinite(values).all()) or bool((values < 0).any()):
        raise ValueError(f"{name}: {what} must be finite and not negative; check the calibration text and the model")
    return values
