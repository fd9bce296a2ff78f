"""Training: the LightningModule, its objectives, its optimizer and its checkpoints.

Objectives and optimizer need torch alone, so Lightning is imported with the names that need it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from usllm.training.objectives import CrossEntropy, Distill, Objective, build_objective, next_token_loss
from usllm.training.optimization import OptimizerConfig, build_optimizer, build_schedule

if TYPE_CHECKING:
    from usllm.training.checkpoints import AtomicCheckpointIO, StepCheckpoint, latest_checkpoint, load_checkpoint
    from usllm.training.module import SketchFinetuner, sketch_finetuner
    from usllm.training.strategies import Fsdp2Strategy, build_strategy

__all__ = [
    "AtomicCheckpointIO",
    "CrossEntropy",
    "Distill",
    "Fsdp2Strategy",
    "Objective",
    "OptimizerConfig",
    "SketchFinetuner",
    "StepCheckpoint",
    "build_objective",
    "build_optimizer",
    "build_schedule",
    "build_strategy",
    "latest_checkpoint",
    "load_checkpoint",
    "next_token_loss",
    "sketch_finetuner",
]

_NEED_LIGHTNING = {
    "AtomicCheckpointIO": "checkpoints",
    "StepCheckpoint": "checkpoints",
    "latest_checkpoint": "checkpoints",
    "load_checkpoint": "checkpoints",
    "SketchFinetuner": "module",
    "sketch_finetuner": "module",
    "Fsdp2Strategy": "strategies",
    "build_strategy": "strategies",
}


def __getattr__(name: str) -> Any:
    if name in _NEED_LIGHTNING:
        return getattr(importlib.import_module(f"usllm.training.{_NEED_LIGHTNING[name]}"), name)
    raise AttributeError(f"module 'usllm.training' has no attribute {name!r}")
