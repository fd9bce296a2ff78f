"""Swap a model's linear layers for compressed ones, share the bits out, and save or restore the plans."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from fnmatch import fnmatch
from typing import Any

from torch import Tensor, nn

from usllm.compress.base import Compressor, LayerPlan
from usllm.compress.budgets import budget_needs
from usllm.compress.ceilings import layer_bits
from usllm.compress.graphed import reproject_graphed
from usllm.compress.layer import CompressedLinear, Reprojection, compressed_layers
from usllm.compress.parallel import over_layers
from usllm.compress.registry import as_compressor
from usllm.compress.report import CompressionReport, compression_report
from usllm.compress.sharded import (
    channel_energy,
    channel_energy_sharded,
    for_own_layers,
    is_sharded,
    reproject_sharded,
)
from usllm.compress.values import Statistics
from usllm.system.errors import UserError

DEFAULT_PATTERNS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj")

POLICY: dict[type[nn.Module], Callable[[Any, str], CompressedLinear]] = {nn.Linear: CompressedLinear}
"""Replacement of each type of module, called with the module and its stable name. Fused projections are linear too."""


def swap_linears_(model: nn.Module, patterns: Iterable[str] = DEFAULT_PATTERNS) -> dict[str, CompressedLinear]:
    """Replace the linear layers that match by compressed layers without a plan; in place.

    Args:
        model: Any model of ``nn.Linear`` layers.
        patterns: Shell patterns, matched against the last part of a layer's name and against the full name.

    Returns:
        The compressed layers by name.

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
    found: dict[str, Any] = {}
    # A linear layer that two places share comes up under both names; swapping it in one would untie them.
    for name, module in model.named_modules(remove_duplicate=False):
        if not matches(name, patterns) or not any(isinstance(module, kind) for kind in POLICY):
            continue
        if owners.count(id(module._parameters["weight"])) > 1:
            raise UserError(
                f"model.patterns matches {name}, whose weight is tied to another module: leave it out of the patterns"
            )
        found[name] = module
    if not found:
        linears = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, tuple(POLICY))})
        raise UserError(
            f"model.patterns={list(patterns)} matches no linear layer of {type(model).__name__}: "
            f"its linear layers are named {', '.join(linears) or '(none)'}"
        )
    compressed = {}
    for name, module in found.items():  # only now: a model that is refused is left as it was
        make = next(make for kind, make in POLICY.items() if isinstance(module, kind))
        compressed[name] = make(module, name)
        model.set_submodule(name, compressed[name])
    return compressed


def plan_layers(
    model: nn.Module, compressor: Compressor, statistics: Mapping[str, Statistics]
) -> tuple[dict[str, int], dict[str, LayerPlan]]:
    """Bits and plans of all compressed layers under one budget, by name; the model is left as it is.

    Args:
        model: A model with compressed layers whose latents are still the dense weights.
        compressor: The method and its configuration.
        statistics: By layer name; weight energies are measured here where they are missing.

    Raises:
        UserError: If a layer has no statistics, or its bits leave no room.
    """
    layers = compressed_layers(model)
    if missing := sorted(set(layers) - set(statistics)):
        raise UserError(
            f"no importance was measured for {missing[0]} ({len(missing)} layers in all): calibrate them too"
        )
    for line in compressor.problems():
        raise UserError(line)
    known = with_weight_energy(layers, compressor, statistics)
    bits = layer_bits(layers, compressor, known)
    return bits, {name: plan_layer(layer, compressor, known[name], bits[name]) for name, layer in layers.items()}


def with_weight_energy(
    layers: Mapping[str, CompressedLinear], compressor: Compressor, statistics: Mapping[str, Statistics]
) -> dict[str, Statistics]:
    """Statistics with the E[w²] of latents that are still the dense weights, where something reads it."""
    read = compressor.needs | budget_needs(compressor.options.layer_budget)
    missing = {name: layer for name, layer in layers.items() if read and statistics[name].weight_energy is None}
    if is_sharded(layers):
        energies = channel_energy_sharded(missing)
    else:
        energies = {name: channel_energy(layer.latent_weight()) for name, layer in missing.items()}
    return {
        name: replace(statistics[name], weight_energy=energies[name]) if name in energies else statistics[name]
        for name in layers
    }


def plan_layer(layer: CompressedLinear, compressor: Compressor, statistics: Statistics, bits: int) -> LayerPlan:
    """Plan of one layer under a ceiling in bits.

    Raises:
        UserError: The bits leave no room.
    """
    try:
        return compressor.plan(layer.shape, layer.name, statistics, bits)
    except ValueError as error:
        raise UserError(str(error)) from error


def start_(model: nn.Module, plans: Mapping[str, LayerPlan], statistics: Mapping[str, Statistics]) -> None:
    """Give all compressed layers their plans, first latents and states; in place.

    Raises:
        RuntimeError: If the model is sharded and the method has latents of its own, which exist before that, or the
            layers were started before with such latents: the dense weights are gone.
    """
    layers = compressed_layers(model)
    sharded = is_sharded(layers)
    for name, plan in plans.items():
        layer, latents = layers[name], None
        if set(plan.latent_specs()) != {"weight"}:
            if sharded:
                raise RuntimeError(f"{name}: latents of {plan.compressor.method} are started before a model is sharded")
            latents = plan.start(layer.latent_weight(), statistics[name])
        layer.set_plan(plan, statistics[name].energy, latents)
    reproject_(model)


def allocate_(model: nn.Module, config: Any, importance: Mapping[str, Tensor | Statistics] | None = None) -> None:
    """Plan all compressed layers under one budget, start their latents and make their states; in place.

    Args:
        model: A model with compressed layers.
        config: A compressor, or the options of a method, such as :class:`usllm.sketch.SketchConfig`.
        importance: By layer name, E[a²] per input channel [in], or all statistics; ``None`` keeps what the layers hold.

    Raises:
        UserError: If a layer has no importance, or its bits leave no room for its tables.
    """
    layers = compressed_layers(model)
    given: Mapping[str, Tensor | Statistics]
    given = {name: layer.importance for name, layer in layers.items()} if importance is None else importance
    statistics = {
        name: value if isinstance(value, Statistics) else Statistics(energy=value) for name, value in given.items()
    }
    _, plans = plan_layers(model, as_compressor(config), statistics)
    start_(model, plans, statistics)


def reproject_(model: nn.Module) -> dict[str, Reprojection]:
    """Project all layers that store states; what changed, by layer name.

    On a card the next call writes over what this one gave.
    """
    layers = _with_stored_states(model)
    if is_sharded(layers):
        return reproject_sharded(layers)
    devices = {layer.importance.device for layer in layers.values()}
    if len(devices) == 1 and devices.pop().type == "cuda":
        return reproject_graphed(model, layers)
    return over_layers(CompressedLinear.reproject, layers)


def recall_winners_(model: nn.Module) -> None:
    """After a checkpoint was loaded, find again what the next projections compare with."""
    layers = _with_stored_states(model)
    if is_sharded(layers):
        for_own_layers(lambda layer, latents: layer.recall_memory(latents), layers)
    else:
        over_layers(CompressedLinear.recall_memory, layers)


def compress_(
    model: nn.Module,
    config: Any,
    importance: Mapping[str, Tensor | Statistics] | None = None,
    patterns: Iterable[str] = DEFAULT_PATTERNS,
) -> CompressionReport:
    """Compress a model in place: swap, plan, start, project.

    Args:
        model: Any decoder whose linear layers match.
        config: A compressor, or the options of a method, such as :class:`usllm.sketch.SketchConfig`.
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
    return {name: layer.plan.to_tensors() for name, layer in compressed_layers(model).items() if layer.plan is not None}


def load_plans_(model: nn.Module, saved: Mapping[str, Any], config: Any) -> None:
    """Restore plans from :func:`save_plans`, so that a state dict with their states can be loaded; in place.

    Raises:
        UserError: If the checkpoint's layers are not the model's.
    """
    compressor = as_compressor(config)
    layers = compressed_layers(model)
    if saved and set(saved) != set(layers):
        odd = sorted(set(saved) ^ set(layers))[0]
        raise UserError(
            f"the checkpoint's compressed layers are not this model's (first difference: {odd}): check model"
        )
    for name, tensors in saved.items():
        layers[name].set_plan(compressor.restore(tensors, layers[name].shape, name))


def _with_stored_states(model: nn.Module) -> dict[str, CompressedLinear]:
    """Layers whose states are stored; one that has no plan is among them, so that projecting it raises."""
    return {
        name: layer
        for name, layer in compressed_layers(model).items()
        if layer.plan is None or layer.plan.stored_states
    }


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a pattern fits the last part of a layer's name, or the whole of it."""
    last = name.rpartition(".")[2]
    return any(fnmatch(last, pattern) or fnmatch(name, pattern) for pattern in patterns)
