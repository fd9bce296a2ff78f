"""Products with the decoded weight: values, gradients, what is kept for them, and how torch takes the custom ops."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from cases import Case, assert_product, case, products_of, slow_interpreted, slow_when_interpreted
from torch import Tensor
from torch.nn import functional

from usllm import sketch
from usllm.sketch import SketchConfig, build_plan
from usllm_kernels import project, project_query, query, sketch_linear
from usllm_kernels.dispatch import interpreted


def random(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(device, dtype)


@pytest.mark.usefixtures("poisoned")
@products_of
@pytest.mark.parametrize("tokens", [1, 5, 20, 130])
def test_product_from_states_and_from_their_packed_form(
    name: str, tokens: int, backend: str, device: torch.device
) -> None:
    layer = case(name, device)
    for dtype in (torch.float32, torch.bfloat16):
        decoded = sketch.query(layer.states, layer.plan).to(dtype)
        x = random(tokens, layer.plan.shape[1], device=device, dtype=dtype)
        for states in (layer.states, layer.packed):
            assert_product(sketch_linear(x, states, layer.plan, backend=backend), x, decoded.t())


@pytest.mark.usefixtures("poisoned")
@products_of
@pytest.mark.parametrize("tokens", [3, 130])
def test_gradients_are_those_of_the_dense_product(name: str, tokens: int, backend: str, device: torch.device) -> None:
    layer = case(name, device)
    x = random(tokens, layer.plan.shape[1], device=device).requires_grad_()
    weight, bias = layer.weight.clone().requires_grad_(), random(layer.plan.shape[0], device=device).requires_grad_()
    y = sketch_linear(x, layer.states, layer.plan, bias, weight=weight, backend=backend)
    gradient = random(tokens, layer.plan.shape[0], device=device)
    y.backward(gradient)
    assert x.grad is not None and weight.grad is not None and bias.grad is not None
    assert_product(x.grad, gradient, sketch.query(layer.states, layer.plan))
    assert_product(weight.grad, gradient.t(), x.detach())
    torch.testing.assert_close(bias.grad, gradient.sum(0))


def test_shapes_of_the_input(backend: str, device: torch.device) -> None:
    layer = case("plain", device)
    decoded = sketch.query(layer.states, layer.plan)
    wide = random(4, 6, 2 * layer.plan.shape[1], device=device)
    for x in (
        wide[..., ::2],
        wide[:, :, : layer.plan.shape[1]].transpose(0, 1),
        wide[0, 0, ::2],
        wide[:0, :, ::2],
        wide[:, :0, ::2],
    ):
        y = sketch_linear(x, layer.states, layer.plan, backend=backend)
        torch.testing.assert_close(y, functional.linear(x, decoded), rtol=1e-4, atol=1e-4)
        x = x.clone().requires_grad_()
        sketch_linear(x, layer.states, layer.plan, backend=backend).sum().backward()
        assert x.grad is not None and x.grad.shape == x.shape
    with pytest.raises(ValueError, match="12 channels, the plan 13"):
        sketch_linear(wide[..., :12], layer.states, layer.plan, backend=backend)


@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("name", [*slow_interpreted("plain"), "mixed-widths", *slow_interpreted("16-bit")])
def test_weights_are_multiplied_as_rounded_to_the_inputs_dtype(
    name: str, tokens: int, backend: str, device: torch.device
) -> None:
    layer = case(name, device)
    decoded = sketch.query(layer.states, layer.plan).bfloat16()
    for channel in range(layer.plan.shape[1]):
        x = torch.zeros(tokens, layer.plan.shape[1], device=device, dtype=torch.bfloat16)
        x[-1, channel] = 1.0
        assert torch.equal(sketch_linear(x, layer.packed, layer.plan, backend=backend)[-1], decoded[:, channel])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [1, 20, 130])
def test_other_types_of_input(tokens: int, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    layer = case("plain", device)
    x = random(tokens, layer.plan.shape[1], device=device, dtype=dtype)
    y = sketch_linear(x, layer.packed, layer.plan, backend=backend)
    assert y.dtype == dtype
    expected = x.double() @ sketch.query(layer.states, layer.plan).double().t()
    torch.testing.assert_close(y.double(), expected, rtol=1e-2, atol=2e-2)


def test_gradients_after_the_plan_was_first_used_without_any(backend: str, device: torch.device) -> None:
    layer = case("plain", device)
    shape, importance = layer.plan.shape, layer.moment.cpu()
    with torch.inference_mode():
        plan = build_plan(shape, importance, SketchConfig(bits_per_weight=3.0), "used in inference mode")
        states = project(layer.weight, plan, backend=backend)
        query(states, plan, backend=backend)
    x = random(3, shape[1], device=device).requires_grad_()
    sketch_linear(x, {key: value.clone() for key, value in states.items()}, plan, backend=backend).sum().backward()
    assert x.grad is not None and x.grad.any()


@pytest.mark.parametrize("name", ["plain", "mixed-widths"])
def test_states_of_another_size_are_refused(name: str, backend: str, device: torch.device) -> None:
    layer = case(name, device)
    x = random(3, layer.plan.shape[1], device=device)
    for states, key in ((layer.states, "codes"), (layer.packed, "codes"), (layer.states, "scales")):
        for wrong in (states[key][:-1], states[key].repeat_interleave(2)[::2]):
            with pytest.raises(ValueError, match=f"{name}: {key} are .* in one piece"):
                sketch_linear(x, {**states, key: wrong}, layer.plan, backend=backend)
            with pytest.raises(ValueError, match=f"{name}: {key} are .* in one piece"):
                query({**states, key: wrong}, layer.plan, backend=backend)


def test_no_decoded_weight_is_kept_for_the_backward_pass(backend: str, device: torch.device) -> None:
    layer = case("mixed-widths", device)
    x = random(3, layer.plan.shape[1], device=device).requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda value: kept.append(value) or value, lambda value: value):
        sketch_linear(x, layer.packed, layer.plan, weight=layer.weight.clone().requires_grad_(), backend=backend)
    assert kept
    assert max(value.numel() * value.element_size() for value in kept) < layer.weight.numel()


def test_states_that_changed_before_the_backward_pass_are_noticed(backend: str, device: torch.device) -> None:
    layer = case("plain", device)
    x = random(3, layer.plan.shape[1], device=device).requires_grad_()
    y = sketch_linear(x, layer.states, layer.plan, backend=backend)
    layer.states["codes"].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_autocast_computes_in_its_dtype_and_returns_gradients_in_the_latents(
    backend: str, device: torch.device
) -> None:
    layer = case("plain", device)
    x = random(5, layer.plan.shape[1], device=device).requires_grad_()
    weight, bias = layer.weight.clone().requires_grad_(), torch.ones(layer.plan.shape[0], device=device)
    with torch.autocast(device.type, torch.bfloat16):
        y = sketch_linear(x, layer.states, layer.plan, bias, weight=weight, backend=backend)
    decoded = sketch.query(layer.states, layer.plan).bfloat16()
    assert_product(y.detach() - bias.bfloat16(), x.detach().bfloat16(), decoded.t())
    gradient = random(5, layer.plan.shape[0], device=device, dtype=torch.bfloat16)
    y.backward(gradient)
    assert x.grad is not None and x.grad.dtype == torch.float32
    assert_product(x.grad.bfloat16(), gradient, decoded)
    assert weight.grad is not None and weight.grad.dtype == torch.float32
    assert_product(weight.grad.bfloat16(), gradient.t(), x.detach().bfloat16())


@pytest.mark.parametrize("name", ["one-channel"] if interpreted() else ["one-channel", "mixed-widths"])
def test_custom_ops_pass_opcheck(name: str, backend: str, device: torch.device) -> None:
    from usllm_kernels.plans import flatten, list_states

    layer = case(name, device)
    plan, states = flatten(layer.plan), list_states(layer.states)
    x, ops = random(3, layer.plan.shape[1], device=device), torch.ops.usllm
    for op, arguments in (
        (ops.project, (layer.weight, layer.moment, None, *plan, True, backend)),
        (ops.project_query, (layer.weight, None, None, *plan, torch.float32, False, True, backend)),
        (ops.query, (states, *plan, torch.bfloat16, backend)),
        (ops.sketch_linear, (x, states, *plan, backend)),
        (ops.sketch_linear_input_gradient, (random(3, plan.numbers[0], device=device), states, *plan, backend)),
    ):
        torch.library.opcheck(op.default, arguments)


@slow_when_interpreted
def test_compile_takes_them_whole_with_a_plan_never_used_before(backend: str, device: torch.device) -> None:
    layer = case("one-channel", device)
    plans = [layer.plan]

    def step(x: Tensor, weight: Tensor) -> Tensor:
        (plan,) = plans
        states, decoded = project_query(weight, plan, backend=backend)
        again = project(weight, plan, backend=backend)
        y = sketch_linear(x, states, plan, weight=weight, backend=backend)
        return (y.square().sum() + (decoded - query(again, plan, backend=backend)).abs().sum()).sqrt()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    plans[0] = build_plan(layer.plan.shape, None, SketchConfig(bits_per_weight=9.0), "new to every cache")
    _assert_equal_steps(compiled, step, layer, device)
    plans[0] = layer.plan
    _assert_equal_steps(compiled, step, layer, device)  # the other plan's numbers would not fit


def _assert_equal_steps(
    compiled: Callable[..., Tensor], step: Callable[..., Tensor], layer: Case, device: torch.device
) -> None:
    results = []
    for function in (compiled, step):
        x = random(3, layer.plan.shape[1], device=device).requires_grad_()
        weight = layer.weight.clone().requires_grad_()
        value = function(x, weight)
        value.backward()
        results.append((value, x.grad, weight.grad))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_a_copied_plan_computes_the_same(backend: str, device: torch.device) -> None:
    layer = case("mixed-widths", device)
    decoded = query(layer.states, layer.plan, backend=backend)
    assert torch.equal(query(layer.states, copy.deepcopy(layer.plan), backend=backend), decoded)
