"""Ceilings of layers: a rule over layers that gives no answer is told so, and one that is rounded is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from usllm.compress import Compressor, Statistics, as_compressor, swap_linears_
from usllm.compress.budgets import BUDGETS, BudgetProblem
from usllm.compress.ceilings import layer_bits, shortfall
from usllm.sketch import SketchConfig
from usllm.system.errors import UserError


def bits_by(rule: str, rate: float, *shapes: tuple[int, int]) -> dict[str, int]:
    """Ceilings of layers ``layer0``, … of shapes ``(out, in)``."""
    model = nn.ModuleDict({f"layer{i}": nn.Linear(shape[1], shape[0]) for i, shape in enumerate(shapes)})
    layers = swap_linears_(model, ["*"])
    compressor = as_compressor(SketchConfig(bits_per_weight=rate, layer_budget=rule))
    return layer_bits(layers, compressor, {name: Statistics(energy=None) for name in layers})


def equal_but(**changed: Any) -> Callable[[BudgetProblem], Any]:
    """A rule that is ``equal`` but for some layers; ``None`` leaves one out."""

    def share(problem: BudgetProblem) -> Any:
        answer = BUDGETS["equal"](problem) | changed
        return {name: bits for name, bits in answer.items() if bits is not None}

    return share


FAULTY: dict[str, tuple[Callable[[BudgetProblem], Any], str]] = {
    "twice": (lambda problem: {n: 2 * b for n, b in BUDGETS["equal"](problem).items()}, "gives out 8192 bits, there"),
    "a layer less": (equal_but(layer1=None), "leaves out layer1"),
    "a layer more": (equal_but(other=1), "names an unknown layer, other"),
    "a fraction": (equal_but(layer0=2047.5), "gives layer0 2047.5 bits, not a whole number"),
    "a debt": (equal_but(layer0=-1, layer1=4000), "gives layer0 -1 bits"),
    "a list": (lambda problem: [1, 2], "returned list, not bits by layer"),
}


@pytest.mark.parametrize("name", FAULTY)
def test_rule_over_layers_that_breaks_the_ceiling_is_told_so(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rule, line = FAULTY[name]
    monkeypatch.setitem(BUDGETS, "mine", rule)
    with pytest.raises(UserError) as refused:
        bits_by("mine", 1.0, (32, 64), (64, 32))
    assert str(refused.value).startswith("allocation.layer_budget='mine': share() ")
    assert line in str(refused.value) and "a fault of the rule" in str(refused.value)


def test_rounding_of_each_layer_is_no_fault() -> None:
    shapes = (420, 81), (458, 120)
    bits = bits_by("equal", 0.35, *shapes)
    total = int(0.35 * sum(rows * columns for rows, columns in shapes))
    assert sum(bits.values()) == total + 1  # of products that are rounded one by one


def test_ceilings_come_in_the_order_of_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BUDGETS, "mine", lambda problem: dict(reversed(BUDGETS["equal"](problem).items())))
    assert list(bits_by("mine", 1.0, (32, 64), (64, 32))) == ["layer0", "layer1"]


@pytest.mark.parametrize(
    ("method", "rate", "reason"),
    [
        ("sketch", 1.0, None),
        ("sketch", 16.0, "1 of 1 layers can use no more than"),
        ("rounding", 3.9, "the next step of these layers would be above it"),
    ],
)
def test_bits_that_are_not_used_have_their_reason(method: str, rate: float, reason: str | None) -> None:
    compressor = as_compressor(SketchConfig(bits_per_weight=rate)) if method == "sketch" else rounding_at(rate)
    bits = int(rate * 64 * 256)
    plan = compressor.plan((64, 256), "layer", Statistics(torch.ones(256), torch.ones(256)), bits)
    found = shortfall({"layer": plan}, compressor)
    assert found is None if reason is None else reason in str(found)


def rounding_at(rate: float) -> Compressor:
    from usllm.rounding import RoundingConfig

    return as_compressor(RoundingConfig(bits_per_weight=rate))
