"""What methods make of gradients between the backward pass and the optimizer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from usllm.compress import compress_, compressed_layers
from usllm.compress.gradients import spread_gradients_
from usllm.compress.parameters import parameter_kinds
from usllm.littlebit import LittleBitConfig
from usllm.sketch import SketchConfig
from usllm.sketch.state_gradient import state_gradient_


class Model(nn.Module):
    """Two layers that are compressed, and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up_proj, self.down_proj = nn.Linear(48, 64), nn.Linear(64, 48, bias=False)
        self.o_proj = nn.Linear(48, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o_proj(self.down_proj(torch.relu(self.up_proj(x))))


def after_backward(straight_through: str, passes: int = 1) -> Model:
    model = Model()
    compress_(model, SketchConfig(bits_per_weight=2.0, operator="mean", rows=1, straight_through=straight_through))
    for number in range(passes):
        x = torch.randn(5, 48, generator=torch.Generator().manual_seed(number))
        model(x).square().sum().backward()
    return model


def test_states_share_the_gradients_of_their_members() -> None:
    plain, shared = after_backward("latent"), after_backward("state")
    spread_gradients_(plain)
    spread_gradients_(shared)
    for name, layer in compressed_layers(plain).items():
        other = compressed_layers(shared)[name]
        assert layer.weight.grad is not None and other.weight.grad is not None and other.plan is not None
        expected = state_gradient_(layer.weight.grad.clone(), other.plan, other.states)  # type: ignore[arg-type]
        torch.testing.assert_close(other.weight.grad, expected)
        assert not torch.equal(layer.weight.grad, other.weight.grad)
    assert torch.equal(plain.o_proj.weight.grad, shared.o_proj.weight.grad)


def test_once_for_several_micro_batches_is_the_sum_of_each() -> None:
    together = after_backward("state", passes=2)
    spread_gradients_(together)
    parts = []
    for number in range(2):
        model = after_backward("state", passes=0)
        model(torch.randn(5, 48, generator=torch.Generator().manual_seed(number))).square().sum().backward()
        spread_gradients_(model)
        parts.append(model.up_proj.weight.grad)
    torch.testing.assert_close(together.up_proj.weight.grad, parts[0] + parts[1])


def test_a_method_without_states_to_share_has_no_such_option() -> None:
    with pytest.raises(TypeError, match="straight_through"):
        LittleBitConfig(straight_through="state")  # type: ignore[call-arg]


def test_parameters_have_kinds_and_come_in_the_order_of_the_model() -> None:
    model = Model()
    compress_(model, LittleBitConfig(bits_per_weight=2.0))
    found = parameter_kinds(model)
    assert [id(parameter) for _, parameter in found] == [id(parameter) for parameter in model.parameters()]
    kinds = {name: kind for (kind, _), (name, _) in zip(found, model.named_parameters(), strict=True)}
    assert {kinds[f"up_proj.{key}_0"] for key in "uv"} == {"latents"}
    assert {kinds[f"up_proj.{key}_0"] for key in "hlg"} == {"scales"}
    assert kinds["up_proj.bias"] == kinds["o_proj.weight"] == "rest"
