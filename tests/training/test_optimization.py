from __future__ import annotations

import math
import re

import pytest
import torch
from torch import nn

from usllm.compress import compress_, compressed_layers
from usllm.littlebit import LittleBitConfig
from usllm.system.errors import UserError
from usllm.training import OptimizerConfig, build_optimizer, build_schedule
from usllm.training.optimization import GroupConfig


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


def test_a_kind_that_learns_in_a_share_of_the_steps_stays_as_it_is_behind_it() -> None:
    config = OptimizerConfig(lr=0.1, schedule="constant", latents=GroupConfig(until=0.5))
    model = compressed()
    optimizer = build_optimizer(model, config)
    schedule = build_schedule(optimizer, config, 4)
    for step in range(4):
        before = {name: parameter.clone() for name, parameter in model.named_parameters()}
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        schedule.step()
        kinds = {id(p): group["kind"] for group in optimizer.param_groups for p in group["params"]}
        for name, parameter in model.named_parameters():
            moved = not torch.equal(parameter, before[name])
            assert moved == (kinds[id(parameter)] != "latents" or step < 2), name


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


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj, self.norm = nn.Linear(48, 64, bias=False), nn.LayerNorm(48)


def compressed(size: float = 1.0) -> Model:
    torch.manual_seed(0)
    model = Model()
    with torch.no_grad():
        model.up_proj.weight.mul_(size)
    compress_(model, LittleBitConfig(bits_per_weight=2.0))
    return model


def settings_of(model: nn.Module, config: OptimizerConfig) -> dict[str, dict[str, object]]:
    groups = build_optimizer(model, config).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)]: group for group in groups for parameter in group["params"]}


def test_kinds_of_parameters_have_settings_of_their_own() -> None:
    config = OptimizerConfig(
        lr=1e-3,
        weight_decay=0.1,
        latents=GroupConfig(relative_lr=0.1, weight_decay=0.0),
        scales=GroupConfig(lr=1e-2, betas=(0.5, 0.6)),
    )
    found = settings_of(compressed(), config)
    assert found["norm.weight"]["lr"] == 1e-3
    assert (found["up_proj.h_0"]["lr"], found["up_proj.h_0"]["betas"]) == (1e-2, (0.5, 0.6))
    assert found["up_proj.u_0"]["weight_decay"] == 0.0


def test_a_relative_rate_follows_the_size_of_each_tensor() -> None:
    config = OptimizerConfig(latents=GroupConfig(relative_lr=0.1))
    for size in (1.0, 30.0):
        model = compressed(size)
        found = settings_of(model, config)
        for name, latent in compressed_layers(model)["up_proj"].latents.items():
            if name[0] in "uv":
                expected = 0.1 * float(latent.detach().square().mean().sqrt())
                assert found[f"up_proj.{name}"]["lr"] == pytest.approx(expected, rel=1e-5)


def test_a_relative_rate_is_measured_once_and_stored() -> None:
    config, model = OptimizerConfig(latents=GroupConfig(relative_lr=0.1)), compressed()
    first = build_optimizer(model, config)
    schedule = build_schedule(first, config, 10)
    saved, position = first.state_dict(), schedule.state_dict()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(7)
    second = build_optimizer(model, config)
    again = build_schedule(second, config, 10)
    second.load_state_dict(saved)
    again.load_state_dict(position)
    for optimizer, rising in ((first, schedule), (second, again)):
        optimizer.step()
        rising.step()
    assert [group["lr"] for group in second.param_groups] == [group["lr"] for group in first.param_groups]


def test_groups_of_an_optimizer_without_kinds_are_those_of_old_checkpoints() -> None:
    model = compressed()
    decayed, kept = (group["params"] for group in build_optimizer(model, OptimizerConfig()).param_groups)
    assert [id(p) for p in decayed] == [id(p) for p in model.parameters() if p.ndim >= 2]
    assert [id(p) for p in kept] == [id(p) for p in model.parameters() if p.ndim < 2]


def test_schedules_of_kinds_run_side_by_side() -> None:
    config = OptimizerConfig(lr=1.0, schedule="linear", latents=GroupConfig(schedule="constant", warmup_steps=2))
    optimizer = build_optimizer(compressed(), config)
    schedule = build_schedule(optimizer, config, 4)
    for _ in range(3):
        optimizer.step()
        schedule.step()
    found = {group["kind"]: group["lr"] for group in optimizer.param_groups}
    assert found["latents"] == 1.0
    assert found["scales"] == pytest.approx(0.25)  # of equal settings with the rest: the first kind names the group


@pytest.mark.parametrize(
    ("group", "words"),
    [
        (GroupConfig(lr=1.0, relative_lr=1.0), "optimizer.latents.relative_lr=1.0: stands in the place of lr=1.0"),
        (GroupConfig(relative_lr=-1.0), "optimizer.latents.relative_lr=-1.0: must be above 0"),
        (GroupConfig(schedule="step"), "optimizer.latents.schedule='step'"),
        (GroupConfig(until=0.0), "optimizer.latents.until=0.0: is a share of the steps"),
        (GroupConfig(until=1.1), "optimizer.latents.until=1.1: is a share of the steps"),
    ],
)
def test_settings_of_a_kind_are_checked_by_their_key(group: GroupConfig, words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        OptimizerConfig(latents=group)
