"""What every command shares: one clear message for a user's mistake, and shorter ways to say things."""

from __future__ import annotations

import logging
import os
import re
import select
import sys
import warnings
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from hydra.errors import CompactHydraException

from usllm.system.errors import RunError, UserError, no_space

T = TypeVar("T")

EXIT_USER_ERROR = UserError.status
EXIT_FAILED = RunError.status
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141
_NO_MEMORY_TEXT = re.compile(r"OutOfMemoryError|can't allocate memory|[Cc]annot allocate memory|Unable to allocate")

# Third-party notices that say nothing about a run of usllm and would bury its report.
_QUIET_WARNINGS = (
    r".*does not have many workers.*",
    r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*",
    r".*recommended to use `self.log\('val/.*, sync_dist=True\)`.*",  # they are summed over ranks before
    r".*Checkpoint directory .* exists and is not empty.*",
    r".*You're resuming from a checkpoint that ended before the epoch ended.*",
    r".*Precision bf16-mixed is not supported by the model summary.*",
    r".*Found \d+ module\(s\) in eval mode at the start of training.*",
    r".*is smaller than the logging interval.*",
    r"'set_vital' is deprecated.*",
    r".*`lr_scheduler.step\(\)` before `optimizer.step\(\)`.*",
)
_QUIET_LOGGERS = (
    "lightning.pytorch",
    "lightning.fabric",
    "transformers",
    "datasets",
    "httpx",
    "fsspec",
    "gguf",
    "lm_eval",
    "huggingface_hub",
)


class SweepJobFailed(CompactHydraException):
    """One job of a multirun has failed and has said why; Hydra goes on with the others and raises it at the end."""

    def __init__(self, message: str, status: int = EXIT_FAILED) -> None:
        super().__init__(message)
        self.status = status

    def __reduce__(self) -> tuple[Any, ...]:
        """Launchers hand it over from other processes."""
        return type(self), (str(self), self.status)


def report_errors(program: str, task: Callable[[], T], in_sweep: bool = False, resumes: bool = False) -> T:
    """Run ``task``; an error that a user can do something about becomes one message on stderr and an exit status.

    That is 2 for wrong input (a :class:`UserError`), 1 for what failed on the way (a :class:`RunError`, an error of the
    system such as a full disk, memory that ran out), 130 for Ctrl-C. With ``HYDRA_FULL_ERROR=1`` in the environment the
    error passes through with its traceback, and so does everything else: it is a fault of the program.

    Args:
        in_sweep: the task is one job of a multirun: the error is raised, and Hydra goes on with the other jobs and
            reports it at the end.
        resumes: the program can continue what was interrupted, and says how.
    """
    try:
        _check_kernels()
        return task()
    except Exception as error:
        leave_if_nobody_reads(error)
        found = None if os.environ.get("HYDRA_FULL_ERROR") == "1" else _explained(error, resumes)
        if found is None:
            raise
        print(f"{program}: error: {found}", file=sys.stderr)
        if in_sweep:
            raise SweepJobFailed(f"{program}: error: {found}", found.status) from None
        sys.exit(found.status)
    except SystemExit as leaving:
        if hasattr(leaving, "reason"):  # usllm.callbacks.Preempted, which is slow to import
            print(f"{program}: {leaving.reason}", file=sys.stderr)
        elif isinstance(leaving.__context__, KeyboardInterrupt):  # Lightning leaves so, with status 1
            interrupted(program, resumes)
        raise
    except KeyboardInterrupt:
        interrupted(program, resumes)


def interrupted(program: str, resumes: bool = False) -> NoReturn:
    """Leave after Ctrl-C, with one line."""
    print(f"{program}: interrupted{'; the same command with resume=true continues' * resumes}", file=sys.stderr)
    sys.exit(EXIT_INTERRUPTED)


def leave_if_nobody_reads(error: Exception) -> None:
    """Leave without a word, as other programs do, where nobody reads the output (``usllm-train --help | head``)."""
    if not isinstance(error, BrokenPipeError):
        return
    output = select.poll()
    output.register(sys.stdout.fileno(), select.POLLOUT)
    if any(event & select.POLLERR for _, event in output.poll(0)):  # it was this pipe, and no other
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left in the buffer
        sys.exit(EXIT_BROKEN_PIPE)


def _explained(error: Exception, resumes: bool) -> UserError | None:
    """An error as what the user is told about it; ``None`` for a fault of the program."""
    if isinstance(error, UserError):
        return error
    again = "resume" if resumes else "try again"
    text = " ".join(str(error).split())
    if no_space(error):
        return RunError(f"{text}: free space, then {again}")
    if isinstance(error, OSError) and error.errno is not None:
        return RunError(f"{text}: see to that place, or choose another one, then {again}")
    if isinstance(error, MemoryError) or _NO_MEMORY_TEXT.search(f"{type(error).__name__} {text}"):
        return RunError(
            f"memory ran out ({text[:200] or type(error).__name__}): lower the batch size or the context, or take a "
            f"larger machine, then {again}"
        )
    return None


def given_overrides() -> list[str]:
    """The overrides of this job, as they were typed: a reference in one of them stays one."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    given = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
    return [str(override) for override in given or ()]


def _check_kernels() -> None:
    """Refuse a choice of kernels that no device here can run, before anything is read or written.

    Raises:
        UserError: says what to choose instead.
    """
    if not os.environ.get("USLLM_KERNELS"):  # what follows is slow to import
        return
    import torch

    from usllm_kernels import choose

    refused = None
    for kind in ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",):
        try:
            choose(torch.device(kind))
        except ValueError as error:
            refused = error
        else:
            return
    raise UserError(str(refused))


def quiet_environment() -> None:
    """Settings that libraries read when they are imported; to be called before that."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # data sets fork worker processes
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("WANDB_SILENT", "true")


def quiet_libraries() -> None:
    """Keep third-party chatter off the screen; to be called after imports, which set levels of their own.

    Errors stay, and so do warnings, ours without the line of code that nobody wants to read.
    """
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    for pattern in _QUIET_WARNINGS:
        warnings.filterwarnings("ignore", message=pattern)
    for name in _QUIET_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
