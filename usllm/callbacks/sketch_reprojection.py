"""Lets the states follow the latent weights: re-projection every k optimizer steps, re-allocation every m."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from usllm.calibration.measure import ENERGY, measure_statistics
from usllm.compress import Reprojection, allocate_, compressed_layers, recall_winners_, reproject_
from usllm.system.errors import UserError
from usllm.training.module import sketch_finetuner


class SketchReprojection(Callback):
    """Projects the latent weights into the sketch after every k-th optimizer step.

    Between projections the states, and so the forward weights, stay as they are. Before validation, before a checkpoint
    is written and at the end of training, states that lag behind are projected in any case: what is measured and stored
    is always the sketch of the latents. For k above 1 the intervals of validation and of checkpoints are therefore part
    of the trajectory; runs that share these settings are equal bit for bit, killed or not.

    The work is done in callback hooks because Lightning calls these before checkpoints of the same step are written;
    states that changed in ``LightningModule.on_train_batch_end`` would be missing from them.

    Logs, as means over layers after each scheduled projection, ``sketch/winner_change`` (share of buckets whose winning
    weight changed) and ``sketch/relative_error`` (projection error relative to the latent weight).

    Args:
        every_n_steps: k, in optimizer steps; 1 is the paper's.
        reallocate_every_n_steps: m, in optimizer steps: importance is measured again on the model as it is and space is
            shared out anew; the optimizer's state stays. ``None`` never does.
        calibration_sequences: sequences of each new measurement.

    Attributes:
        last: per layer what the last projection changed.
    """

    def __init__(
        self,
        every_n_steps: int = 1,
        reallocate_every_n_steps: int | None = None,
        calibration_sequences: int = 32,
    ) -> None:
        for name, value in (
            ("every_n_steps", every_n_steps),
            ("reallocate_every_n_steps", reallocate_every_n_steps),
            ("calibration_sequences", calibration_sequences),
        ):
            if value is not None and value < 1:
                raise UserError(f"callbacks.sketch_reprojection.{name}={value}: must be 1 or more")
        self.every_n_steps = every_n_steps
        self.reallocate_every_n_steps = reallocate_every_n_steps
        self.calibration_sequences = calibration_sequences
        self.last: dict[str, Reprojection] = {}
        self._seen_step: int | None = None
        self._projected_step: int | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the step that training starts or continues from; its states are projected.

        Raises:
            UserError: re-allocation is asked of a method whose latents do not allow it.
        """
        network = sketch_finetuner(pl_module).network
        own = [layer for layer in compressed_layers(network).values() if set(layer.latents) != {"weight"}]
        if own and self.reallocate_every_n_steps:
            raise UserError(
                f"callbacks.sketch_reprojection.reallocate_every_n_steps={self.reallocate_every_n_steps}: the method's "
                "latents go with its plan, which cannot change; set it to null"
            )
        recall_winners_(network)
        self._seen_step = self._projected_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Project or re-allocate, on micro batches that made a due optimizer step."""
        step = trainer.global_step
        if step == self._seen_step:
            return
        self._seen_step = step
        last_step = step == trainer.max_steps  # an allocation that no step follows would only do harm
        if self.reallocate_every_n_steps and step % self.reallocate_every_n_steps == 0 and not last_step:
            self._reallocate(trainer, pl_module)
            self._projected_step = step
        elif step % self.every_n_steps == 0:
            self._project(trainer, pl_module)
            for name in ("winner_change", "relative_error"):
                values = [getattr(layer, name) for layer in self.last.values()]
                if not values:  # a method whose states follow the latents by themselves
                    break
                pl_module.log(f"sketch/{name}", sum(values) / len(values))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate the sketch of the latents, not an older one."""
        self._catch_up(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store the sketch of the latents, not an older one."""
        if self._catch_up(trainer, pl_module):
            checkpoint["state_dict"] = trainer.strategy.lightning_module_state_dict()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the sketch of the latents behind."""
        self._catch_up(trainer, pl_module)

    def _catch_up(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Project where an optimizer step came after the last projection; outside of training none did."""
        if self._projected_step is None or self._projected_step == trainer.global_step:
            return False
        self._project(trainer, pl_module)
        return True

    def _reallocate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = sketch_finetuner(pl_module)
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]  # set by Trainer.fit, not declared
        statistics = measure_statistics(
            module.network,
            datamodule.calibration_batches(self.calibration_sequences),
            self.calibration_sequences,
            module.compressor.needs | {ENERGY},
            device=pl_module.device,
            context=trainer.precision_plugin.forward_context,
        )
        allocate_(module.network, module.compressor, statistics)

    def _project(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.last = reproject_(sketch_finetuner(pl_module).network)
        self._projected_step = trainer.global_step
