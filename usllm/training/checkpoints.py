"""Checkpoints that a killed run can trust: written whole, only where training can continue bit for bit, and checked.

Lightning's own writer goes through a file in the system's temporary folder; where that is another file system its last
move is a copy, and a kill during the copy leaves half a file under the final name. ``AtomicCheckpointIO`` writes beside
the target and renames, so the name only ever stands for a whole file.
"""

from __future__ import annotations

import os
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from usllm.system.errors import RunError, UserError
from usllm.system.files import write_torch

SUFFIX = ".ckpt"
_STEP = re.compile(r"step=(\d+)")
_UNREADABLE = (OSError, RuntimeError, EOFError, pickle.UnpicklingError, ValueError, KeyError)
"""What ``torch.load`` raises on a file that is cut, empty or not a checkpoint."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, flushes to disk, then renames over it."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write ``checkpoint`` so that ``path`` is either the old file or the whole new one, at every instant.

        Raises:
            RunError: the disk is full or the folder cannot be written.
        """
        target = Path(path)
        try:
            write_torch(target, checkpoint)
            _sync_folder(target.parent)
        except (OSError, RuntimeError) as error:
            raise RunError(
                f"checkpoint {target} could not be written ({error}); earlier checkpoints in {target.parent} are whole"
                ". Free space or choose another output_root, then resume"
            ) from error


def _sync_folder(folder: Path) -> None:
    """Flush the rename itself to disk; only POSIX lets a folder be opened for that."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class StepCheckpoint(ModelCheckpoint):
    """Lightning's ``ModelCheckpoint``, keeping the newest files by step and saving only where a resume is exact.

    Three things differ from a plain ``ModelCheckpoint(monitor="step", mode="max")``:

    - It saves only on the micro batch that made an optimizer step. Lightning decides by ``global_step`` alone, which
      after a resume also matches the micro batches *before* the next step; such a file would replace the good one and
      lack the gradients gathered so far.
    - On a step that is followed by validation it saves after the validation. From a file saved before it, Lightning
      resumes *behind* the validation: its metrics and the count of early stopping would be lost.
    - It saves the end of training, on whatever step that falls, and a model whose stages were all that was asked for
      (``max_steps=0``).

    Args:
        dirpath: folder of the checkpoints.
        every_n_train_steps: optimizer steps between two checkpoints, above 0.
        keep: how many of the newest checkpoints stay on disk, 2 or more: the last one may turn out to be unreadable.
    """

    def __init__(self, dirpath: str | None = None, every_n_train_steps: int = 100, keep: int = 2) -> None:
        if every_n_train_steps < 1:
            raise UserError(f"callbacks.checkpoint.every_n_train_steps={every_n_train_steps}: must be 1 or more")
        if keep < 2:
            raise UserError(f"callbacks.checkpoint.keep={keep}: must be 2 or more, the newest file may be unreadable")
        super().__init__(
            dirpath=dirpath,
            filename="step={step:08d}",
            auto_insert_metric_name=False,
            monitor="step",
            mode="max",
            save_top_k=keep,
            every_n_train_steps=every_n_train_steps,
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )
        self._seen_step = 0
        self._at_step = self._requested = False
        self._save_after_validation = False

    def save_this_step(self) -> None:
        """Save at the end of the present step, and of a validation that belongs to it, whatever the interval.

        For callbacks, in ``on_train_batch_end`` or ``on_validation_end``: Lightning calls checkpoints after them.
        """
        self._requested = True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Install the atomic writer, unless the user configured one of their own."""
        super().setup(trainer, pl_module, stage)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the step that training starts or continues from."""
        super().on_train_start(trainer, pl_module)
        self._seen_step = trainer.global_step
        if trainer.ckpt_path is not None:
            # The file that the run continues from is at this step already.
            self._last_global_step_saved = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save on due steps, or leave the saving to the end of a validation that follows."""
        self._at_step = trainer.global_step != self._seen_step
        if not self._at_step:
            return
        self._seen_step = trainer.global_step
        if trainer.global_step % self._every_n_train_steps != 0 and not self._requested:
            return
        self._save_after_validation = validation_follows(trainer, batch_idx)
        if not self._save_after_validation:
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the due step that this validation belongs to."""
        if self._save_after_validation or (self._requested and self._at_step):
            self._save_after_validation = False
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the end of training."""
        self._save(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save a model that no step was asked for: Lightning leaves training out as a whole."""
        if trainer.max_steps == 0:
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    def _save(self, trainer: Trainer) -> None:
        self._requested = False
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    def _should_remove_checkpoint(self, trainer: Trainer, previous: str, current: str) -> bool:
        # Lightning never removes the file that a run was resumed from, which leaves one more file per preemption.
        resumed_from = None if trainer.ckpt_path is None else Path(trainer.ckpt_path).absolute()
        if previous != current and Path(previous).absolute() == resumed_from:
            return True
        return super()._should_remove_checkpoint(trainer, previous, current)


def validation_follows(trainer: Trainer, batch_idx: int) -> bool:
    """Whether Lightning will validate right after the micro batch ``batch_idx`` of the current epoch."""
    if not trainer.enable_validation:
        return False
    epochs = trainer.check_val_every_n_epoch
    if epochs is not None and (trainer.current_epoch + 1) % epochs != 0:
        return False
    if trainer.should_stop:
        return True
    if trainer.val_check_batch is None or trainer.val_check_batch == float("inf"):
        return False  # validation by the clock or by the end of a loader without length: not known in advance
    micro_batch = trainer.fit_loop.total_batch_idx if epochs is None else batch_idx
    return (micro_batch + 1) % trainer.val_check_batch == 0


def load_checkpoint(path: str | Path, mmap: bool = True) -> dict[str, Any]:
    """Load a checkpoint's dictionary onto the CPU; tensors stay on disk until they are read where ``mmap`` is set.

    Raises:
        UserError: the file is missing, cut, or not a checkpoint; the message names it.
    """
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except _UNREADABLE as error:
        raise UserError(f"checkpoint {path} cannot be read ({_first_line(error)})") from error
    if not isinstance(loaded, dict) or not {"state_dict", "global_step"} <= loaded.keys():
        raise UserError(f"checkpoint {path} cannot be read (it is not a training checkpoint)")
    return loaded


def checkpoints_in(folder: str | Path) -> list[tuple[int, Path]]:
    """Step and file of every checkpoint in ``folder``, read or not, the highest step first."""
    files = Path(folder).glob(f"*{SUFFIX}")
    return sorted(((int(match[1]), path) for path in files if (match := _STEP.search(path.stem))), reverse=True)


def latest_checkpoint(folder: str | Path) -> Path | None:
    """The checkpoint of the highest step in ``folder`` that can be read, or ``None`` where there is none.

    A file that cannot be read (cut in half by a full disk, say) is named in a warning and the one before it is used.

    Raises:
        UserError: there are checkpoints and none can be read.
    """
    broken: list[Path] = []
    for _, path in checkpoints_in(folder):
        try:
            load_checkpoint(path)
        except UserError as error:
            warnings.warn(f"{error}; the checkpoint before it is used", stacklevel=2)
            broken.append(path)
        else:
            return path
    if broken:
        raise UserError(
            f"no checkpoint in {folder} can be read ({', '.join(path.name for path in broken)}); "
            "delete them to start the run afresh"
        )
    return None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
