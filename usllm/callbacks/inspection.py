"""The moments at which a run is looked at, for callbacks that only look."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from usllm.loggers import axis_step, takes_media
from usllm.system.errors import UserError
from usllm.system.rng import preserved_rng
from usllm.training.module import SketchFinetuner, sketch_finetuner


class Inspection(Callback):
    """Calls :meth:`show` before the first step, after every n-th validation and at the end of training.

    The run goes on as if nobody had looked: the generators of random numbers are put back. Nothing is shown without a
    logger, and what only media-taking loggers could show is not even computed without one.

    Args:
        every_n_validations: n, 1 or more.
    """

    media_only = True
    """Whether the subclass shows nothing that a CSV file could take."""

    def __init__(self, every_n_validations: int = 1) -> None:
        if every_n_validations < 1:
            raise UserError(f"{type(self).__name__}: every_n_validations={every_n_validations} must be 1 or more")
        self.every_n_validations = every_n_validations
        self._validations = 0
        self._shown_step = -1

    def show(self, trainer: Trainer, module: SketchFinetuner, step: int) -> None:
        """Log what there is to see, at ``step`` of the axis. Called on all ranks; loggers are silent on all but one."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs in order to look at the same validations."""
        return {"validations": self._validations, "shown_step": self._shown_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue counting."""
        self._validations, self._shown_step = state_dict["validations"], state_dict["shown_step"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the projected model before its first step."""
        if trainer.global_step == 0:
            self._look(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look after every n-th validation."""
        if trainer.sanity_checking:
            return
        self._validations += 1
        if self._validations % self.every_n_validations == 0:
            self._look(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the end, unless that was just done."""
        self._look(trainer, pl_module)

    def _look(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._shown_step == trainer.global_step:
            return
        self._shown_step = trainer.global_step
        if trainer.loggers and (takes_media(trainer.loggers) or not self.media_only):
            with preserved_rng():
                self.show(trainer, sketch_finetuner(pl_module), axis_step(trainer))
