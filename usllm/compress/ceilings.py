"""The ceiling in bits of each layer, and whether the method can keep it: asked before any long work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from usllm.compress.base import Compressor, LayerPlan
from usllm.compress.budgets import BUDGETS, BudgetProblem, LayerDemand
from usllm.compress.layer import CompressedLinear
from usllm.compress.values import Statistics
from usllm.system.errors import UserError
from usllm.system.plugins import unknown_name

USED = 0.98
"""Below this share of what was asked for, the reason is said."""


def layer_bits(
    layers: Mapping[str, CompressedLinear], compressor: Compressor, statistics: Mapping[str, Statistics]
) -> dict[str, int]:
    """Ceiling in bits of each layer, by the rule over layers that the compressor's options name.

    Raises:
        UserError: There is no such rule, or its answer is none.
    """
    rule, rate = compressor.options.layer_budget, compressor.options.bits_per_weight
    if rate is None:  # a method that is asked by its width: a layer takes what it takes
        return {name: compressor.most_bits(layer.shape) for name, layer in layers.items()}
    if rule not in BUDGETS:
        raise UserError(unknown_name("allocation.layer_budget", rule, BUDGETS, "rule"))
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
    problem = BudgetProblem(demands, rate)
    answer = BUDGETS[rule](problem)
    _refuse_no_answer(rule, problem, answer)
    return {name: answer[name] for name in layers}


def _refuse_no_answer(rule: str, problem: BudgetProblem, answer: Any) -> None:
    """Refuse what a rule over layers, which may be a plug-in's, has returned instead of a ceiling for each layer.

    Products of a rate and a number of weights are rounded one by one: a bit a layer above the total is none too many.

    Raises:
        UserError: Layers are missing or unknown, a ceiling is no whole number, or all are more bits than there are.
    """

    def fault(line: str) -> UserError:
        return UserError(f"allocation.layer_budget={rule!r}: share() {line}: a fault of the rule, report it")

    if not isinstance(answer, Mapping):
        raise fault(f"returned {type(answer).__name__}, not bits by layer")
    if odd := sorted(map(str, answer.keys() ^ problem.layers.keys())):
        what = "leaves out" if odd[0] in problem.layers else "names an unknown layer,"
        raise fault(f"{what} {odd[0]} ({len(odd)} such layers in all)")
    for name, bits in answer.items():
        if type(bits) is not int or bits < 0:
            raise fault(f"gives {name} {bits!r} bits, not a whole number from 0 up")
    total = sum(answer.values())
    if total > problem.bits + len(answer):
        raise fault(f"gives out {total} bits, there are {problem.bits}")


def _sensitivity(known: Statistics) -> torch.Tensor | None:
    if known.energy is None or known.gradient is None:
        return None
    of_weights = 1.0 if known.weight_energy is None else known.weight_energy.double()
    return known.energy.double() * of_weights * known.gradient.double().mean()


def shortfall(plans: Mapping[str, LayerPlan], compressor: Compressor) -> str | None:
    """Why layers take noticeably fewer bits than were asked for, in one line; ``None`` where they do not."""
    rate = compressor.options.bits_per_weight
    weights = {name: plan.shape[0] * plan.shape[1] for name, plan in plans.items()}
    if rate is None or sum(plan.total_bits for plan in plans.values()) >= USED * rate * sum(weights.values()):
        return None
    most = {name: compressor.most_bits(plan.shape) / weights[name] for name, plan in plans.items()}
    full = [held for held in most.values() if held < rate]
    if full:
        return f"{len(full)} of {len(most)} layers can use no more than {max(full):.4g} with these options of sketch"
    return "the next step of these layers would be above it"


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
