"""Planning: from the shape, the statistics and the budget of one layer to its plan."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from usllm.sketch.allocation import ALLOCATIONS, LARGEST, SMALLEST, AllocationProblem, AllocationTable
from usllm.sketch.bits import available_bits, whole_bytes
from usllm.sketch.classes import EMPTY, MAX_CLASSES, ChannelClass
from usllm.sketch.config import SketchConfig
from usllm.sketch.layer_bytes import MAX_DIMENSION, pack_layer, read_plan
from usllm.sketch.plan import Plan
from usllm.system.errors import PackedFormatError
from usllm.system.plugins import unknown_name

_ROUNDING = 1 - 1e-12  # a mean of equal values may lie above them


def build_plan(
    shape: tuple[int, int],
    importance: Tensor | None,
    config: SketchConfig,
    name: str,
    *,
    weight_energy: Tensor | None = None,
    bits_per_weight: float | None = None,
    budget_bits: int | None = None,
) -> Plan:
    """Share the bits of one layer out over its channels.

    Args:
        shape: ``(out, in)`` of the weight.
        importance: E[a²] of each input channel, [in]; ``None`` takes all channels as equal.
        config: The sketch configuration.
        name: Stable layer name.
        weight_energy: E[w²] of each input channel, [in]; used by ``waterfill``; ``None`` takes all as equal.
        bits_per_weight: Ceiling for this layer; ``None`` takes the configuration's.
        budget_bits: The same to the bit, instead.

    Returns:
        A plan that keeps its ceiling, has at most 16 classes, and is read back from its own bytes as it is.

    Raises:
        ValueError: Shape or importance do not fit, the threshold leaves no channel, or the ceiling leaves no room for
            the tables and the smallest channel: then the message names the least rate that does. Also where a rule's
            answer fails the check of the plan: a fault of the rule.
    """
    problem = _problem(shape, importance, config, name, weight_energy)
    weights = shape[0] * shape[1]
    rate = config.bits_per_weight if bits_per_weight is None else bits_per_weight
    if budget_bits is not None and budget_bits != int(rate * weights):
        rate = budget_bits / weights
    budget = int(rate * weights) if budget_bits is None else budget_bits
    least = _least_bits(problem, everywhere=bool(problem.kept.all()))
    if budget < least:
        raise ValueError(
            f"{name}: {rate:.4g} bits per weight is too little for a {shape[0]}x{shape[1]} layer: its tables"
            f" and one channel take {_least_rate(least, weights):.4g}. Raise sketch.bits_per_weight to at least that,"
            " or leave the layer out of model.patterns"
        )
    problem = replace(problem, budget_bits=budget)
    if budget >= _most_bits(problem):
        classes, channel_class = _full(problem)
    elif problem.available(2) >= problem.channel_bits(_smallest(problem)):
        classes, channel_class = ALLOCATIONS[config.allocation](problem)
    else:
        classes, channel_class = _one_class(problem)
    plan = Plan(name, shape, config, classes, channel_class)
    check_plan(plan, budget)
    return plan


def bit_range(shape: tuple[int, int], config: SketchConfig) -> tuple[int, int]:
    """Least and most bits that a layer of this shape can be given, whatever its statistics.

    Args:
        shape: ``(out, in)`` of the weight.
        config: The sketch configuration.

    Returns:
        The bits of tables and the smallest channel, and those of a layer that has no use for more.

    Raises:
        ValueError: The shape is impossible or the allocation unknown.
    """
    problem = _problem(shape, None, replace(config, min_importance=0.0), "layer", None)
    least = _least_bits(problem, everywhere=not config.min_importance)
    return least, max(_most_bits(problem), least)


def check_plan(plan: Plan, budget_bits: int) -> None:
    """Refuse a plan that is not what every reader of it relies on.

    Args:
        plan: Any plan.
        budget_bits: Its ceiling.

    Raises:
        ValueError: It takes more bits, has more than 16 classes, or is not read back from its own bytes as it is.
    """

    def fail(problem: str) -> ValueError:
        rule = plan.config.allocation
        return ValueError(
            f"{plan.name}: allocation {rule!r} made a plan that {problem}: a fault of the rule, report it"
        )

    if not 1 <= len(plan.classes) <= MAX_CLASSES:
        raise fail(f"has {len(plan.classes)} classes of channels, 1 to {MAX_CLASSES} fit")
    if plan.total_bits > budget_bits:
        raise fail(f"takes {plan.total_bits} bits, its ceiling is {budget_bits}")
    try:
        read = read_plan(pack_layer(plan, plan.state_tensors()), plan.shape, plan.config, plan.name)
    except (PackedFormatError, RuntimeError, IndexError, ValueError) as error:
        raise fail(f"cannot be read from its own bytes ({error})") from error
    same = plan.channel_class.dtype == torch.uint8 and plan.classes == read.classes
    if not (same and torch.equal(read.channel_class, plan.channel_class)):
        raise fail("is another one when it is read from its own bytes")


def _problem(
    shape: tuple[int, int],
    importance: Tensor | None,
    config: SketchConfig,
    name: str,
    weight_energy: Tensor | None,
) -> AllocationProblem:
    """The checked problem, without a budget."""
    out_features, in_features = shape
    if out_features < 1 or in_features < 1:
        raise ValueError(f"{name}: shape {tuple(shape)} must have at least one row and one column")
    if max(shape) > MAX_DIMENSION:
        raise ValueError(
            f"{name}: shape {tuple(shape)} has a side above {MAX_DIMENSION}, which no packed layer holds: leave the"
            " layer out of model.patterns"
        )
    if config.allocation not in ALLOCATIONS:
        raise ValueError(unknown_name("sketch.allocation", config.allocation, ALLOCATIONS, "rule"))
    values = _channel_values(importance, in_features, name, "importance")
    kept = values >= config.min_importance * values.mean() * _ROUNDING
    if not bool(kept.any()):
        raise ValueError(
            f"{name}: allocation.min_importance={config.min_importance:g} leaves no channel: the most important one has"
            f" {float(values.max() / values.mean()):.3g} times the mean of its layer, too little. Lower the threshold"
        )
    energy = _channel_values(weight_energy, in_features, name, "weight_energy")
    return AllocationProblem(name, (out_features, in_features), config, values, energy, kept, budget_bits=0)


def _smallest(problem: AllocationProblem) -> ChannelClass:
    """The class of fewest bits that the rule gives to a channel with states."""
    found = SMALLEST.get(problem.config.allocation)
    return found(problem) if found else problem.one_state


def _largest(problem: AllocationProblem) -> ChannelClass:
    """The class of most bits that the rule gives to a channel: with it in all, a layer has no use for more."""
    found = LARGEST.get(problem.config.allocation)
    return found(problem) if found else problem.one_state._replace(states=problem.largest_group)


def _table_bits(problem: AllocationProblem, classes: int) -> int:
    """Bits of header, tables and output scales."""
    return -available_bits(problem.shape, problem.config.output_scale, classes, 0)


def _least_bits(problem: AllocationProblem, *, everywhere: bool) -> int:
    """Bits of the smallest plan with states: the smallest class in one channel, or in all without a table of them.

    Args:
        problem: The layer.
        everywhere: Whether all channels may hold states.
    """
    smallest = problem.channel_bits(_smallest(problem))
    least = _table_bits(problem, 2) + whole_bytes(smallest)
    if everywhere:
        least = min(least, _table_bits(problem, 1) + whole_bytes(smallest * problem.shape[1]))
    return least


def _most_bits(problem: AllocationProblem) -> int:
    """Bits of the plan whose kept channels all have the largest class."""
    kept = int(problem.kept.sum())
    stored = problem.channel_bits(_largest(problem)) * kept
    return _table_bits(problem, 1 if kept == problem.shape[1] else 2) + whole_bytes(stored)


def _full(problem: AllocationProblem) -> AllocationTable:
    """The largest class for all kept channels."""
    largest = _largest(problem)
    if bool(problem.kept.all()):
        return AllocationTable((largest,), torch.zeros(problem.shape[1], dtype=torch.uint8))
    return AllocationTable((EMPTY, largest), problem.kept.to(torch.uint8))


def _least_rate(bits: int, weights: int) -> float:
    """A rate of four digits whose budget holds ``bits``, and hardly more."""
    step = 10.0 ** (math.floor(math.log10(bits / weights)) - 3)
    steps = math.ceil(bits / weights / step)
    while int(float(f"{steps * step:.4g}") * weights) < bits:
        steps += 1
    return float(f"{steps * step:.4g}")


def _one_class(problem: AllocationProblem) -> AllocationTable:
    """The same states for all channels, where not even a table of two classes fits."""
    share = problem.available(1) // problem.shape[1]
    widest = problem.widest(_smallest(problem), share)
    return AllocationTable((widest,), torch.zeros(problem.shape[1], dtype=torch.uint8))


def _channel_values(values: Tensor | None, channels: int, name: str, what: str) -> Tensor:
    if values is None:
        return torch.ones(channels, dtype=torch.float64)
    if values.shape != (channels,):
        raise ValueError(f"{name}: {what} has shape {tuple(values.shape)}, expected ({channels},)")
    values = values.detach().to("cpu", torch.float64)
    if not bool(torch.isfinite(values).all()) or bool((values < 0).any()):
        raise ValueError(f"{name}: {what} must be finite and not negative; check the calibration text and the model")
    return values
