"""Ends a run that is told to make room: finish the step, save, and leave with the exit code that asks for a requeue.

Ctrl-C is heard in the same way, with the exit code that shells know for it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import warnings
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from usllm.system.errors import UserError
from usllm.training.checkpoints import StepCheckpoint

EX_TEMPFAIL = 75
"""Exit code of ``sysexits.h`` for "try again later"."""
INTERRUPTED = 128 + signal.SIGINT
"""Exit code of a program that Ctrl-C has ended: nobody is asked to start it again."""


class Preempted(SystemExit):
    """Ends the process with an exit code that asks for a requeue; what happened is in ``reason``."""

    def __init__(self, code: int, reason: str = "preempted") -> None:
        super().__init__(code)
        self.reason = reason


class Interrupted(SystemExit):
    """Ends the process after Ctrl-C; what happened is in ``reason``."""

    def __init__(self, reason: str) -> None:
        super().__init__(INTERRUPTED)
        self.reason = reason


class Preemption(Callback):
    """Takes signals for requests to leave, instead of Lightning's handlers, which would save in the middle of a step.

    While training, a signal waits for the end of the optimizer step (and of a validation that belongs to it); the
    checkpoint of that step is written, whatever its number, and :class:`Preempted` ends the run. At all other times
    there is nothing to save and the run ends at once. The ranks of a distributed run leave together, at the first step
    behind which one of them was signalled. A resumed run equals one that was never signalled.

    Ctrl-C does the same with exit code 130 (:class:`Interrupted`); a second one leaves at once.

    Who starts it again: the exit code asks whoever started the process. Under SLURM, ``SIGUSR1`` (as sent by
    ``sbatch --signal=USR1@120``) also requeues the job with ``scontrol``; SLURM itself requeues a preempted job that
    got ``SIGTERM``, and a cancelled one must stay cancelled. A handler that was there before (submitit's for
    ``SIGUSR2``, which resubmits its job) is called once the checkpoint is written.

    Args:
        exit_code: 1 to 255; 75 is ``EX_TEMPFAIL``.
        signals: names of the signals.
        requeue: whether ``SIGUSR1`` requeues a SLURM job.
    """

    def __init__(
        self,
        exit_code: int = EX_TEMPFAIL,
        signals: Sequence[str] = ("SIGTERM", "SIGUSR1", "SIGUSR2"),
        requeue: bool = True,
    ) -> None:
        if not 1 <= exit_code <= 255:
            raise UserError(f"callbacks.preemption.exit_code={exit_code}: must lie between 1 and 255")
        unknown = [name for name in signals if name not in signal.Signals.__members__]
        if unknown:
            raise UserError(f"callbacks.preemption.signals: {unknown[0]} is no signal of this system, as SIGTERM is")
        self.exit_code = exit_code
        self.signals = tuple(signal.Signals[name] for name in signals)
        self.requeue = requeue
        self._handlers_before: dict[signal.Signals, Any] = {}
        self._received: signal.Signals | None = None
        self._training = self._at_step = self._leaving = self._left = False
        self._seen_step = 0

    @contextlib.contextmanager
    def armed(self) -> Iterator[None]:
        """Take the signals for the block; for the main thread, the only one that Python lets have handlers."""
        self._received = None
        self._training = self._leaving = self._left = False
        self._handlers_before = {}
        if threading.current_thread() is threading.main_thread():
            self._handlers_before = {number: signal.getsignal(number) for number in self.signals}
            # Who handles Ctrl-C in another way (a notebook), or not at all (nohup), goes on doing so.
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                self._handlers_before.setdefault(signal.SIGINT, signal.default_int_handler)
        self._take_signals()
        try:
            yield
        finally:
            for number, handler in self._handlers_before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
            self._handlers_before = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on signals wait. Lightning has put its own handlers over ours."""
        self._seen_step, self._at_step, self._training = trainer.global_step, False, True
        self._take_signals()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Leave, when the step before was the last one and its checkpoint is written.

        Raises:
            Preempted: see the class; after Ctrl-C it is Interrupted.
        """
        if self._leaving:
            self._leave(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ask for a checkpoint of this step, if a signal came and the micro batch made a step."""
        self._at_step = trainer.global_step != self._seen_step
        if self._at_step:
            self._seen_step = trainer.global_step
            self._decide(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As after a step, for a signal that came during its validation."""
        if self._training and self._at_step and not self._leaving:
            self._decide(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave, all ranks together, on a signal to any of them during the last step; that step is saved in any case.

        Raises:
            Preempted: see the class; after Ctrl-C it is Interrupted.
        """
        together = trainer.strategy.reduce_boolean_decision(self._received is not None, all=False)
        self._training = False
        if together:
            self._leave(trainer)
        if self._received is not None:  # it came after the ranks had agreed to go on
            self._leave(None)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Training is over: from here on a signal ends the process at once."""
        self._training = False

    def _take_signals(self) -> None:
        for number in self._handlers_before:
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._left:  # such as the signal that a requeue itself sends: loggers are being closed
            return
        again = self._received == signal.SIGINT == number
        self._received = signal.Signals(number)
        if again or not self._training:
            self._leave(None)
        elif number == signal.SIGINT:
            os.write(2, b"\nInterrupted: finishing this step and saving it; Ctrl-C again leaves at once\n")

    def _decide(self, trainer: Trainer) -> None:
        if trainer.global_step == trainer.max_steps or trainer.should_stop:
            return  # training ends here in any case, and its end is saved
        if trainer.strategy.reduce_boolean_decision(self._received is not None, all=False):
            self._leaving = True
            for callback in trainer.checkpoint_callbacks:
                if isinstance(callback, StepCheckpoint):
                    callback.save_this_step()

    def _leave(self, trainer: Trainer | None) -> None:
        received, self._received, self._left = self._received, None, True
        self._training = self._leaving = False
        if received is not None:
            earlier = self._handlers_before.get(received)
            if callable(earlier) and earlier is not signal.default_int_handler:
                earlier(received, None)
            if received == signal.SIGUSR1 and self.requeue and (trainer is None or trainer.is_global_zero):
                _requeue_slurm_job()
        step = "" if trainer is None else f" after step {trainer.global_step}"
        if received == signal.SIGINT:
            saved = "" if trainer is None else ", which is saved"
            raise Interrupted(f"interrupted{step}{saved}; the same command with resume=true continues")
        cause = "another rank's signal" if received is None else received.name
        raise Preempted(self.exit_code, f"preempted by {cause}{step}; the same command with resume=true continues")


def _requeue_slurm_job() -> None:
    """Ask SLURM to run this job again; submitit, where it has started the job, does so itself."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or "SUBMITIT_EXECUTOR" in os.environ:
        return
    if (array := os.environ.get("SLURM_ARRAY_JOB_ID")) is not None:
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        warnings.warn(f"SLURM job {job} was not requeued ({error}); submit the same command again", stacklevel=2)
