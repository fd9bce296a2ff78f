"""Stops training at the first loss or gradient that is not finite, before it reaches the weights or a checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from usllm.system.errors import RunError
from usllm.system.finite import first_nonfinite_output, first_nonfinite_tensor
from usllm.system.rng import preserved_rng


class NanGuard(Callback):
    """Raises a ``RunError`` that names the step and the first layer in which numbers stopped being finite.

    The loss is looked at before each backward pass and the gradients before each optimizer step, so the latent weights
    stay as they were and no checkpoint is written with the poisoned state. Looking at the loss waits for the device,
    and for the other ranks, once per micro batch; all ranks stop together.
    """

    def __init__(self) -> None:
        self._batch: Any = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the micro batch, to run it again when its loss turns out not to be finite."""
        self._batch = batch

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Stop on a loss that is not finite.

        Raises:
            RunError: names the step and the first layer with a weight, state or output that is not finite.
        """
        bad = not bool(torch.isfinite(loss).all())
        if not trainer.strategy.reduce_boolean_decision(bad, all=False):
            return
        where = first_nonfinite_tensor(pl_module) or self._first_nonfinite_output(trainer, pl_module)
        what = f"loss is {loss.item()}" if bad else "loss of another rank is not finite"
        raise RunError(_message(what, where or "the objective itself", trainer))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Stop on a gradient that is not finite.

        Raises:
            RunError: names the step and, of the layers with such a gradient, the one nearest to the loss: the backward
                pass met it first.
        """
        if trainer.precision == "16-mixed":
            return  # its gradient scaler meets infinite gradients by design, skips the step and lowers the scale
        named = [(name, p.grad) for name, p in pl_module.named_parameters() if p.grad is not None]
        if not named or torch.isfinite(torch.nn.utils.get_total_norm([gradient for _, gradient in named])):
            return
        for name, gradient in reversed(named):
            if not torch.isfinite(gradient).all():
                raise RunError(_message("gradient is not finite", f"the gradient of {name}", trainer))

    def _first_nonfinite_output(self, trainer: Trainer, pl_module: LightningModule) -> str | None:
        """Run the micro batch again, watching each module's output; ``None`` where all of them are finite."""
        forward_context = trainer.precision_plugin.forward_context()
        with first_nonfinite_output(pl_module) as found, preserved_rng(), torch.no_grad(), forward_context:
            pl_module.training_step(self._batch, 0)
        return found[0] if found else None


def _message(what: str, where: str, trainer: Trainer) -> str:
    saved = getattr(trainer.checkpoint_callback, "best_model_path", "")
    kept = f"The last good checkpoint is {saved}" if saved else "No checkpoint had been written yet"
    return (
        f"step {trainer.global_step + 1}: the {what}, first seen in {where}; training stopped before it "
        f"reached the weights. {kept}. Lower optimizer.lr, raise optimizer.warmup_steps or set gradient_clip_val"
    )
