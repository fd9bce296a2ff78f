"""Random number generators that survive a kill: saved in checkpoints, restored, and shielded from validation."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer


def snapshot() -> dict[str, Any]:
    """State of the generators of Python, NumPy, torch and every CUDA device, as tensors and plain Python only.

    NumPy's key array becomes a list, because checkpoints are loaded with ``weights_only=True``.
    """
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002 - libraries draw from this one
    return {
        "python": [version, list(internal), gauss],
        "numpy": [name, np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore(state: dict[str, Any]) -> None:
    """Set the generators to a ``snapshot``. CUDA states are set for the devices that both machines have."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(state["torch"].cpu())
    for device, cuda_state in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(cuda_state.cpu(), device)


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Leave the generators as they were found."""
    state = snapshot()
    try:
        yield
    finally:
        restore(state)


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
