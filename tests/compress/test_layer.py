"""One sketched layer: computes with its states, learns through them, and is never stale."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from usllm.compress import CompressedLinear, compressed_layers
from usllm.compress.methods import sketch as sketch_method
from usllm.compress.methods.sketch import computing
from usllm.sketch import SketchConfig, build_plan, project, query

IN, OUT = 24, 40
CONFIG = SketchConfig(bits_per_weight=3.0, rows=2, group_size=16)
AUTOCAST = {"fp32": nullcontext, "bf16": lambda: torch.autocast("cpu", torch.bfloat16)}


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dense(bias: bool = True) -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Linear(IN, OUT, bias=bias)


def sketched(config: SketchConfig = CONFIG, bias: bool = True) -> CompressedLinear:
    """A layer that is planned by uneven importance and projected."""
    layer = CompressedLinear(dense(bias), "layer")
    importance = random(IN, seed=2).square() + 0.1
    layer.set_plan(computing(build_plan((OUT, IN), importance, config, "layer")), importance)
    layer.reproject()
    return layer


@pytest.fixture
def queries(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """One entry for every query of states while the test runs."""
    calls: list[Any] = []

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(args)
        return query(*args, **kwargs)

    monkeypatch.setattr(sketch_method, "query", counted)
    return calls


def forward(layer: nn.Module, x: Tensor, precision: str = "fp32") -> Tensor:
    with AUTOCAST[precision]():
        result: Tensor = layer(x)
    return result


def test_layer_without_a_plan_is_the_dense_layer() -> None:
    linear, x = dense(), random(3, IN)
    assert torch.equal(CompressedLinear(linear, "layer")(x), linear(x))


def test_forward_uses_the_decoded_weight_and_the_bias() -> None:
    layer, x = sketched(), random(2, 3, IN)
    assert layer.plan is not None
    expected = functional.linear(x, query(project(layer.weight, layer.plan, layer.importance), layer.plan), layer.bias)
    assert torch.equal(layer(x), expected)
    assert not torch.equal(layer.decoded_weight(), layer.weight)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("precision", AUTOCAST)
def test_gradients_are_those_of_the_dense_layer_at_the_decoded_weight(precision: str, bias: bool) -> None:
    layer, reference = sketched(bias=bias), dense(bias)
    with torch.no_grad():
        reference.weight.copy_(layer.decoded_weight())
    out = random(2, 3, OUT, seed=5)
    inputs = [random(2, 3, IN, seed=4).requires_grad_() for _ in range(2)]
    for module, x in zip((layer, reference), inputs, strict=True):
        result = forward(module, x, precision)
        result.backward(out.to(result.dtype))
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32
    pairs = [(layer.weight.grad, reference.weight.grad), (inputs[0].grad, inputs[1].grad)]
    if bias:
        pairs.append((layer.bias.grad, reference.bias.grad))
    for ours, theirs in pairs:
        assert theirs is not None
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("precision", AUTOCAST)
def test_nothing_of_the_sketch_is_in_the_graph(precision: str) -> None:
    layer = sketched()
    # All nodes between the output and the leaves.
    stack, nodes = [forward(layer, random(3, IN), precision).grad_fn], []
    while stack:
        node = stack.pop()
        if node is not None:
            nodes.append(node)
            stack += [parent for parent, _ in node.next_functions]
    (estimator,) = (node for node in nodes if node.name() == "StraightThroughBackward")
    (latent, decoded) = (parent for parent, _ in estimator.next_functions)
    assert latent is not None
    assert latent.variable is layer.weight  # type: ignore[attr-defined]
    assert decoded is None
    leaves = {id(node.variable) for node in nodes if node.name().endswith("AccumulateGrad")}  # type: ignore[attr-defined]
    assert leaves == {id(layer.weight), id(layer.bias)}
    assert not any(state.requires_grad for state in layer.states.values())


@pytest.mark.parametrize("precision", AUTOCAST)
def test_weight_is_not_decoded_again_between_projections(precision: str, queries: list[Any]) -> None:
    layer = sketched()
    after_projection = len(queries)
    for step in range(4):
        forward(layer, random(3, IN, seed=step), precision).sum().backward()
    assert len(queries) == after_projection
    layer.reproject()
    forward(layer, random(3, IN), precision)
    assert len(queries) == after_projection  # projecting has decoded it too


def test_forward_weight_stays_while_the_latent_weight_moves() -> None:
    layer, x = sketched(), random(3, IN)
    before = layer(x)
    with torch.no_grad():
        layer.weight.mul_(-2)
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("precision", AUTOCAST)
def test_projection_is_seen_by_the_next_forward(precision: str) -> None:
    layer, x = sketched(), random(3, IN)
    forward(layer, x, precision)
    with torch.no_grad():
        layer.weight.mul_(-2)
    layer.reproject()
    assert layer.plan is not None
    reference = dense()
    with torch.no_grad():
        reference.weight.copy_(query(project(layer.weight, layer.plan, layer.importance), layer.plan))
    assert torch.equal(forward(layer, x, precision), forward(reference, x, precision))


@pytest.mark.parametrize("precision", AUTOCAST)
def test_loaded_states_are_seen_by_the_next_forward(precision: str) -> None:
    layer, x = sketched(), random(3, IN)
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.weight.mul_(-2)
    other.reproject()
    forward(layer, x, precision)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(forward(layer, x, precision), forward(other, x, precision))


@pytest.mark.parametrize("precision", AUTOCAST)
def test_new_plan_is_seen_by_the_next_forward_before_and_after_its_projection(precision: str) -> None:
    layer, x = sketched(bias=False), random(3, IN)
    forward(layer, x, precision)
    plan = computing(build_plan((OUT, IN), None, SketchConfig(bits_per_weight=2.0, rows=1, group_size=8), "layer"))
    layer.set_plan(plan)
    assert not forward(layer, x, precision).any()  # no states yet: a weight of zeros
    layer.reproject()
    decoded = query(project(layer.weight, plan, layer.importance), plan)
    assert torch.equal(layer.decoded_weight(), decoded)
    assert torch.equal(forward(layer, x, precision), forward(functional_linear(decoded), x, precision))


def functional_linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    with torch.no_grad():
        linear.weight.copy_(weight)
    return linear


def test_fp32_forward_after_a_bf16_one_is_exact() -> None:
    # Code times scale fits into the eight bits of bf16; the output scale makes it longer.
    layer, x = sketched(replace(CONFIG, output_scale=True)), random(3, IN)
    assert not torch.equal(layer.decoded_weight().bfloat16(), layer.decoded_weight())
    exact = functional.linear(x, layer.decoded_weight(), layer.bias)
    forward(layer, x, "bf16")
    assert torch.equal(layer(x), exact)
    assert forward(layer, x, "bf16").dtype == torch.bfloat16


@pytest.mark.parametrize("precision", AUTOCAST)
def test_layer_trains_after_a_forward_or_a_projection_in_inference_mode(precision: str) -> None:
    layer, x = sketched(), random(3, IN).requires_grad_()  # its gradient needs the weight that was kept
    with torch.inference_mode():
        forward(layer, x, precision)
    forward(layer, x, precision).sum().backward()
    with torch.inference_mode():
        layer.reproject()
    forward(layer, x, precision).sum().backward()
    assert layer.weight.grad is not None


@pytest.mark.parametrize("precision", AUTOCAST)
def test_gradient_checkpointing_changes_nothing(precision: str, queries: list[Any]) -> None:
    results = []
    for recompute in (False, True):
        layer, x = sketched(), random(3, IN).requires_grad_()
        count = len(queries)
        with AUTOCAST[precision]():
            out = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
        out.float().square().sum().backward()
        assert len(queries) == count
        results.append((out, x.grad, layer.weight.grad, layer.bias.grad))
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize("operator", ["absmaxmin", "mean"])
def test_reprojection_reports_the_share_that_changed_and_the_weighted_error(operator: str) -> None:
    layer = sketched(replace(CONFIG, operator=operator))
    codes = layer.states["codes"].clone()
    with torch.no_grad():  # half of the channels: other weights lead their buckets
        layer.weight[:, : IN // 2] = layer.weight[:, : IN // 2].roll(1, 0)
    change, error = layer.reproject()
    assert 0 < float(change) < 1
    if operator == "mean":  # no weight of a bucket is its winner: codes are compared
        assert float(change) == pytest.approx(float((layer.states["codes"] != codes).float().mean()))
    latent, importance = layer.weight.detach().double(), layer.importance.double()
    difference = ((layer.decoded_weight().double() - latent).square() * importance).sum()
    assert float(error) == pytest.approx(float(difference / (latent.square() * importance).sum()), rel=1e-5)
    assert float(layer.reproject().winner_change) == 0


def test_first_projection_changes_nothing_but_the_first_after_loading_may() -> None:
    layer = sketched(replace(CONFIG, operator="mean"))
    fresh = CompressedLinear(dense(), "layer")
    assert layer.plan is not None
    fresh.set_plan(layer.plan)
    assert float(fresh.reproject().winner_change) == 0
    resumed = CompressedLinear(dense(), "layer")
    resumed.set_plan(layer.plan)
    resumed.load_state_dict(layer.state_dict())
    with torch.no_grad():
        resumed.weight.neg_()
    assert float(resumed.reproject().winner_change) > 0


def test_states_and_importance_are_in_the_state_dict_and_the_decoded_weight_is_not() -> None:
    layer = sketched(replace(CONFIG, output_scale=True))
    layer(random(3, IN))
    states = {f"state_{name}" for name in ("codes", "scales", "scale_base", "output_scales", "output_scale_base")}
    assert set(layer.state_dict()) == {"weight", "bias", "importance"} | states


def test_new_plan_leaves_no_state_of_the_old_one_behind() -> None:
    layer = sketched(replace(CONFIG, output_scale=True))
    layer.set_plan(computing(build_plan((OUT, IN), None, CONFIG, "layer")))
    assert set(layer.states) == {"codes", "scales", "scale_base"}
    assert not any("output_scale" in name for name in layer.state_dict())


def test_latent_weight_of_a_bf16_layer_is_fp32_and_frozen_ones_stay_frozen() -> None:
    linear = dense().bfloat16()
    linear.weight.requires_grad_(False)
    layer = CompressedLinear(linear, "layer")
    assert layer.weight.dtype == torch.float32
    assert not layer.weight.requires_grad


def test_plan_for_another_shape_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"layer: the plan is for \(40, 25\), the weight is \(40, 24\)"):
        sketched().set_plan(computing(build_plan((OUT, IN + 1), None, CONFIG, "layer")))


def test_projection_without_a_plan_is_refused_by_name() -> None:
    with pytest.raises(RuntimeError, match="layer has no plan"):
        CompressedLinear(dense(), "layer").reproject()


def test_layers_are_listed_by_stable_name_in_module_order() -> None:
    model = nn.Sequential(CompressedLinear(dense(), "b"), nn.Identity(), CompressedLinear(dense(), "a"))
    assert list(compressed_layers(model)) == ["b", "a"]
