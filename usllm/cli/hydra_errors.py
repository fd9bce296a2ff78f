"""One line for what Hydra has to say about a command line, in place of its paragraphs and its status 1.

Hydra prints its errors itself and leaves (:func:`hydra._internal.utils.run_and_report`); there is no hook, so that this
one function is replaced while a command runs. An error of the command's own work passes through as it was.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from typing import Any

import hydra._internal.utils as hydra_utils
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import InterpolationKeyError, InterpolationResolutionError

from usllm.cli.command import SweepJobFailed, leave_if_nobody_reads
from usllm.cli.unknown_keys import about_unknown_keys
from usllm.system.errors import RunError, UserError, no_space

_WORK = (("usllm.cli.command", "report_errors"), ("hydra.core.utils", "return_value"))
"""Modules and functions that an error of a job passes through, here or handed over from another process."""
_EXTRAS = {"joblib": "sweep", "submitit": "sweep", "optuna": "sweep", "ray": "ray"}
"""By the name of a plug-in of Hydra: the extra of usllm that installs it."""


@contextlib.contextmanager
def hydra_errors_in_one_line(program: str) -> Iterator[None]:
    """Where the block, one of Hydra's mains, fails over what was typed: raise that as a UserError of one line.

    A job of a sweep that has failed, and said why, ends the program with its status.

    Args:
        program: the name of the command, which is that of its configuration with ``usllm-`` before it.
    """
    ordinary = hydra_utils.run_and_report
    hydra_utils.run_and_report = _call  # errors come out here, after Hydra has cleaned up
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        if isinstance(error, SweepJobFailed):
            sys.exit(error.status)
        leave_if_nobody_reads(error)
        if (found := explanation(error, program)) is not None:
            raise found from error
        ordinary(functools.partial(_raise, error))  # without the frames of Hydra
    finally:
        hydra_utils.run_and_report = ordinary


def _call(func: Callable[[], Any]) -> Any:
    return func()


def _raise(error: Exception) -> None:
    raise error


def explanation(error: Exception, program: str) -> UserError | None:
    """What to raise instead of an error of Hydra's; ``None`` where it is of the work that Hydra was to start."""
    frames = [
        (frame.f_globals.get("__name__"), frame.f_code.co_name) for frame, _ in traceback.walk_tb(error.__traceback__)
    ]
    if any(place in frames for place in _WORK):
        return None
    arguments = [word for word in sys.argv[1:] if "=" in word and not word.startswith("-")]
    if isinstance(error, OSError) and not isinstance(error, HydraException):
        kind = RunError if no_space(error) else UserError
        return kind(f"run_dir: cannot be made ({error}); choose another run_dir or output_root")
    return UserError(_line(error, program, arguments))


def _line(error: Exception, program: str, arguments: Sequence[str]) -> str:
    message = str(error)
    if isinstance(error, OverrideParseException):
        return _unparsed(error)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file is not None:
        return _missing_option(error, arguments)
    if (plugin := re.search(r"hydra_plugins\.hydra_([a-z]+)", message)) is not None:
        return _missing_plugin(plugin[1], arguments)
    if "Could not override" in message:
        with contextlib.suppress(Exception):  # what Hydra has said is right, too
            if lines := about_unknown_keys(program.removeprefix("usllm-"), arguments):
                return lines[0] if len(lines) == 1 else "\n".join(("", *(f"  - {line}" for line in lines)))
    if (several := re.match(r"Ambiguous value for argument '(.*)'", message)) is not None:
        key, _, value = several[1].partition("=")
        return f"{key}={value}: several values are a sweep: add -m; or, if it is one text, pass \"{key}='{value}'\""
    if (swept := re.match(r"Sweep parameters '(.*)' requires", message)) is not None:
        return f"{swept[1]}: is a range of a sweep: add -m"
    if isinstance(error, ValueError | TypeError) and (line := _no_option(arguments)) is not None:
        return line
    if isinstance(error, InterpolationKeyError | InterpolationResolutionError):
        holders = " ".join(argument for argument in arguments if "${" in argument) or "the configuration"
        return f"{holders}: {message.splitlines()[0]}; give a key that there is, or \\${{ for the characters themselves"
    cause = str(error.__cause__).splitlines()[:1] if isinstance(error, HydraException) and error.__cause__ else []
    return ". ".join(line.strip().rstrip(".") for line in (*message.splitlines(), *cause) if line.strip())


def _unparsed(error: OverrideParseException) -> str:
    if "=" not in error.override:
        return f"{error.override}: settings are given as key=value, without spaces around =, such as experiment=demo"
    return f"{error.override}: cannot be read as key=value; put quotes around a text, as in \"name='a text'\""


def _missing_option(error: MissingConfigException, arguments: Sequence[str]) -> str:
    group, _, option = str(error.missing_cfg_file).rpartition("/")
    if group in ("hydra/launcher", "hydra/sweeper") and (plugin := option.partition("_")[0]) in _EXTRAS:
        return _missing_plugin(plugin, arguments)
    options = [name for name in error.options or options_of(group) if name != "base"]
    if not group or not options:
        return str(error).splitlines()[0]
    if not option:
        return f"{group}=: needs a value; choose one of {', '.join(options)}"
    near = difflib.get_close_matches(option, options, n=1)
    hint = f"did you mean {group}={near[0]}? There are" if near else "choose one of"
    places = "; a folder, a .gguf file and owner/name on the hub serve too" if group == "model" else ""
    return f"{group}={option}: there is no such option; {hint} {', '.join(options)}{places}"


def _missing_plugin(plugin: str, arguments: Sequence[str]) -> str:
    typed = [word for word in arguments if word.startswith(("hydra/launcher=", "hydra/sweeper="))]
    extra = _EXTRAS.get(plugin)
    install = f"pip install 'usllm[{extra}]'" if extra else f"pip install hydra-{plugin}-launcher"
    return f"{' '.join(typed) or plugin}: needs a plug-in of Hydra that is not installed; {install}"


def _no_option(arguments: Sequence[str]) -> str | None:
    """What to say about the first argument that gives a group something else than names of options."""
    parser = OverridesParser.create()
    for argument in arguments:
        override = parser.parse_override(argument)
        group, value = override.key_or_group, override.value()
        if not group:
            return f"{argument}: has no key; settings are given as key=value"
        named = isinstance(value, list) and all(isinstance(name, str) for name in value)
        if override.is_sweep_override() or isinstance(value, str) or named or not (options := options_of(group)):
            continue
        return f"{argument}: needs the name of an option; choose one of {', '.join(options)}"
    return None


def options_of(group: str) -> list[str]:
    """Names of the options of a group of ``conf``; none where there is no such group."""
    folder = files("usllm.conf").joinpath(group)
    if not group or not folder.is_dir():
        return []
    names = sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))
    return [name for name in names if name != "base"]
