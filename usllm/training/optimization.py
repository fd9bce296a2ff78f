"""AdamW over groups of parameters, each with its own settings and schedule, from configuration."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from usllm.compress.parameters import KINDS, parameter_kinds
from usllm.system.errors import UserError

LARGEST = 1e6
"""Of rates and decays: their products and quotients by the moments stay within fp32."""
SCHEDULES = ("linear", "cosine", "constant")


@dataclass(frozen=True)
class GroupConfig:
    """Settings of one kind of parameters; ``None`` takes that of the optimizer.

    Attributes:
        lr: peak learning rate.
        relative_lr: the same in units of each tensor's root mean square when training starts, in the place of ``lr``:
            one value then serves layers, and models, of any size of weights. It is measured once; a run that continues
            goes on with the rates it has stored.
        betas, weight_decay, schedule, warmup_steps, until: as in :class:`OptimizerConfig`.
    """

    lr: float | None = None
    relative_lr: float | None = None
    betas: tuple[float, float] | None = None
    weight_decay: float | None = None
    schedule: str | None = None
    warmup_steps: int | None = None
    until: float | None = None


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with a schedule over the optimizer steps of the whole run.

    Attributes:
        name: ``adamw``.
        lr: peak learning rate.
        betas: decay rates of AdamW's two moments.
        weight_decay: decoupled decay, applied to matrices only (norm gains and biases are not decayed).
        schedule: ``linear`` or ``cosine`` down to 0 at the last step, or ``constant``; after the warm-up.
        warmup_steps: optimizer steps of linear rise from 0 to ``lr``.
        until: share of the steps in which parameters learn; the schedule ends there, and they stay as they are. That of
            ``latents`` below 1 freezes the states for a last part in which the scales and the rest learn alone.
        latents: settings of what carries the compressed weights, where they differ.
        scales: the same for the scales of a method that trains them.
        rest: the same for all other parameters.
    """

    name: str = "adamw"
    lr: float = 5e-5
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    schedule: str = "linear"
    warmup_steps: int = 0
    until: float = 1.0
    latents: GroupConfig = field(default_factory=GroupConfig)
    scales: GroupConfig = field(default_factory=GroupConfig)
    rest: GroupConfig = field(default_factory=GroupConfig)

    def problems(self) -> list[str]:
        """Every value that cannot work, one message each."""
        found = [] if self.name == "adamw" else [f"optimizer.name={self.name!r}: unknown; choose adamw"]
        found += _problems("optimizer", self)
        for kind in KINDS:
            group: GroupConfig = getattr(self, kind)
            found += _problems(f"optimizer.{kind}", group)
            if group.lr is not None and group.relative_lr is not None:
                found.append(
                    f"optimizer.{kind}.relative_lr={group.relative_lr}: stands in the place of lr={group.lr}; set one"
                )
        return found

    def __post_init__(self) -> None:
        if problems := self.problems():
            raise UserError("\n".join(problems))

    def of(self, kind: str) -> GroupConfig:
        """All settings of a kind of parameters; one of ``lr`` and ``relative_lr`` is ``None``."""
        group: GroupConfig = getattr(self, kind)
        keys = ("betas", "weight_decay", "schedule", "warmup_steps", "until")
        filled = {key: getattr(self, key) for key in keys if getattr(group, key) is None}
        if group.lr is None and group.relative_lr is None:
            filled["lr"] = self.lr
        found = replace(group, **filled)
        assert found.betas is not None
        return replace(found, betas=(found.betas[0], found.betas[1]))  # configurations hold a list


def _problems(where: str, group: Any) -> list[str]:
    found = []
    for key in ("lr", "relative_lr"):
        value = getattr(group, key, None)
        if value is not None and not 0 < value <= LARGEST:
            found.append(f"{where}.{key}={value}: must be above 0 and at most {LARGEST:g}")
    betas = group.betas
    if betas is not None and (len(betas) != 2 or not all(0 <= beta < 1 for beta in betas)):
        found.append(f"{where}.betas={list(betas)}: must be two numbers from 0 up to, not including, 1")
    if group.weight_decay is not None and not 0 <= group.weight_decay <= LARGEST:
        found.append(f"{where}.weight_decay={group.weight_decay}: must be 0 or more, and at most {LARGEST:g}")
    if group.schedule is not None and group.schedule not in SCHEDULES:
        found.append(f"{where}.schedule={group.schedule!r}: unknown; choose one of {', '.join(SCHEDULES)}")
    if group.until is not None and not 0 < group.until <= 1:
        found.append(f"{where}.until={group.until}: is a share of the steps; must be above 0 and at most 1")
    if group.warmup_steps is not None and group.warmup_steps < 0:
        found.append(f"{where}.warmup_steps={group.warmup_steps}: must be 0 or more")
    return found


def build_optimizer(model: nn.Module, config: OptimizerConfig, *, fused: bool = False) -> Optimizer:
    """AdamW over the parameters that require a gradient; a tied parameter is there once.

    Parameters of equal settings share a group, those that are decayed before those that are not. A tensor that has a
    learning rate relative to its own size has a group of its own, which keeps that size as ``size``.

    Args:
        model: a model, or a part of it, whose latents exist.
        config: its settings.
        fused: one pass over memory for each tensor, instead of one for each operation of a step.
    """
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for kind, parameter in parameter_kinds(model):
        if not parameter.requires_grad:
            continue
        settings, decayed = config.of(kind), parameter.ndim >= 2
        relative = settings.relative_lr is not None
        key = (not decayed, settings, id(parameter) if relative else None)
        if key not in groups:
            size = root_mean_square(parameter) if relative else 1.0
            assert settings.betas is not None
            groups[key] = {
                "params": [],
                "kind": kind,
                "lr": size * (settings.relative_lr if settings.relative_lr is not None else settings.lr or 0.0),
                "betas": tuple(settings.betas),
                "weight_decay": settings.weight_decay if decayed else 0.0,
                "size": size,
            }
        groups[key]["params"].append(parameter)
    ordered = [groups[key] for key in sorted(groups, key=lambda key: key[0])]
    return AdamW(ordered, fused=fused or None)


@torch.no_grad()
def root_mean_square(tensor: Tensor) -> float:
    """Of all elements, on all ranks that hold some; never below 1e-8, so that what starts at zero can move."""
    mean = tensor.detach().float().square().mean()
    return max(float(mean.full_tensor() if isinstance(mean, DTensor) else mean) ** 0.5, 1e-8)


def build_schedule(optimizer: Optimizer, config: OptimizerConfig, total_steps: int) -> LRScheduler:
    """Learning-rate schedule to be advanced once per optimizer step.

    Args:
        optimizer: from :func:`build_optimizer`.
        config: its settings.
        total_steps: optimizer steps of the whole run, warm-up included.

    Raises:
        UserError: the run has no end (``total_steps`` below 0).
    """
    if total_steps < 0:
        raise UserError(f"trainer.max_steps={total_steps}: the schedule needs the number of optimizer steps")
    shares: list[Callable[[int], float]] = []
    for group in optimizer.param_groups:
        settings = config.of(group["kind"])
        assert settings.schedule is not None and settings.warmup_steps is not None and settings.until is not None
        learning = max(round(total_steps * settings.until), min(total_steps, 1))
        share = partial(share_of_peak, settings.schedule, settings.warmup_steps, learning)
        shares.append(share if learning == total_steps else partial(_ending_at, learning, share))
    return LambdaLR(optimizer, shares)


def _ending_at(learning: int, share: Callable[[int], float], step: int) -> float:
    return share(step) if step < learning else 0.0


def share_of_peak(schedule: str, warmup_steps: int, total_steps: int, step: int) -> float:
    """Learning rate of a step, counted from 0, over the highest one."""
    if step < warmup_steps:
        return step / warmup_steps
    if schedule == "constant":
        return 1.0
    falling = max(total_steps - warmup_steps, 1)
    if schedule == "linear":
        return max(0.0, (total_steps - step) / falling)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((step - warmup_steps) / falling))))
