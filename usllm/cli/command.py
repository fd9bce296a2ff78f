"""What every command shares: one clear message for a user's mistake, and shorter ways to say things."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from usllm.data.sources.files import COMPRESSIONS
from usllm.system.errors import RunError, UserError, no_space

T = TypeVar("T")

EXIT_USER_ERROR = UserError.status
EXIT_INTERRUPTED = 130
PLAIN_TEXT = ("prompt",)
"""Keys whose value ``null`` is the word."""

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
_QUIET_LOGGERS = ("lightning.pytorch", "lightning.fabric", "transformers", "datasets", "httpx", "fsspec", "lm_eval")


def report_errors(program: str, task: Callable[[], T], in_sweep: bool = False, resumes: bool = False) -> T:
    """Run ``task``; a :class:`UserError` becomes one message on stderr and its exit status, without a traceback.

    So does a disk that has run full. With ``HYDRA_FULL_ERROR=1`` in the environment the error passes through with its
    traceback.

    Args:
        in_sweep: the task is one job of a multirun: the error is raised, and Hydra goes on with the other jobs and
            reports it at the end, with exit status 1.
        resumes: the program can continue what was interrupted, and says how.
    """
    try:
        _check_kernels()
        return task()
    except Exception as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1" or not (isinstance(error, UserError) or no_space(error)):
            raise
        if not isinstance(error, UserError):
            error = RunError(f"{' '.join(str(error).split())}: free space, then {'resume' if resumes else 'try again'}")
        print(f"{program}: error: {error}", file=sys.stderr)
        if in_sweep:
            from hydra.errors import CompactHydraException

            raise CompactHydraException(f"{program}: error: {error}") from None
        sys.exit(error.status)
    except SystemExit as leaving:
        if hasattr(leaving, "reason"):  # usllm.callbacks.Preempted, which is slow to import
            print(f"{program}: {leaving.reason}", file=sys.stderr)
        raise
    except KeyboardInterrupt:
        print(f"{program}: interrupted{'; the same command with resume=true continues' * resumes}", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)


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


def expand_model(arguments: list[str]) -> list[str]:
    """Let ``model=`` take a GGUF file, a folder or a hub name besides the options of the group ``model``.

    A value that looks like a place (it has a slash, ends in ``.gguf``, or is an existing folder) becomes the group
    option that reads such places; everything else is left to Hydra.
    """
    expanded: list[str] = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key != "model" or not value or "," in value:
            expanded.append(argument)
        elif value.endswith(".gguf"):
            expanded += ["model=gguf", f"model.file={_quoted(value)}"]
        elif Path(value).expanduser().is_dir() or value.startswith(("/", "./", "../", "~")):
            expanded += ["model=folder", f"model.name={_quoted(value)}"]
        elif "/" in value:
            expanded += ["model=hub", f"model.name={_quoted(value)}"]
        else:
            expanded.append(argument)
    return expanded


def expand_test_sets(arguments: list[str]) -> list[str]:
    """Let ``data=[a.txt,b.jsonl.gz]`` name files to measure on; each becomes a test set called after its file.

    What kind of file it is follows from its name and its first bytes, when the configuration is checked.
    """
    expanded: list[str] = []
    names: list[str] = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key != "data" or not value:
            expanded.append(argument)
            continue
        for path in value.removeprefix("[").removesuffix("]").split(","):
            plain = Path(path.strip())
            plain = plain.with_suffix("") if plain.suffix.lower() in COMPRESSIONS else plain
            name = re.sub(r"\W", "_", plain.stem)
            names.append(name)
            number = names.count(name)
            prefix = f"+evaluation.test_sets.{name if number == 1 else f'{name}_{number}'}"
            expanded += [f"{prefix}.kind=auto", f"{prefix}.path={_quoted(path.strip())}"]
    return expanded


def folder_of_model(arguments: list[str]) -> list[str]:
    """Let ``model=`` name the folder of a packed model: in these commands it is a value, not a group of options."""
    return [f"folder={argument[6:]}" if argument.startswith("model=") else argument for argument in arguments]


def without_wandb_argument(arguments: list[str]) -> list[str]:
    """Drop the ``_wandb={…}`` that W&B appends to the command of a trial it starts again; Hydra would refuse it."""
    return [argument for argument in arguments if argument.lstrip("+-").partition("=")[0] != "_wandb"]


def quote_values(arguments: list[str], keys: tuple[str, ...]) -> list[str]:
    """Make the values of ``keys`` plain text for Hydra, whatever signs they hold; in ``PLAIN_TEXT`` also ``null``."""
    split = [argument.partition("=") for argument in arguments]
    return [
        f"{key}={_quoted(value)}" if key in keys and equals and _is_plain(key, value) else key + equals + value
        for key, equals, value in split
    ]


def _is_plain(key: str, value: str) -> bool:
    """Whether the user left it to us to quote a value: not ``null``, and not what they quoted themselves."""
    quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    return key in PLAIN_TEXT or not (value == "null" or quoted)


def _quoted(value: str) -> str:
    """``value`` as a string of Hydra's override grammar, in which spaces and colons have meanings.

    In it a backslash is one, but before a quote or at the end; ``${`` would be replaced by what it names.
    """
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", value)
    escaped = re.sub(r"(\\+)$", r"\1\1", escaped)
    escaped = re.sub(r"(\\*)\$\{", r"\1\1\\${", escaped)
    return f"'{escaped}'"
