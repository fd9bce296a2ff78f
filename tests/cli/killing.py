"""Callbacks that end their own process, or take from it what it needs, at a step of the test's choice."""

from __future__ import annotations

import os
import resource
import signal
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from usllm.system.errors import UserError


class KillAt(Callback):
    """Sends SIGKILL to this process after the micro batch that made optimizer step ``step``."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class TermAt(Callback):
    """Sends SIGTERM to this process in the backward pass of the micro batch behind optimizer step ``step``."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


class FullDiskAt(Callback):
    """Behind optimizer step ``step`` rank 0 can write no file beyond 300 kB, as if the disk had no more to give."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == self.step and trainer.is_global_zero:
            resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


class FailAt(Callback):
    """Rank 0 alone refuses to go on in the forward pass behind optimizer step ``step``."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step and trainer.is_global_zero:
            raise UserError("rank 0 alone cannot go on")


STAGES = {
    "calibrate": ("usllm.stages.calibrate", "measure_statistics", 1),
    "allocate": ("usllm.stages.allocate", "plan_layers", 1),
    "start": ("usllm.stages.start", "start_", 1),
    "reconstruct, in a block": ("usllm.stages.block_state", "BlockStates.save_unfinished", 2),
    "reconstruct, between blocks": ("usllm.stages.block_state", "BlockStates.save_finished", 1),
    "finetune": ("usllm.training.module", "SketchFinetuner.on_train_batch_end", 3),
    "measure": ("usllm.runs.measure", "evaluate", 3),
}
"""A place in each stage of a run, and in what follows them: module, function, and which of its calls."""
