"""Tables that fill themselves: the modules of a folder, so that adding one is adding a file."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable
from typing import Any


def module_names(path: Iterable[str]) -> list[str]:
    """Names of the modules and packages in a package, sorted, without importing them.

    Args:
        path: The package's ``__path__``.
    """
    return sorted(module.name for module in pkgutil.iter_modules(path))


def modules_with(package: str, path: Iterable[str], attribute: str) -> dict[str, Any]:
    """The modules of a package that have an attribute, by name; imports all of them. Arguments as below."""
    modules = {name: importlib.import_module(f"{package}.{name}") for name in module_names(path)}
    return {name: module for name, module in modules.items() if hasattr(module, attribute)}


def attributes(package: str, path: Iterable[str], attribute: str) -> dict[str, Any]:
    """The attribute of each module in a package that has it, by the module's name; imports all of them.

    Args:
        package: The package's ``__name__``.
        path: Its ``__path__``.
        attribute: What a module must have in order to be in the table.
    """
    return {name: getattr(module, attribute) for name, module in modules_with(package, path, attribute).items()}
