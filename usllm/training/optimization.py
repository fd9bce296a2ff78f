"""AdamW and the learning-rate schedule, from configuration."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from usllm.system.errors import UserError

SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
"""``optimizer.schedule`` -> name in ``transformers.get_scheduler``."""


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
    """

    name: str = "adamw"
    lr: float = 5e-5
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    schedule: str = "linear"
    warmup_steps: int = 0

    def problems(self) -> list[str]:
        """Every value that cannot work, one message each."""
        found = []
        if self.name != "adamw":
            found.append(f"optimizer.name={self.name!r}: unknown; choose adamw")
        if not self.lr > 0:
            found.append(f"optimizer.lr={self.lr}: must be above 0")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            found.append(f"optimizer.betas={list(self.betas)}: must be two numbers from 0 up to, not including, 1")
        if not self.weight_decay >= 0:
            found.append(f"optimizer.weight_decay={self.weight_decay}: must be 0 or more")
        if self.schedule not in SCHEDULES:
            found.append(f"optimizer.schedule={self.schedule!r}: unknown; choose one of {', '.join(SCHEDULES)}")
        if self.warmup_steps < 0:
            found.append(f"optimizer.warmup_steps={self.warmup_steps}: must be 0 or more")
        return found

    def __post_init__(self) -> None:
        if problems := self.problems():
            raise UserError("\n".join(problems))


def build_optimizer(parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> Optimizer:
    """AdamW over the parameters that require a gradient; a tied parameter is to be given once."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    decayed = [parameter for parameter in trained if parameter.ndim >= 2]
    kept = [parameter for parameter in trained if parameter.ndim < 2]
    groups = [
        {"params": members, "weight_decay": decay}
        for members, decay in ((decayed, config.weight_decay), (kept, 0.0))
        if members
    ]
    return AdamW(groups, lr=config.lr, betas=(config.betas[0], config.betas[1]))


def build_schedule(optimizer: Optimizer, config: OptimizerConfig, total_steps: int) -> LRScheduler:
    """Learning-rate schedule to be advanced once per optimizer step.

    Args:
        total_steps: optimizer steps of the whole run, warm-up included.

    Raises:
        UserError: the run has no end (``total_steps`` not above 0).
    """
    from transformers import get_scheduler

    if total_steps <= 0:
        raise UserError(f"trainer.max_steps={total_steps}: the schedule needs the number of optimizer steps, above 0")
    return get_scheduler(
        SCHEDULES[config.schedule],
        optimizer,
        num_warmup_steps=config.warmup_steps,
        num_training_steps=total_steps,
    )
