"""Products on the CPU work at addresses: what lies otherwise than they think is refused, and tracers see an op."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import case
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from usllm_kernels import Codes, block_linear, make_planes, plane_linear, sketch_linear
from usllm_kernels.blocks import BLOCK, BLOCK_BYTES
from usllm_kernels.dispatch import installed
from usllm_kernels.planes import SIGNS, Planes

if not installed("numba"):
    pytest.skip("numba is not installed", allow_module_level=True)

LAYER = case("mixed-widths")
INPUTS, OUTPUTS = LAYER.plan.shape[1], LAYER.plan.shape[0]
BLOCKS = torch.randint(0, 16, (77, BLOCK_BYTES[8]), dtype=torch.uint8)


def planes() -> Planes:
    numbers = torch.randint(0, 2, (200, INPUTS), generator=torch.Generator().manual_seed(0)) * 2 - 1
    return make_planes([Codes(numbers, SIGNS, torch.arange(INPUTS), torch.rand(INPUTS))], INPUTS, backend="numba")


PLANES = planes()
PRODUCTS: dict[str, Callable[[Tensor], Tensor]] = {
    "states": lambda x: sketch_linear(x, LAYER.states, LAYER.plan, backend="numba"),
    "packed": lambda x: sketch_linear(x, LAYER.packed, LAYER.plan, backend="numba"),
    "planes": lambda x: plane_linear(x, PLANES, backend="numba"),
    "blocks": lambda x: block_linear(torch.nn.functional.pad(x, (0, BLOCK - INPUTS)), BLOCKS, 8, backend="numba"),
}
WATCHERS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]] = {
    "make_fx": lambda product, x: make_fx(product)(x)(x),
    "jit.trace": lambda product, x: torch.jit.trace(product, x, check_trace=False)(x),  # type: ignore[no-any-return]
    "functionalize": lambda product, x: torch.func.functionalize(product)(x),
}


@pytest.mark.parametrize("tokens", [2, 40])
@pytest.mark.parametrize("watcher", WATCHERS)
@pytest.mark.parametrize("name", PRODUCTS)
def test_who_watches_sees_the_product(name: str, watcher: str, tokens: int) -> None:
    x = torch.randn(tokens, INPUTS).bfloat16()
    assert torch.equal(WATCHERS[watcher](PRODUCTS[name], x), PRODUCTS[name](x))


@pytest.mark.parametrize("tokens", [2, 40])
@pytest.mark.parametrize("name", PRODUCTS)
def test_forward_mode_derivatives_are_refused(name: str, tokens: int) -> None:
    x = torch.randn(tokens, INPUTS)
    with forward_ad.dual_level():
        assert torch.equal(PRODUCTS[name](x), PRODUCTS[name](x.clone()))  # where somebody differentiates something else
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            PRODUCTS[name](forward_ad.make_dual(x, torch.ones_like(x)))
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(PRODUCTS[name], (x,), (torch.ones_like(x),))


@pytest.mark.parametrize("tokens", [2, 40])
@pytest.mark.parametrize("name", PRODUCTS)
def test_signs_that_torch_changes_later(name: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, padded = torch.randn(tokens, INPUTS).bfloat16(), torch.nn.functional.pad
    expected = PRODUCTS[name](x)
    monkeypatch.setattr(torch.nn.functional, "pad", lambda *a: torch._neg_view(-padded(*a)))
    assert torch.equal(PRODUCTS[name](torch._neg_view(-x)), expected)


@pytest.mark.parametrize("tokens", [2, 40])
@pytest.mark.parametrize("name", PRODUCTS)
def test_zeros_that_lie_nowhere(name: str, tokens: int) -> None:
    x = torch.zeros(tokens, INPUTS)
    assert torch.equal(PRODUCTS[name](torch._efficientzerotensor(x.shape)), PRODUCTS[name](x))


@pytest.mark.parametrize("tokens", [2, 40])
def test_output_scales_that_a_plan_has_not_are_not_read(tokens: int) -> None:
    layer, x = case("plain"), torch.randn(tokens, 13)
    expected = sketch_linear(x, layer.states, layer.plan, backend="numba")
    stray = {
        "output_scales": torch.full((1,), 9, dtype=torch.uint8),
        "output_scale_base": torch.zeros(1, dtype=torch.uint8),
    }
    assert torch.equal(sketch_linear(x, {**layer.states, **stray}, layer.plan, backend="numba"), expected)


@pytest.mark.parametrize("computed", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_planes_under_autocast(given: torch.dtype, computed: torch.dtype) -> None:
    x = torch.randn(40, INPUTS).to(given)
    with torch.autocast("cpu", computed):
        found = plane_linear(x, PLANES, backend="numba")
    torch.testing.assert_close(found, plane_linear(x, PLANES, backend="torch"), rtol=0.02, atol=0.02)


def _meta(states: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to("meta") for name, tensor in states.items()}


def _changed(states: dict[str, Tensor], name: str, kind: torch.dtype) -> dict[str, Tensor]:
    return {**states, name: states[name].to(kind)}


@pytest.mark.parametrize("tokens", [2, 40])
@pytest.mark.parametrize(
    ("states", "message"),
    [
        (_meta(LAYER.states), "on meta, the input on cpu"),
        ({**LAYER.states, "scales": LAYER.states["scales"].to("meta")}, "scales are torch.uint8 on meta"),
        (_changed(LAYER.states, "codes", torch.int16), "codes are torch.int16"),
        (_changed(LAYER.states, "scales", torch.int32), "scales are torch.int32"),
        (_changed(LAYER.packed, "output_scales", torch.int64), "output_scales are torch.int64"),
    ],
)
def test_states_that_would_be_misread(states: dict[str, Tensor], message: str, tokens: int) -> None:
    with pytest.raises(ValueError, match=message):
        sketch_linear(torch.ones(tokens, INPUTS), states, LAYER.plan, backend="numba")


@pytest.mark.parametrize("tokens", [2, 40])
@pytest.mark.parametrize(
    "changed",
    [
        lambda p: {"words": p.words.to("meta")},
        lambda p: {"scales": p.scales.double()},
        lambda p: {"words": torch.stack([p.words, p.words], -1)[..., 0]},
        lambda p: {"offsets": p.offsets[:1]},
        lambda p: {"factors": p.factors[:, :64]},
        lambda p: {"words": p.words[:, :0]},
    ],
)
def test_planes_that_would_be_misread(changed: Callable[[Planes], dict[str, Any]], tokens: int) -> None:
    wrong = dataclasses.replace(PLANES, **changed(PLANES))
    with pytest.raises(ValueError, match="have a tensor"):
        plane_linear(torch.ones(tokens, INPUTS), wrong, backend="numba")


@pytest.mark.parametrize("tokens", [2, 40])
def test_blocks_elsewhere(tokens: int) -> None:
    with pytest.raises(ValueError, match="the weight is on meta, the input on cpu"):
        block_linear(torch.ones(tokens, BLOCK).bfloat16(), BLOCKS.to("meta"), 8, backend="numba")


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_copies_of_planes_lie_elsewhere(copied: Callable[[Planes], Planes]) -> None:
    first, x = planes(), torch.randn(1, INPUTS)
    expected = plane_linear(x, first, backend="numba")
    other = copied(first)
    other.words.bitwise_not_()
    assert torch.equal(plane_linear(x, other, backend="numba"), -expected)
    assert torch.equal(plane_linear(x, first, backend="numba"), expected)


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_infinite_inputs_stay_what_they_are(dtype: torch.dtype, tokens: int) -> None:
    x = torch.randn(tokens, INPUTS).to(dtype)
    x[0, 3] = torch.inf
    found, expected = (plane_linear(x, PLANES, backend=name) for name in ("numba", "torch"))
    assert bool(expected[0].isinf().all())
    assert torch.equal(found[0], expected[0])


@pytest.mark.parametrize("tokens", [1, 40])
def test_scales_beyond_fp16_stay_what_they_are(tokens: int) -> None:
    packed = BLOCKS.clone()
    packed[:, 2:] = 1
    packed[0, :2], packed[1, :2] = torch.tensor([0, 0x7C]), torch.tensor([1, 0x7C])  # infinite, and no number
    found = block_linear(torch.ones(tokens, BLOCK).bfloat16(), packed, 8, backend="numba")
    assert bool(found[:, 0].isinf().all()) and bool(found[:, 1].isnan().all()) and bool(found[:, 2:].isfinite().all())
