"""The end of a training run: what may end it before its last step, and which of it did."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, Timer

from usllm.system.errors import UserError


def timer_of(callbacks: list[Callback], max_time: Any) -> Timer:
    """The callback that measures the time of training, and ends it after ``trainer.max_time``.

    Args:
        callbacks: of the run; a timer is added where there is none.
        max_time: of the configuration, ``None`` for no limit.

    Raises:
        UserError: a timer among the callbacks has a limit of its own, or would have.
    """
    found = next((callback for callback in callbacks if isinstance(callback, Timer)), None)
    if found is None:
        callbacks.append(found := Timer(duration=max_time))
    elif max_time is not None:
        raise UserError(
            f"trainer.max_time={max_time}: the callback timer sets the length of time; remove one of the two, for "
            "example with trainer.max_time=null"
        )
    return found


def early_end(trainer: Trainer, max_steps: int, callbacks: Sequence[Callback]) -> str | None:
    """Why a run ended before its last step, in words; ``None`` where it did not.

    Args:
        trainer: after ``fit``.
        max_steps: optimizer steps that were asked for.
        callbacks: of the run.
    """
    if trainer.global_step >= max_steps:
        return None
    for callback in callbacks:
        remaining = callback.time_remaining() if isinstance(callback, Timer) else None
        if remaining is not None and remaining <= 0:
            return "its time was up (trainer.max_time, or the callback timer)"
        if isinstance(callback, EarlyStopping) and callback.stopping_reason_message is not None:
            return f"early stopping: {' '.join(callback.stopping_reason_message.split())}"
    return "a callback stopped it"
