"""The ceiling in bits of each layer, and whether the method can keep it: asked before any long work."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from usllm.compress.base import Compressor
from usllm.compress.budgets import BUDGETS, BudgetProblem, LayerDemand
from usllm.compress.layer import CompressedLinear
from usllm.compress.values import Statistics
from usllm.system.errors import UserError


def layer_bits(
    layers: Mapping[str, CompressedLinear], compressor: Compressor, statistics: Mapping[str, Statistics]
) -> dict[str, int]:
    """Ceiling in bits of each layer, by the rule over layers that the compressor's options name.

    Raises:
        UserError: There is no such rule.
    """
    rule, rate = compressor.options.layer_budget, compressor.options.bits_per_weight
    if rate is None:  # a method that is asked by its width: a layer takes what it takes
        return {name: compressor.most_bits(layer.shape) for name, layer in layers.items()}
    if rule not in BUDGETS:
        raise UserError(f"allocation.layer_budget={rule!r} is unknown: choose one of {', '.join(BUDGETS)}")
    demands = {}
    for name, layer in layers.items():
        energy = statistics[name].energy
        demands[name] = LayerDemand(
            weights=layer.out_features * layer.in_features,
            importance=1.0 if energy is None else float(energy.double().mean()),
            least_bits=compressor.least_bits(layer.shape),
            most_bits=compressor.most_bits(layer.shape),
            sensitivity=_sensitivity(statistics[name]),
        )
    return BUDGETS[rule](BudgetProblem(demands, rate))


def _sensitivity(known: Statistics) -> torch.Tensor | None:
    if known.energy is None or known.gradient is None:
        return None
    of_weights = 1.0 if known.weight_energy is None else known.weight_energy.double()
    return known.energy.double() * of_weights * known.gradient.double().mean()


def refuse_unreachable(layers: Mapping[str, CompressedLinear], compressor: Compressor) -> None:
    """Refuse a rate that no statistics of the layers make possible; their weights may be on the meta device.

    Only layers whose ceiling is below the least or above the most that the method can store are planned, with even
    statistics, for the message that the method gives.

    Raises:
        UserError: Names key, value and way out.
    """
    for line in compressor.problems():
        raise UserError(line)
    even = {name: Statistics(torch.ones(layer.in_features)) for name, layer in layers.items()}
    asked = layer_bits(layers, compressor, even)
    for name, layer in layers.items():
        if compressor.least_bits(layer.shape) <= asked[name] <= compressor.most_bits(layer.shape):
            continue
        columns, rows = torch.ones(layer.in_features), torch.ones(layer.out_features)
        covariance = torch.eye(layer.in_features) if "covariance" in compressor.needs else None
        try:
            compressor.plan(layer.shape, name, Statistics(columns, columns, covariance, rows), asked[name])
        except ValueError as error:
            raise UserError(str(error)) from error
