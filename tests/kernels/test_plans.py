"""Plans as custom ops take them."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from cases import case, every_case

from usllm.sketch import Plan, SketchConfig, build_plan, query
from usllm_kernels import plans
from usllm_kernels.plans import flatten, list_states, name_states, unflatten
from usllm_kernels.tables import tables


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
    assert (rebuilt.name, rebuilt.config, rebuilt.key) == (layer.plan.name, layer.plan.config, layer.plan.key)
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


def test_copies_of_a_plan_stand_for_one_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "_rebuilt", type(plans._rebuilt)())
    plan = case("plain").plan
    flatten(plan)
    copied = copy.deepcopy(plan)
    del plan
    gc.collect()
    assert unflatten(*flatten(copied)) is copied
    assert not plans._rebuilt


def test_rebuilt_plans_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "_rebuilt", type(plans._rebuilt)())
    monkeypatch.setattr(plans, "_known", type(plans._known)())
    monkeypatch.setattr(plans, "_MOST_REBUILT", 2)
    flats = [plans._flatten(case(name).plan) for name in ("plain", "one-row", "mean")]
    first = unflatten(*flats[0])
    unflatten(*flats[1])
    assert unflatten(*flats[0]) is first
    unflatten(*flats[2])  # the one used longest ago gives way
    assert unflatten(*flats[0]) is first
    assert len(plans._rebuilt) == 2


def test_the_numbers_have_names() -> None:
    plan = case("mixed-widths").plan
    numbers = plans.PlanNumbers(*flatten(plan).numbers)
    assert (numbers.out_features, numbers.in_features) == plan.shape
    assert (numbers.num_states, numbers.num_active) == (plan.num_states, plan.num_active)
    assert (numbers.code_bits, numbers.output_scale) == (8, 1)
    assert plans.PlanNumbers(*flatten(case("16-bit").plan).numbers).code_bits == 16


def test_what_is_cached_for_a_plan_goes_with_it() -> None:
    layer = case("mixed-widths")
    plan = copy.deepcopy(layer.plan)
    before = set(plan.__dict__)
    flatten(plan)
    tables(plan, torch.device("cpu"))
    assert tables(plan, torch.device("cpu")) is tables(plan, torch.device("cpu"))
    own = {key for key in plan.__dict__ if key in vars(Plan)}  # the plan's own cached properties
    assert set(plan.__dict__) <= before | own
    alive = [weakref.ref(plan), weakref.ref(flatten(plan).tensors[0])]
    del plan
    gc.collect()
    assert [reference() for reference in alive] == [None, None]


def test_a_copy_of_a_plan_is_flattened_for_itself() -> None:
    layer = case("plain")
    flat = flatten(layer.plan)
    for copied in (copy.deepcopy(layer.plan), pickle.loads(pickle.dumps(layer.plan))):
        again = flatten(copied)
        assert again is not flat and again.numbers == flat.numbers


def test_a_call_computes_with_its_own_plan_beside_another_of_equal_content() -> None:
    config = SketchConfig(bits_per_weight=3.0, group_size=16)
    first, second = (build_plan((40, 24), None, config, "layer") for _ in range(2))
    assert first is not second and flatten(first).numbers == flatten(second).numbers
    for own in (first, second, first):
        assert unflatten(*flatten(own)) is own  # whose tables live as long as it does
