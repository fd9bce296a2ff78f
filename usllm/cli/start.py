"""The one way in which commands start: from what the user typed to Hydra."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from hydra._internal.utils import get_args_parser

from usllm.cli.arguments import readable
from usllm.cli.command import interrupted
from usllm.cli.hydra_errors import hydra_errors_in_one_line
from usllm.system.errors import UserError
from usllm.system.plugins import named_in, with_search_path
from usllm.system.renamed_keys import renamed_overrides
from usllm.system.version import VERSION

typed: list[str] = []
"""The arguments as the user gave them, for reports, cards and pages."""


def start(program: str, entry: Callable[[], object], prepared: Callable[[list[str]], list[str]]) -> None:
    """Bring ``sys.argv`` into the form that Hydra reads, and call one of its mains.

    Keys that have other names now are taken under these, with a line on stderr. Plug-ins are imported, so that their
    configuration is found.

    Args:
        program: Name of the command.
        entry: The main.
        prepared: What the command itself makes of its arguments, such as quotes around paths.
    """
    typed[:] = sys.argv[1:]
    if "--version" in typed:
        print(f"{program} {VERSION}")
        sys.exit(0)
    try:
        check_options(typed)
        arguments, notes = renamed_overrides(typed)
        for note in notes:
            print(f"{program}: note: {note}", file=sys.stderr)
        # A rank that Lightning has started gets the arguments as they are afterwards.
        found = any(argument.startswith("hydra.searchpath=") for argument in arguments)
        if named_in(arguments) and not found:
            arguments = with_search_path(arguments)
        sys.argv[1:] = readable(prepared(arguments))
        with hydra_errors_in_one_line(program):
            entry()
    except UserError as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        print(f"{program}: error: {error}", file=sys.stderr)
        sys.exit(error.status)
    except KeyboardInterrupt:  # before the command's own work, such as while libraries are imported
        interrupted(program)


def check_options(arguments: Sequence[str]) -> None:
    """Refuse words with dashes that Hydra does not know; it would take the beginning of an option for the whole.

    Raises:
        UserError: names the word and, where it is one, the setting that it was meant to be.
    """
    parser = get_args_parser()
    parser.allow_abbrev = False

    def refuse(message: str) -> None:
        unknown = message.removeprefix("unrecognized arguments: ").split()
        if unknown == message.split():
            raise UserError(f"{message}; --hydra-help describes all options")
        word = unknown[0]
        if not word.startswith("-"):
            raise UserError(
                f"{' '.join(unknown)}: options such as -m stand before the first or after the last key=value"
            )
        name, equals, value = word.lstrip("-").partition("=")
        following = arguments[arguments.index(word) + 1 :] if word in arguments else ()
        meant = value if equals else next((next_one for next_one in following[:1] if "=" not in next_one), "…")
        raise UserError(f"{word}: there is no such option; settings are given as key=value: {name}={meant}")

    parser.error = refuse  # type: ignore[method-assign, assignment]
    parser.parse_args(list(arguments))
