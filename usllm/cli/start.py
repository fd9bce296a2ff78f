"""The one way in which commands start: from what the user typed to Hydra."""

from __future__ import annotations

import sys
from collections.abc import Callable

from usllm.cli.command import EXIT_USER_ERROR
from usllm.cli.unknown_keys import nearest_keys_named
from usllm.system.errors import UserError
from usllm.system.plugins import named_in, with_search_path
from usllm.system.renamed_keys import renamed_overrides

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
    arguments, notes = renamed_overrides(typed)
    for note in notes:
        print(f"{program}: note: {note}", file=sys.stderr)
    try:
        # A rank that Lightning has started gets the arguments as they are afterwards.
        found = any(argument.startswith("hydra.searchpath=") for argument in arguments)
        if named_in(arguments) and not found:
            arguments = with_search_path(arguments)
    except UserError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    sys.argv[1:] = prepared(arguments)
    with nearest_keys_named(program):
        entry()
