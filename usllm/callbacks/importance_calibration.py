"""Has the model calibrated, planned and started before it is trained: for users of plain Lightning."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer

from usllm.stages import Allocate, Calibrate, Preparation, Start
from usllm.training.module import sketch_finetuner


class ImportanceCalibration(Callback):
    """Gives a ``SketchFinetuner`` the stages ``calibrate``, ``allocate`` and ``start``, if it has none of its own.

    They run once, when a fresh run configures its model: ``sequences`` sequences of the training split
    (``trainer.datamodule.calibration_batches``) are streamed through the still dense model in the run's precision.
    Plans and importance are part of the checkpoint, so a resumed run takes them from there.

    Args:
        sequences: number of calibration sequences, 1 or more.
        reuse: share the measurement with all runs of the same weights, text and arithmetic.

    Raises:
        UserError: ``sequences`` is below 1.
    """

    def __init__(self, sequences: int = 32, reuse: bool = False) -> None:
        self.calibrate = Calibrate(sequences, reuse)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Hand the stages over, before Lightning has the model configured."""
        module = sketch_finetuner(pl_module)
        if stage == "fit" and module.preparation is None:
            module.preparation = Preparation([self.calibrate, Allocate(), Start()])
