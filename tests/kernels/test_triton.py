"""What only Triton's kernels do: rounding by hand, which the interpreter's arithmetic would hide, and cutting slabs."""

from __future__ import annotations

import pytest
import torch
from cases import assert_product, case, products_of

from usllm import sketch
from usllm_kernels import project, sketch_linear
from usllm_kernels.dispatch import interpreted

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from usllm_kernels.ops.project import triton as projection  # noqa: E402
from usllm_kernels.ops.sketch_linear import triton as products  # noqa: E402  # needs triton
from usllm_kernels.triton_tile import as_multiplied, as_stored  # noqa: E402

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        not (torch.cuda.is_available() or interpreted()),
        reason="no CUDA; tests/kernels/test_interpreted.py runs this in Triton's interpreter",
    ),
]

# Halfway cases up and down, signs, infinities, the largest float32, and NaNs whose bits overflow or vanish in rounding.
NUMBERS = [0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001, 0xBF818000, 0x7F800000, 0xFF800000, 0x7F7FFFFF, 0, 1]
NANS = [0x7FC00000, 0x7FFFFFFF, 0x7F800001, 0xFFFFFFFF, 0xFF800001]


@triton.jit
def rounding_kernel(source, stored, multiplied, N: tl.constexpr, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, N)
    value = tl.load(source + i, mask=i < COUNT, other=0).to(tl.float32, bitcast=True)
    tl.store(stored + i, as_stored(value, True, tl.bfloat16), mask=i < COUNT)
    tl.store(multiplied + i, as_multiplied(value, tl.bfloat16), mask=i < COUNT)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu" if interpreted() else "cuda")


def test_rounding_to_bfloat16_is_torchs_and_keeps_nan(device: torch.device) -> None:
    bits = torch.tensor(NUMBERS + NANS, dtype=torch.int64).to(torch.int32).to(device)
    stored = torch.empty(len(bits), dtype=torch.int16, device=device)
    multiplied = torch.empty(len(bits), device=device)
    rounding_kernel[(1,)](bits, stored, multiplied, N=16, COUNT=len(bits))
    expected = bits.view(torch.float32).bfloat16().float()
    for found in (stored.view(torch.bfloat16).float(), multiplied):
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", ["two-group-sizes", "groups-of-one", "shared-mean"])
def test_groups_are_ordered_a_few_at_a_time(name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = case(name, device)
    monkeypatch.setattr(projection, "ORDERED_BYTES", 2 * 4 * layer.plan.num_active * layer.plan.spans[-1].size)
    states = project(layer.weight, layer.plan, layer.moment, backend="triton")
    assert all(torch.equal(states[key], layer.states[key]) for key in layer.states)


@pytest.mark.usefixtures("poisoned")
@products_of
def test_slabs_are_cut_anywhere(name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "SLAB", 100)
    layer = case(name, device)
    decoded = sketch.query(layer.states, layer.plan)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(130, layer.plan.shape[1], generator=generator).to(device).requires_grad_()
    gradient = torch.randn(130, layer.plan.shape[0], generator=generator).to(device)
    y = sketch_linear(x, layer.packed, layer.plan, backend="triton")
    y.backward(gradient)
    assert x.grad is not None
    assert_product(y.detach(), x.detach(), decoded.t())
    assert_product(x.grad, gradient, decoded)
