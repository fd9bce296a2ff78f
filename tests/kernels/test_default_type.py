"""Servers make the model's type torch's default one: no number may come out otherwise for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from cases import Case, case
from torch import Tensor

from usllm_kernels import block_linear, plane_linear, plane_weight, project, project_query, query, sketch_linear
from usllm_kernels.blocks import BLOCK, BLOCK_BYTES
from usllm_kernels.sketch_planes import sketch_planes
from usllm_kernels.tables import best_scales, scale_ratios

_DRAW = torch.Generator().manual_seed(0)
INPUTS = {tokens: torch.randn(tokens, BLOCK, generator=_DRAW) for tokens in (1, 5, 40)}
PACKED = {bits: torch.randint(0, 16, (77, BLOCK_BYTES[bits]), generator=_DRAW, dtype=torch.uint8) for bits in (8, 4)}


def of_states(layer: Case, backend: str) -> Iterator[Tensor]:
    """What is made of weights and of states."""
    weight, plan, moment, states, _ = layer
    yield from project(weight, plan, moment, backend=backend).values()
    yield query(states, plan, backend=backend)
    sums = weight.new_empty(2, plan.shape[1])
    for found in project_query(weight, plan, moment, sums=sums, backend=backend):
        yield from found.values() if isinstance(found, dict) else [found]
    yield sums


def of_inputs(layer: Case, backend: str) -> Iterator[Tensor]:
    """Products with states."""
    _, plan, _, states, _ = layer
    for x in INPUTS.values():
        for dtype in (torch.float32, torch.bfloat16):
            yield sketch_linear(x[:, : plan.shape[1]].to(dtype), states, plan, backend=backend)


def of_planes(layer: Case, backend: str) -> Iterator[Tensor]:
    """Codes in output order, and products with them."""
    _, plan, _, states, _ = layer
    planes = sketch_planes(states, plan)
    yield from planes.tensors
    yield plane_weight(planes, torch.bfloat16, backend=backend)
    for x in INPUTS.values():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            yield plane_linear(x[:, : plan.shape[1]].to(dtype), planes, backend=backend)


def of_blocks(layer: Case, backend: str) -> Iterator[Tensor]:
    """Products with blocks of 8 and 4 bits, of no layer."""
    for bits, packed in PACKED.items():
        for x in INPUTS.values():
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                yield block_linear(x.to(dtype), packed, bits, backend=backend)


@pytest.mark.parametrize("backend", ["torch", "numba"], indirect=True)
@pytest.mark.parametrize(
    ("made", "name"),
    [
        *((made, name) for made in (of_states, of_inputs) for name in ("mixed-widths", "mean", "no-states")),
        *((of_planes, name) for name in ("mixed-widths", "one-row")),
        (of_blocks, "plain"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_numbers_do_not_depend_on_the_default_type(
    made: Callable[[Case, str], Iterator[Tensor]], name: str, backend: str
) -> None:
    layer = case(name)
    expected = list(made(layer, backend))
    for kept in (best_scales, scale_ratios):
        kept.cache_clear()
    try:
        torch.set_default_dtype(torch.bfloat16)
        found = list(made(layer, backend))
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one.nan_to_num(), other.nan_to_num())
