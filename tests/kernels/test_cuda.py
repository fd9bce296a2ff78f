"""On a card: every operator, one to five rows, odd shapes. What is whole numbers equals the CPU's, bit for bit.

The other files of this folder compare with the reference on the device of the kernels; here it is the CPU's, computed
apart. In Triton's interpreter, which is slow, a few of them run on the CPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import assert_product, slow_interpreted, stream
from torch import Tensor

from usllm import sketch
from usllm.sketch import Plan, SketchConfig, States, build_plan
from usllm_kernels import project, project_query, query, sketch_linear
from usllm_kernels.dispatch import installed, interpreted

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not installed("triton"), reason="triton is not installed"),
    pytest.mark.skipif(
        not (torch.cuda.is_available() or interpreted()),
        reason="no CUDA; tests/kernels/test_interpreted.py runs this in Triton's interpreter",
    ),
    pytest.mark.usefixtures("poisoned"),
]

OPERATORS: dict[str, dict[str, Any]] = {
    "absmaxmin": {},
    "signed-max": {"query": "signed_max"},
    "countmin": {"operator": "countmin"},
    "mean": {"operator": "mean"},
    "waterfill": {"allocation": "waterfill", "output_scale": True, "rounding": "nearest"},
}
WITH_EVERYTHING = "waterfill"
# Output rows and input channels; no number divides a tile, some are smaller than one.
SHAPES = [(37, 13), (1, 21), (3, 200), (577, 33), (1300, 70), (129, 1025)]


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu" if interpreted() else "cuda")


def layer(shape: tuple[int, int], rows: int, operator: str) -> tuple[Tensor, Plan, Tensor]:
    """A random weight, a plan and the moments that it follows, on the CPU."""
    generator = torch.Generator().manual_seed(rows)
    moment = torch.rand(shape[1], generator=generator) ** 6 + 1e-6
    rate = 60.0 if min(shape) < 10 else 3.0
    config = SketchConfig(bits_per_weight=rate, rows=rows, group_size=256, **OPERATORS[operator])
    return torch.randn(shape, generator=generator), build_plan(shape, moment, config, "layer"), moment


def on(device: torch.device, states: States) -> States:
    return {name: value.to(device) for name, value in states.items()}


every_layer = [
    # test_codec.py has layers of this shape and of every operator.
    pytest.mark.parametrize(
        "operator", [*slow_interpreted(*(name for name in OPERATORS if name != WITH_EVERYTHING)), WITH_EVERYTHING]
    ),
    pytest.mark.parametrize("rows", [*slow_interpreted(1), 4] if interpreted() else [1, 2, 3, 4, 5]),
    pytest.mark.parametrize("shape", SHAPES[:1] if interpreted() else SHAPES, ids=str),
]


def of_every_layer(test: Any) -> Any:
    """All operators, numbers of rows and shapes."""
    for mark in every_layer:
        test = mark(test)
    return test


@of_every_layer
def test_integers_are_the_cpus(shape: tuple[int, int], rows: int, operator: str, device: torch.device) -> None:
    weight, plan, moment = layer(shape, rows, operator)
    keeps = plan.operator.keeps_member
    of_cpu = torch.zeros(plan.num_states, dtype=torch.int16) if keeps else None
    of_card = torch.zeros(plan.num_states, dtype=torch.int16, device=device) if keeps else None
    expected = sketch.project(weight, plan, moment, winners=of_cpu)
    states = project(weight.to(device), plan, moment.to(device), winners=of_card, backend="triton")
    assert set(states) == set(expected)
    for name, value in expected.items():
        assert torch.equal(states[name].cpu(), value), name
    assert of_card is None or of_cpu is None or torch.equal(of_card.cpu(), of_cpu)
    decoded = sketch.query(expected, plan)
    for codes in (expected["codes"], stream(expected, plan)):
        held = on(device, {**expected, "codes": codes})
        for dtype in (torch.float32, torch.bfloat16):
            assert torch.equal(query(held, plan, dtype, backend="triton").cpu(), decoded.to(dtype))
    again, both = project_query(weight.to(device), plan, moment.to(device), dtype=torch.bfloat16, backend="triton")
    assert all(torch.equal(again[name].cpu(), expected[name]) for name in expected)
    assert torch.equal(both.cpu(), decoded.bfloat16())


@of_every_layer
def test_products_and_all_gradients(shape: tuple[int, int], rows: int, operator: str, device: torch.device) -> None:
    weight, plan, moment = layer(shape, rows, operator)
    expected = sketch.project(weight, plan, moment)
    packed = on(device, {**expected, "codes": stream(expected, plan)})
    decoded = sketch.query(expected, plan).to(device)
    generator = torch.Generator().manual_seed(1)
    for tokens in (1, 7) if interpreted() else (1, 7, 100, 300):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(tokens, shape[1], generator=generator).to(device, dtype).requires_grad_()
            latent = weight.detach().clone().to(device).requires_grad_()
            y = sketch_linear(x, packed, plan, weight=latent, backend="triton")
            gradient = torch.randn(tokens, shape[0], generator=generator).to(device, dtype)
            y.backward(gradient)
            assert x.grad is not None and latent.grad is not None
            assert_product(y.detach(), x.detach(), decoded.to(dtype).t())
            assert_product(x.grad, gradient, decoded.to(dtype))
            assert latent.grad.dtype == torch.float32
            assert_product(latent.grad.to(dtype), gradient.t(), x.detach())


@pytest.mark.skipif(interpreted(), reason="takes too long in the interpreter")
@pytest.mark.parametrize("operator", ["absmaxmin", "waterfill"])
def test_a_layer_of_a_real_size(operator: str, device: torch.device) -> None:
    shape = (2048, 8192)
    generator = torch.Generator().manual_seed(0)
    moment = torch.rand(shape[1], generator=generator) ** 8 + 1e-3
    plan = build_plan(shape, moment, SketchConfig(bits_per_weight=0.5, **OPERATORS[operator]), "layer")
    weight = torch.randn(shape, generator=generator)
    expected = sketch.project(weight, plan, moment)
    states = project(weight.to(device), plan, moment.to(device), backend="triton")
    assert all(torch.equal(states[name].cpu(), expected[name]) for name in expected)
    decoded = sketch.query(expected, plan).bfloat16().to(device)
    assert torch.equal(query(states, plan, torch.bfloat16, backend="triton"), decoded)
    for tokens in (1, 8, 64, 256):
        x = torch.randn(tokens, shape[1], generator=generator).to(device, torch.bfloat16)
        assert_product(sketch_linear(x, states, plan, backend="triton"), x, decoded.t())
