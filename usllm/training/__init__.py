"""Training: the LightningModule, its objectives, its optimizer and its checkpoints."""

from __future__ import annotations

from usllm.training.checkpoints import AtomicCheckpointIO, StepCheckpoint, latest_checkpoint, load_checkpoint
from usllm.training.module import SketchFinetuner, sketch_finetuner
from usllm.training.objectives import CrossEntropy, Distill, Objective, build_objective, next_token_loss
from usllm.training.optimization import OptimizerConfig, build_optimizer, build_schedule
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
