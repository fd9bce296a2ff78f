"""The processes of the other ranks, where Lightning has started them from this one."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Iterator

from lightning.pytorch import Trainer


@contextlib.contextmanager
def ending_together(trainer: Trainer, patience: float = 10.0) -> Iterator[None]:
    """Take the other ranks along when an error, or a request to leave, ends this process.

    Most often the ranks have agreed on it and end by themselves. One that waits for this rank in a collective would do
    so until the process group times out (half an hour), and no signal but SIGKILL reaches it there. Where torchrun or
    SLURM has started the ranks, ending them is theirs.

    Args:
        patience: seconds that the others have for ending by themselves.
    """
    try:
        yield
    except BaseException:
        launched: list[subprocess.Popen[bytes]] = getattr(trainer.strategy.launcher, "procs", [])
        others = [process for process in launched if isinstance(process, subprocess.Popen)]
        # Lightning watches this very list, and kills this process, too, when one of the others has ended with an exit
        # code: before it has closed its loggers and could leave with its own.
        launched.clear()
        deadline = time.monotonic() + patience
        for process in others:
            try:
                process.wait(max(deadline - time.monotonic(), 0.0))
            except subprocess.TimeoutExpired:
                process.kill()
        raise
