"""Plug-ins: modules of the user's own that register methods, rules, stages, operators or kernels when imported.

They are named on the command line (``plugins=[my_package.my_method]``) and imported by every process of a run. A module
is never imported because a file names it: a model folder or a checkpoint only says which one it would need.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable, Sequence

from usllm.system.errors import UserError, first_line

KEY = "plugins"


def import_plugins(names: Iterable[str]) -> None:
    """Import each module, once; what it registers can be chosen from then on.

    Raises:
        UserError: There is no such module, or it fails; names it and says why.
    """
    for name in names:
        try:
            importlib.import_module(str(name))
        except Exception as error:  # whatever the user's module raises
            raise UserError(
                f"{KEY}={name}: cannot be imported ({first_line(error)}); give the dotted name of an installed module, "
                "or put its folder on PYTHONPATH"
            ) from error


def named_in(arguments: Sequence[str]) -> list[str]:
    """The modules that ``plugins=[…]`` among a command's overrides names."""
    names: list[str] = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals and key.lstrip("+") == KEY:
            names = [part.strip(" '\"") for part in value.strip().removeprefix("[").removesuffix("]").split(",")]
    return [name for name in names if name]


def with_search_path(arguments: Sequence[str]) -> list[str]:
    """Overrides of a command with the ``conf`` folders of its plug-ins on Hydra's search path; imports the plug-ins.

    A plug-in's configuration lies in the package ``conf`` beside it: ``my_package.my_method`` and ``my_package`` both
    bring ``my_package.conf``.

    Raises:
        UserError: A plug-in cannot be imported.
    """
    names = named_in(arguments)
    import_plugins(names)
    places = []
    for name in names:
        module = importlib.import_module(name)
        package = name if hasattr(module, "__path__") else name.rpartition(".")[0]
        if package and importlib.util.find_spec(f"{package}.conf") is not None:
            places.append(f"pkg://{package}.conf")
    if not places:
        return list(arguments)
    return [*arguments, f"hydra.searchpath=[{','.join(dict.fromkeys(places))}]"]
