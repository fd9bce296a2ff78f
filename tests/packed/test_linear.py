"""Gradients of a packed layer: what trains in front of it learns through the layer, in every layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from every_method import cases, compressor_of, planned, random
from torch import Tensor

from usllm.packed.config import PackedLayerEntry
from usllm.packed.linear import LAYOUTS, PackedLinear

layouts = pytest.mark.parametrize("layout", LAYOUTS)


def packed_layer(name: str, options: dict[str, Any], layout: str, bias: bool = False) -> PackedLinear:
    compressor = compressor_of(name, options)
    plan, weight, statistics = planned(compressor, (48, 64))
    packed = plan.pack(plan.encode(plan.start(weight, statistics), statistics.energy).states)
    layer = PackedLinear(PackedLayerEntry((48, 64), packed.numel()), compressor, "layer", bias)
    layer.packed.copy_(packed)
    if bias:
        layer.bias.data.copy_(random(48, seed=9))
    if layout == "expanded" and layer.plan.expanded_bytes() is None:
        pytest.skip("the method has no such layout")
    layer.set_layout(layout)
    return layer


@layouts
@cases
def test_gradients_of_inputs_and_bias_are_those_of_a_dense_layer_with_the_decoded_weight(
    name: str, options: dict[str, Any], layout: str
) -> None:
    layer = packed_layer(name, options, layout, bias=True)
    layer.bias.requires_grad_()
    x = random(3, 5, 64, seed=4).requires_grad_()
    weights = random(3, 5, 48, seed=5)
    (layer(x) * weights).sum().backward()
    torch.testing.assert_close(x.grad, weights @ layer.decoded_weight(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(layer.bias.grad, weights.sum((0, 1)), atol=1e-4, rtol=1e-4)


@layouts
@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_do_not_depend_on_whether_there_is_a_graph_and_can_be_added_to(
    name: str, options: dict[str, Any], layout: str, dtype: torch.dtype
) -> None:
    layer = packed_layer(name, options, layout)
    x = random(3, 5, 64, seed=4).to(dtype)
    y = layer(x.clone().requires_grad_())
    assert torch.equal(y, layer(x))
    y += 1  # as adapters do, some of whom add to rows of it
    y[0] += 1
    y.sum().backward()


@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graph_of_a_compact_layer_holds_no_weight(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    layer, held = packed_layer(name, options, "compact"), []

    def keep(tensor: Tensor) -> Tensor:
        held.append(tensor)
        return tensor

    if not layer.plan.decodes_on:
        pytest.skip("multiplies factors, which are held")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(torch.ones(1, 64, dtype=dtype, requires_grad=True))
    assert all(tensor.numel() < 48 * 64 for tensor in held if tensor.is_floating_point())
    assert layer._decoded is None


def test_weight_can_be_asked_for_its_device_and_for_nothing_else() -> None:
    layer = packed_layer("rounding", {"bits": 1}, "compact")
    assert layer.weight.device == layer.packed.device
    with pytest.raises(AttributeError, match=r"^layer: has no weight\.data, it is packed; adapters stay beside"):
        _ = layer.weight.data
    assert list(layer.state_dict()) == ["packed"]
