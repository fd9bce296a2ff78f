"""Measures E[a²] of every sketched layer's input before the first step, and allocates the sketch by it."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from usllm.calibration.measure import kept_importance, measure_importance
from usllm.compress import allocate_, compressed_layers
from usllm.system.errors import UserError
from usllm.training.module import sketch_finetuner

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ImportanceCalibration(Callback):
    """Calibrates once, before the first step of a fresh run, and allocates the sketch.

    Streams ``sequences`` sequences of the training split (``trainer.datamodule.calibration_batches``) through the still
    dense model in the run's precision. Plans and importance are part of the checkpoint, so a resumed run, whose layers
    have plans already, skips it.

    Args:
        sequences: number of calibration sequences, 1 or more.
        reuse: share the measurement with all runs of the same weights, text and arithmetic
            (:mod:`usllm.system.results`); not among the ranks of a distributed run, which measure a part each.

    Attributes:
        moments: E[a²] ``{layer name: [in] fp32}`` of the last measurement; empty where none was needed.
    """

    def __init__(self, sequences: int = 32, reuse: bool = False) -> None:
        if sequences < 1:
            raise UserError(f"callbacks.importance_calibration.sequences={sequences}: must be 1 or more")
        self.sequences = sequences
        self.reuse = reuse
        self.moments: dict[str, Tensor] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure and allocate, unless every layer has a plan.

        Raises:
            UserError: see ``measure_importance``.
        """
        module = sketch_finetuner(pl_module)
        if all(layer.plan is not None for layer in compressed_layers(module.network).values()):
            return
        measure = partial(measure_in_trainer, trainer, pl_module, self.sequences, progress=_shows_progress(trainer))
        if self.reuse and trainer.world_size == 1 and not isinstance(module.network, FSDPModule):
            datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]  # set by Trainer.fit, not declared
            batches = datamodule.calibration_batches(self.sequences)
            autocast = torch.bfloat16 if str(trainer.precision).startswith("bf16") else None
            model = cast("PreTrainedModel", module.network)
            self.moments = kept_importance(model, batches, module.device, autocast, measure)
        else:
            self.moments = measure()
        allocate_(module.network, module.compressor, self.moments)


def measure_in_trainer(
    trainer: Trainer, pl_module: LightningModule, sequences: int, progress: bool = False
) -> dict[str, Tensor]:
    """``measure_importance`` with the trainer's data, device and precision."""
    datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]  # set by Trainer.fit, not declared
    return measure_importance(
        sketch_finetuner(pl_module).network,
        datamodule.calibration_batches(sequences),
        sequences,
        device=pl_module.device,
        context=trainer.precision_plugin.forward_context(),
        progress=progress,
    )


def _shows_progress(trainer: Trainer) -> bool:
    return trainer.is_global_zero and trainer.progress_bar_callback is not None
