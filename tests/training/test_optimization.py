from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from usllm.system.errors import UserError
from usllm.training import OptimizerConfig, build_optimizer, build_schedule


def rates(config: OptimizerConfig, steps: int) -> list[float]:
    optimizer = build_optimizer(nn.ParameterList([nn.Parameter(torch.zeros(2, 2))]), config)
    schedule = build_schedule(optimizer, config, steps)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return [*found, optimizer.param_groups[0]["lr"]]


def test_linear_rises_over_the_warm_up_and_falls_to_zero_at_the_last_step() -> None:
    found = rates(OptimizerConfig(lr=1.0, schedule="linear", warmup_steps=2), 6)
    assert found == pytest.approx([0, 0.5, 1, 0.75, 0.5, 0.25, 0])


def test_cosine_falls_along_half_a_wave() -> None:
    found = rates(OptimizerConfig(lr=2.0, schedule="cosine"), 4)
    assert found == pytest.approx([1 + math.cos(math.pi * step / 4) for step in range(5)])


def test_constant_stays_after_the_warm_up() -> None:
    found = rates(OptimizerConfig(lr=1.0, schedule="constant", warmup_steps=2), 4)
    assert found == pytest.approx([0, 0.5, 1, 1, 1])


def test_only_matrices_are_decayed() -> None:
    matrix, gain = nn.Parameter(torch.zeros(3, 2)), nn.Parameter(torch.zeros(3))
    optimizer = build_optimizer(nn.ParameterList([matrix, gain]), OptimizerConfig(weight_decay=0.1))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay == {id(matrix): 0.1, id(gain): 0.0}


def test_frozen_parameters_are_left_out() -> None:
    frozen, trained = nn.Parameter(torch.zeros(2, 2), requires_grad=False), nn.Parameter(torch.zeros(2, 2))
    optimizer = build_optimizer(nn.ParameterList([frozen, trained]), OptimizerConfig())
    assert [p is trained for group in optimizer.param_groups for p in group["params"]] == [True]


def test_problems_are_all_named_at_once() -> None:
    with pytest.raises(UserError) as caught:
        OptimizerConfig(name="sgd", lr=0, betas=(0.9, 1.0), weight_decay=-1, schedule="step", warmup_steps=-1)
    for key in ("name='sgd'", "lr=0", "betas=[0.9, 1.0]", "weight_decay=-1", "schedule='step'", "warmup_steps=-1"):
        assert f"optimizer.{key}" in str(caught.value)


def test_run_without_an_end_has_no_schedule() -> None:
    config = OptimizerConfig()
    optimizer = build_optimizer(nn.ParameterList([nn.Parameter(torch.zeros(2, 2))]), config)
    with pytest.raises(UserError, match=r"trainer\.max_steps=-1"):
        build_schedule(optimizer, config, -1)
