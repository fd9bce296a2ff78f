"""Layers that the contract is tested on: small, odd, and one for every choice that a kernel sees."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from usllm.sketch import Plan, SketchConfig, States, build_plan, project
from usllm.sketch.bitstream import pack
from usllm.sketch.classes import EMPTY
from usllm_kernels.dispatch import interpreted

FIELDS: dict[str, tuple[tuple[int, int], dict[str, Any]]] = {
    "plain": ((37, 13), {"bits_per_weight": 3.0}),
    "two-group-sizes": ((47, 11), {"bits_per_weight": 3.0, "group_size": 16, "rows": 2}),
    "one-row": ((40, 19), {"bits_per_weight": 2.0, "rows": 1}),
    "one-channel": ((64, 1), {"bits_per_weight": 12.0}),
    "one-output": ((1, 21), {"bits_per_weight": 60.0}),
    "one-state": ((40, 16), {"bits_per_weight": 1.6, "rows": 1, "allocation": "uniform"}),
    "state-for-every-weight": ((20, 9), {"bits_per_weight": 300.0}),
    "groups-of-one": ((3, 9), {"bits_per_weight": 60.0, "group_size": 1}),
    "signed-max": ((37, 13), {"bits_per_weight": 3.0, "query": "signed_max"}),
    "countmin": ((37, 13), {"bits_per_weight": 3.0, "operator": "countmin"}),
    "mean": ((37, 13), {"bits_per_weight": 3.0, "operator": "mean", "rows": 2}),
    "mixed-widths": ((80, 24), {"bits_per_weight": 3.0, "allocation": "waterfill", "output_scale": True}),
    "random-buckets": ((37, 13), {"bits_per_weight": 3.0, "hash": "uniform", "rounding": "nearest"}),
    "shared-mean": ((47, 12), {"bits_per_weight": 3.0, "operator": "mean", "hash": "shared", "group_size": 16}),
    "1-bit": ((37, 13), {"bits_per_weight": 3.0, "state_bits": 1}),
    "3-bit": ((37, 13), {"bits_per_weight": 3.0, "state_bits": 3, "rounding": "nearest"}),
    "16-bit": ((37, 13), {"bits_per_weight": 6.0, "state_bits": 16}),
    "no-states": ((12, 6), {}),
}


_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


class Case(NamedTuple):
    """A layer with its plan and its states, all on one device."""

    weight: Tensor
    plan: Plan
    moment: Tensor
    states: States
    packed: States


def case(name: str, device: torch.device | str = "cpu") -> Case:
    """One of :data:`FIELDS`, made of random weights."""
    shape, fields = FIELDS[name]
    generator = torch.Generator().manual_seed(len(name))
    moment = torch.rand(shape[1], generator=generator) ** 4 + 1e-3
    weight = torch.randn(shape, generator=generator).to(device)
    if fields:
        plan = build_plan(shape, moment, SketchConfig(**fields), name)
    else:
        plan = Plan(name, shape, SketchConfig(), (EMPTY,), torch.zeros(shape[1], dtype=torch.uint8))
    states = project(weight, plan, moment.to(device))
    return Case(weight, plan, moment.to(device), states, {**states, "codes": stream(states, plan)})


def stream(states: States, plan: Plan) -> Tensor:
    """Codes packed as in a file, uint8."""
    codes = states["codes"].cpu()
    runs = [(codes[b.first_state : b.first_state + b.num_states], b.choice.bits) for b in plan.blocks]
    packed = pack([((run < 0).to(torch.uint8) if bits == 1 else run, bits) for run, bits in runs])
    return packed.to(states["codes"].device)


def assert_product(found: Tensor, a: Tensor, b: Tensor) -> None:
    """``found`` is ``a @ b`` up to the rounding of its dtype, relative to what is added up."""
    assert found.dtype == a.dtype
    expected, size = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    assert bool(((found.double() - expected).abs() <= _TOLERANCE[a.dtype] * size + 1e-12).all())


def slow_interpreted(*values: Any) -> list[Any]:
    """Parameters that Triton's interpreter leaves to the slow suite: it takes a second or two for each."""
    return [pytest.param(value, marks=[pytest.mark.slow] if interpreted() else []) for value in values]


slow_when_interpreted = pytest.mark.slow if interpreted() else pytest.mark.usefixtures()
"""The same of a whole test."""

_LONG = ("shared-mean", "random-buckets", "3-bit", "16-bit")
every_case = pytest.mark.parametrize("name", [*(n for n in FIELDS if n not in _LONG), *slow_interpreted(*_LONG)])

# All products decode by the same function: in the interpreter, which is slow, a few layers do.
products_of = pytest.mark.parametrize(
    "name", ["plain", "two-group-sizes", "mixed-widths", "no-states"] if interpreted() else FIELDS
)
