"""Plug-ins: modules of the user's own that register methods, rules, stages, operators or kernels when imported.

They are named on the command line (``plugins=[my_package.my_method]``) and imported by every process of a run. A module
is never imported because a file names it: a model folder or a checkpoint only says which one it would need.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path

from usllm.system.errors import UserError, first_line

KEY = "plugins"
_OWN_CONF = "usllm.conf"


def import_plugins(names: Iterable[str]) -> None:
    """Import each module, once; what it registers can be chosen from then on.

    Raises:
        UserError: There is no such module, or it fails; names it and says why.
    """
    for name in names:
        try:
            importlib.import_module(str(name))
        except Exception as error:  # whatever the user's module raises
            missing = error.name if isinstance(error, ModuleNotFoundError) else None
            if missing and f"{name}.".startswith(f"{missing}."):
                raise UserError(
                    f"{KEY}={name}: cannot be imported ({first_line(error)}); give the dotted name of an installed "
                    "module, or put the folder that holds it on PYTHONPATH"
                ) from error
            raise UserError(f"{KEY}={name}: fails while it is imported: {first_line(error)}") from error


def unknown_name(key: str, value: object, known: Iterable[str], kind: str) -> str:
    """One line about a name that is in no table, which a plug-in may fill.

    Args:
        key: Of the configuration.
        value: That it was given.
        known: Names in the table.
        kind: What they name, such as ``operator``.
    """
    return f"{key}={value!r} is unknown: choose one of {', '.join(known)} (a plug-in's {kind} needs {KEY}=[…])"


def named_in(arguments: Sequence[str]) -> list[str]:
    """The modules that ``plugins=[…]`` among a command's overrides names."""
    names: list[str] = []
    for value in (argument.partition("=")[2] for argument in arguments if _names_plugins(argument)):
        names = [part.strip(" '\"") for part in value.strip().removeprefix("[").removesuffix("]").split(",")]
    return [name for name in names if name]


def _names_plugins(argument: str) -> bool:
    key, equals, _ = argument.partition("=")
    return bool(equals) and key.lstrip("+") == KEY


def with_search_path(arguments: Sequence[str]) -> list[str]:
    """Overrides of a command with the ``conf`` folders of its plug-ins on Hydra's search path; imports the plug-ins.

    A plug-in's configuration lies in the package ``conf`` beside it: ``my_package.my_method`` and ``my_package`` both
    bring ``my_package.conf``.

    The override stands behind ``plugins=[…]``: overrides that a flag separates are not Hydra's grammar.

    Raises:
        UserError: A plug-in cannot be imported, or a file of its configuration has the name of another one.
    """
    names = named_in(arguments)
    import_plugins(names)
    packages = []
    for name in names:
        module = importlib.import_module(name)
        package = name if hasattr(module, "__path__") else name.rpartition(".")[0]
        if package and importlib.util.find_spec(f"{package}.conf") is not None:
            packages.append(f"{package}.conf")
    packages = list(dict.fromkeys(packages))
    if not packages:
        return list(arguments)
    _refuse_hidden([_OWN_CONF, *packages])
    place = max(number for number, argument in enumerate(arguments) if _names_plugins(argument)) + 1
    search_path = f"hydra.searchpath=[{','.join(f'pkg://{package}' for package in packages)}]"
    return [*arguments[:place], search_path, *arguments[place:]]


def _refuse_hidden(packages: Sequence[str]) -> None:
    """Refuse a file that Hydra would never read, as a package before it on the search path has one of its name.

    Raises:
        UserError: Names the file and the other package.
    """
    owners: dict[str, str] = {}
    for package in packages:
        for name in _option_files(package):
            if owners.setdefault(name, package) != package:
                raise UserError(
                    f"{KEY}: {name} of {package} would not be read, {owners[name]} has a file of that name: rename it"
                )


def _option_files(package: str) -> list[str]:
    """YAML files of a package of configuration, such as ``sketch/mean.yaml``."""
    spec = importlib.util.find_spec(package)
    folders = [] if spec is None else [Path(place) for place in spec.submodule_search_locations or ()]
    return sorted(path.relative_to(folder).as_posix() for folder in folders for path in folder.rglob("*.yaml"))
