"""Random number generators that survive a kill: saved in checkpoints, restored, and shielded from validation."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from usllm.system.rng import restore, snapshot


class RngState(Callback):
    """Makes dropout and every other random draw of a resumed run those of the run that was never killed.

    The state is written with each checkpoint and restored before the first micro batch after a resume, when loaders and
    their iterators, which may draw too, exist. Validation and the sanity check get their own draws: what training has
    drawn when they start is put back when they end, so that a run killed between a save and a validation sees the same
    numbers as one that validated.

    Bit-equal on one kind of device with the same number of devices, workers and threads; on CUDA deterministic
    algorithms are needed as well (``trainer.deterministic=true``).
    """

    def __init__(self) -> None:
        self._pending: dict[str, Any] | None = None
        self._before_validation: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """The generators' state at the moment of saving."""
        return snapshot()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the first micro batch."""
        self._pending = state_dict

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Restore, once after a resume."""
        if self._pending is not None:
            restore(self._pending)
            self._pending = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember what training has drawn so far."""
        self._before_validation = snapshot()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget what validation drew."""
        if self._before_validation is not None:
            restore(self._before_validation)
            self._before_validation = None
