"""The first weight, state or output that is not finite is named."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from usllm.models.random_model import random_model
from usllm.system.errors import RunError
from usllm.system.finite import first_nonfinite_output, first_nonfinite_tensor, refuse_nonfinite


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_first_weight_is_named(value: float) -> None:
    model = random_model("llama")
    assert first_nonfinite_tensor(model) is None
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight[3, 4] = value
    assert first_nonfinite_tensor(model) == "the weight model.layers.0.mlp.up_proj.weight"
    with pytest.raises(RunError, match=r"that model has .* the weight model\.layers\.0\.mlp\.up_proj") as caught:
        refuse_nonfinite(model, "that model")
    assert caught.value.status == 1


def test_floating_buffer_is_a_state() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("codes", torch.ones(2, dtype=torch.uint8))
    model.register_buffer("scales", torch.tensor([1.0, torch.nan]))
    assert first_nonfinite_tensor(model) == "the state scales"


def test_first_output_is_named_and_no_hook_stays() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.ReLU())
    with torch.no_grad():
        model[1].weight.fill_(1e38)
        model[1].weight[0, 0] = -1e38
    with first_nonfinite_output(model) as found:
        model(torch.full((1, 2), 1e10))
    assert found == ["the output of 1"]
    assert not any(module._forward_hooks for module in model.modules())
