"""The states' gradient of every back end against autograd through an explicit gather of states."""

from __future__ import annotations

import pytest
import torch
from cases import FIELDS, case, every_case
from torch import Tensor

from usllm import sketch
from usllm.sketch import Plan, States
from usllm_kernels import state_gradient_

pytestmark = pytest.mark.usefixtures("poisoned")


def state_of(plan: Plan) -> Tensor:
    """Number of the state that each weight reads in each row, int64 [rows, out, in]; -1 where there is none."""
    rows = max((block.choice.rows for block in plan.blocks), default=1)
    index = torch.full((rows, *plan.shape), -1)
    for block in plan.blocks:
        before = 0
        for span in plan.spans:
            placement = plan.placement(block.choice, span.size)
            held, states = placement.load.shape
            for group in range(span.groups):
                outputs = slice(span.start + group * span.size, span.start + (group + 1) * span.size)
                for number, channel in enumerate(block.channels.tolist()):
                    turn = plan.rotation(span) + plan.rotation_step * (group * plan.shape[1] + channel)
                    place = (torch.arange(span.size) - turn) % span.size
                    first = block.first_state + number * block.states_per_channel + before + group * held * states
                    for row in range(held):
                        index[row, outputs, channel] = first + row * states + placement.buckets.long()[row, place]
            before += span.groups * held * states
    return index


def explicit(gradient: Tensor, plan: Plan, states: States) -> Tensor:
    """Sums of the decoded weights' gradients at each state, over its members, by autograd; handed to all members."""
    index, codes = state_of(plan), states["codes"].cpu().double().requires_grad_()
    held = index >= 0
    candidates = torch.where(held, codes[index.clamp_min(0)], torch.nan) if len(codes) else torch.zeros(index.shape)
    operator, query = plan.config.operator, plan.config.query
    if operator == "mean":
        decoded = candidates.nansum(0) / held.sum(0).clamp_min(1)
    else:
        value = candidates.detach()
        order = value if query == "signed_max" else value.abs() + (0.25 * (value < 0) if operator == "absmaxmin" else 0)
        order = torch.where(held, -order if operator == "countmin" else order, -torch.inf)
        decoded = candidates.gather(0, order.argmax(0, keepdim=True))[0].nan_to_num()
    sums = torch.zeros_like(codes)
    if decoded.requires_grad:
        (sums,) = torch.autograd.grad((decoded * gradient.cpu().double()).sum(), codes)
    members = torch.bincount(index[held], minlength=len(codes)).clamp_min(1)
    means = torch.cat([sums / members, sums.new_zeros(1)])
    return torch.where(held, means[index], 0.0).sum(0).float()


@every_case
def test_every_member_gets_the_mean_of_its_buckets(name: str, backend: str, device: torch.device) -> None:
    layer = case(name, device)
    gradient = torch.randn(layer.plan.shape, generator=torch.Generator().manual_seed(1)).to(device)
    found = state_gradient_(gradient.clone(), layer.plan, layer.states, backend=backend)
    expected = explicit(gradient, layer.plan, layer.states)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["plain", "3-bit"])
def test_packed_states_say_the_same(name: str, backend: str, device: torch.device) -> None:
    layer = case(name, device)
    gradient = torch.randn(layer.plan.shape, device=device)
    found = state_gradient_(gradient.clone(), layer.plan, layer.packed, backend=backend)
    assert torch.equal(found, state_gradient_(gradient.clone(), layer.plan, layer.states, backend=backend))


@pytest.mark.parametrize("name", ["two-group-sizes", "mixed-widths"])
def test_gradients_that_lie_otherwise_in_memory(name: str, backend: str, device: torch.device) -> None:
    layer = case(name, device)
    gradient = torch.randn(layer.plan.shape, device=device)
    expected = state_gradient_(gradient.clone(), layer.plan, layer.states, backend=backend)
    wider = torch.full((layer.plan.shape[0], layer.plan.shape[1] + 3), torch.nan, device=device)
    wider[:, : layer.plan.shape[1]] = gradient
    for other in (gradient.t().contiguous().t(), wider[:, : layer.plan.shape[1]]):
        found = state_gradient_(other, layer.plan, layer.states, backend=backend)
        assert found is other
        torch.testing.assert_close(found, expected)
    assert bool(wider[:, layer.plan.shape[1] :].isnan().all())


def test_twice_is_once_where_there_is_one_row() -> None:
    layer = case("one-row")
    once = state_gradient_(torch.randn(layer.plan.shape), layer.plan, layer.states)
    torch.testing.assert_close(state_gradient_(once.clone(), layer.plan, layer.states), once)


def test_a_gradient_of_another_shape_is_refused() -> None:
    layer = case("plain")
    with pytest.raises(ValueError, match="weight has shape"):
        state_gradient_(torch.zeros(3, 3), layer.plan, layer.states)


def test_reference_is_what_it_says() -> None:
    for name in FIELDS:
        layer = case(name)
        gradient = torch.randn(layer.plan.shape)
        found = sketch.state_gradient.state_gradient_(gradient.clone(), layer.plan, layer.states)
        torch.testing.assert_close(found, explicit(gradient, layer.plan, layer.states), rtol=1e-5, atol=1e-6)
