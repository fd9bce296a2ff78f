"""Swap a model's linear layers for sketched ones, share the bits out, and save or restore the plans.

The compressor is reached only through its configuration's plans, so anything that can plan, project and query a
weight matrix goes through the same surgery, bit count and report.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from typing import Any

from torch import Tensor, nn

from usllm.compress.parallel import over_layers
from usllm.compress.report import CompressionReport, compression_report
from usllm.compress.sharded import (
    channel_energy,
    channel_energy_sharded,
    for_own_layers,
    is_sharded,
    reproject_sharded,
)
from usllm.compress.sketched_linear import Reprojection, SketchedLinear, sketched_layers
from usllm.sketch import Plan, SketchConfig, build_plan, layer_rates
from usllm.system.errors import UserError

DEFAULT_PATTERNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj")


def swap_linears_(model: nn.Module, patterns: Iterable[str] = DEFAULT_PATTERNS) -> dict[str, SketchedLinear]:
    """Replace the linear layers that match by sketched layers without a plan; in place.

    Args:
        model: Any model of ``nn.Linear`` layers.
        patterns: Shell patterns, matched against the last part of a layer's name and against the full name.

    Returns:
        The sketched layers by name.

    Raises:
        UserError: If no layer matches, or one that matches shares its weight with another module.
    """
    patterns = tuple(patterns)
    owners = [
        id(parameter)
        for _, module in model.named_modules(remove_duplicate=False)
        for parameter in module._parameters.values()
        if parameter is not None
    ]
    found: dict[str, nn.Linear] = {}
    # A linear layer that two places share comes up under both names; swapping it in one would untie them.
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, nn.Linear) or not _matches(name, patterns):
            continue
        if owners.count(id(module.weight)) > 1:
            raise UserError(
                f"model.patterns matches {name}, whose weight is tied to another module: leave it out of the patterns"
            )
        found[name] = module
    if not found:
        linears = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
        raise UserError(
            f"model.patterns={list(patterns)} matches no linear layer of {type(model).__name__}: "
            f"its linear layers are named {', '.join(linears) or '(none)'}"
        )
    sketched = {}
    for name, linear in found.items():  # only now: a model that is refused is left as it was
        sketched[name] = SketchedLinear(linear, name)
        model.set_submodule(name, sketched[name])
    return sketched


def allocate_(model: nn.Module, config: SketchConfig, importance: Mapping[str, Tensor] | None = None) -> None:
    """Plan all sketched layers under one budget and project them; in place.

    Args:
        model: A model with sketched layers.
        config: The sketch configuration.
        importance: E[a²] per input channel by layer name, each [in]; ``None`` keeps what the layers hold.

    Raises:
        UserError: If a layer has no importance, or its bits leave no room for its tables.
    """
    layers = sketched_layers(model)
    missing = sorted(set(layers) - set(importance)) if importance is not None else []
    if missing:
        raise UserError(
            f"no importance was measured for {missing[0]} ({len(missing)} layers in all): calibrate them too"
        )
    values = {name: (layer.importance if importance is None else importance[name]) for name, layer in layers.items()}
    means = {name: float(value.double().mean()) for name, value in values.items()}
    rates = layer_rates({name: layer.weight.numel() for name, layer in layers.items()}, means, config)
    sharded = is_sharded(layers)
    energies = channel_energy_sharded(layers) if sharded else {}
    for name, layer in layers.items():
        energy = energies[name] if sharded else channel_energy(layer.weight)
        shape = (layer.out_features, layer.in_features)
        try:
            plan = build_plan(shape, values[name], config, name, weight_energy=energy, bits_per_weight=rates[name])
        except ValueError as error:
            raise UserError(str(error)) from error
        layer.set_plan(plan, values[name])
        if not sharded:
            layer.reproject()
    if sharded:
        reproject_sharded(layers)


def reproject_(model: nn.Module) -> dict[str, Reprojection]:
    """Project all sketched layers; what changed, by layer name."""
    layers = sketched_layers(model)
    return reproject_sharded(layers) if is_sharded(layers) else over_layers(SketchedLinear.reproject, layers)


def recall_winners_(model: nn.Module) -> None:
    """After a checkpoint was loaded, find the winners of all layers' states again."""
    layers = sketched_layers(model)
    if is_sharded(layers):
        for_own_layers(SketchedLinear.recall_winners, layers)
    else:
        over_layers(SketchedLinear.recall_winners, layers)


def compress_(
    model: nn.Module,
    config: SketchConfig,
    importance: Mapping[str, Tensor] | None = None,
    patterns: Iterable[str] = DEFAULT_PATTERNS,
) -> CompressionReport:
    """Sketch a model in place: swap, allocate, project.

    Args:
        model: Any decoder whose linear layers match.
        config: The sketch configuration.
        importance: E[a²] per input channel by layer name (:mod:`usllm.calibration`); ``None`` takes all as equal.
        patterns: Which layers.

    Raises:
        UserError: If nothing matches or the bits leave no room.
    """
    swap_linears_(model, patterns)
    allocate_(model, config, importance)
    return compression_report(model)


def save_plans(model: nn.Module) -> dict[str, Any]:
    """The plans of all layers for a checkpoint: tensors and plain Python only."""
    return {name: layer.plan.to_tensors() for name, layer in sketched_layers(model).items() if layer.plan is not None}


def load_plans_(model: nn.Module, saved: Mapping[str, Any], config: SketchConfig) -> None:
    """Restore plans from :func:`save_plans`, so that a state dict with their states can be loaded; in place.

    Raises:
        UserError: If the checkpoint's layers are not the model's.
    """
    layers = sketched_layers(model)
    if saved and set(saved) != set(layers):
        odd = sorted(set(saved) ^ set(layers))[0]
        raise UserError(f"the checkpoint's sketched layers are not this model's (first difference: {odd}): check model")
    for name, tensors in saved.items():
        shape = (layers[name].out_features, layers[name].in_features)
        layers[name].set_plan(Plan.from_tensors(tensors, shape, config, name))


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    last = name.rpartition(".")[2]
    return any(fnmatch(last, pattern) or fnmatch(name, pattern) for pattern in patterns)
