"""Plans as operators take them."""

from __future__ import annotations

import torch
from cases import case, every_case

from usllm.sketch import query
from usllm_kernels import plans
from usllm_kernels.plans import flatten, list_states, name_states, unflatten


@every_case
def test_a_plan_is_rebuilt_from_its_numbers_where_it_is_unknown(name: str, monkeypatch: object) -> None:
    layer = case(name)
    flat = flatten(layer.plan)
    assert unflatten(*flat) is layer.plan
    known = plans._known
    try:
        plans._known = type(known)()
        rebuilt = unflatten(*flat)
    finally:
        plans._known = known
    assert rebuilt is not layer.plan
    assert rebuilt.key == layer.plan.key
    assert torch.equal(query(layer.states, rebuilt), query(layer.states, layer.plan))


@every_case
def test_states_survive_the_list(name: str) -> None:
    states = case(name).states
    again = name_states(list_states(states))
    assert set(again) == set(states)
    assert all(again[key] is states[key] for key in states)


@every_case
def test_fake_states_have_the_shapes_of_the_real_ones(name: str) -> None:
    layer = case(name)
    fakes = plans.fake_states(flatten(layer.plan).numbers, torch.device("cpu"))
    for fake, real in zip(fakes, list_states(layer.states), strict=True):
        assert (fake.shape, fake.dtype) == (real.shape, real.dtype)
