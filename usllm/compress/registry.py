"""Compression methods by name. A new one is a file in ``methods/``, or a plug-in that enters itself."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from usllm.compress import methods
from usllm.compress.base import Compressor
from usllm.system.discovery import module_names
from usllm.system.errors import UserError

METHODS: dict[str, str | type[Compressor]] = {
    name: f"{methods.__name__}.{name}:COMPRESSOR" for name in module_names(methods.__path__)
}
"""Classes, or where they are; looked up when they are asked for. A plug-in puts its class here."""


def method(name: str) -> type[Compressor]:
    """The class of a method.

    Raises:
        UserError: There is no such method.
    """
    found = METHODS.get(name)
    if found is None:
        near = difflib.get_close_matches(str(name), METHODS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(METHODS)}"
        raise UserError(f"sketch.method={name!r} is unknown: {hint} (a plug-in's method needs plugins=[…])")
    if isinstance(found, str):
        module, _, attribute = found.partition(":")
        found = METHODS[name] = getattr(import_module(module), attribute)
    assert not isinstance(found, str)
    return found


def as_compressor(given: Any) -> Compressor:
    """A compressor: itself, or that of the method whose options are given.

    Raises:
        TypeError: ``given`` is neither.
    """
    if isinstance(given, Compressor):
        return given
    for name in METHODS:
        if type(given) is method(name).Options:
            return method(name)(given)
    raise TypeError(f"{type(given).__name__} is neither a compressor nor the options of a method")


def to_section(compressor: Compressor) -> dict[str, Any]:
    """What a checkpoint keeps of a compressor: plain Python."""
    return {
        "method": compressor.method,
        "version": compressor.version,
        "format": compressor.format,
        "options": dataclasses.asdict(compressor.options),
    }


def from_section(section: Mapping[str, Any]) -> Compressor:
    """Inverse of :func:`to_section`, for sections of any origin.

    Raises:
        UserError: The method or its version is unknown.
        ValueError: Its format is impossible.
    """
    found = method(section["method"])
    if section["version"] != found.version:
        raise UserError(
            f"method {found.method}: was stored as version {section['version']}, this version of usllm reads "
            f"{found.version}; upgrade usllm"
        )
    return found.from_format(section["format"], section["options"])


def from_checkpoint_section(section: Mapping[str, Any]) -> Compressor:
    """The compressor of a checkpoint of ``usllm-train``, old ones included, which hold sketches alone.

    Args:
        section: What usllm has written into the checkpoint.

    Raises:
        UserError: The method or its version is unknown, or its format is impossible.
    """
    try:
        if "compressor" in section:
            return from_section(section["compressor"])
        options = method("sketch").Options
        known = {field.name for field in dataclasses.fields(options)}
        return method("sketch")(options(**{key: value for key, value in section["sketch"].items() if key in known}))
    except ValueError as error:
        raise UserError(f"the checkpoint's compression cannot be read: {error}") from error
