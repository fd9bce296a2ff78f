"""The compression methods whose bytes a packed folder can hold, and what each asks of ``quantization_config``.

The one place of the packed format that knows which configuration a method's section belongs to.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from usllm.sketch import SketchConfig
from usllm.sketch.hash import HASH_VERSION
from usllm.sketch.layer_bytes import CLASS_BYTES, HEADER_BYTES
from usllm.system.errors import PackedFormatError

_MAX_BITS_PER_WEIGHT = 64  # sketch and tables of the smallest layers stay far below


class PackedMethod(ABC):
    """A method's section of ``quantization_config``.

    Attributes:
        name: Value of ``method``.
        version: Of the section and of the bytes of a layer; readers refuse others.
        config_type: Type of the method's configuration.
        plugin: Dotted name of the package that brings the method; ``None`` for those of usllm.
    """

    name: ClassVar[str]
    version: ClassVar[int]
    config_type: ClassVar[type]
    plugin: ClassVar[str | None] = None

    @abstractmethod
    def format(self, config: Any) -> dict[str, Any]:
        """What gives the stored bytes their meaning; JSON types."""

    @abstractmethod
    def options(self, config: Any) -> dict[str, Any]:
        """How the bytes came about; JSON types. No reader needs it."""

    @abstractmethod
    def config(self, section: Mapping[str, Any]) -> Any:
        """Inverse of :meth:`format`, for a section of any origin.

        Raises:
            ValueError: A key is missing, unknown or impossible; the message begins with the key.
        """

    @abstractmethod
    def byte_bounds(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Fewest and most bytes of a layer ``(out, in)``, asked before anything is read."""


class PackedSketch(PackedMethod):
    """The data sketch: :class:`usllm.sketch.SketchConfig`."""

    name = "sketch"
    version = 1
    config_type = SketchConfig
    _keys = ("operator", "query", "hash", "group_size", "output_scale", "seed")
    _options_of_version_1 = (
        *("bits_per_weight", "rows", "state_bits", "rounding", "allocation", "layer_budget", "min_importance"),
    )

    def format(self, config: SketchConfig) -> dict[str, Any]:
        """The keys that a reader of the bytes needs."""
        return {"hash_version": HASH_VERSION} | {key: getattr(config, key) for key in self._keys}

    def options(self, config: SketchConfig) -> dict[str, Any]:
        """The other keys: what the plans were made from."""
        return {key: value for key, value in dataclasses.asdict(config).items() if key not in self._keys}

    def config(self, section: Mapping[str, Any]) -> SketchConfig:
        """The configuration with these format constants and the default options."""
        known = ("hash_version", *self._keys)
        if missing := [key for key in known if key not in section]:
            raise ValueError(f"{missing[0]}: is missing")
        if unknown := [key for key in section if key not in known]:
            raise ValueError(f"{shorten(unknown[0])}: is unknown; upgrade usllm to read the model")
        check_version("hash_version", section["hash_version"], HASH_VERSION)
        given = {key: section[key] for key in self._keys}
        for f in dataclasses.fields(SketchConfig):
            if f.name in given and type(given[f.name]) is not type(f.default):
                raise ValueError(f"{f.name}={shorten(given[f.name])}: has the wrong type")
        try:
            return SketchConfig(**given)
        except (ValueError, OverflowError) as error:
            raise ValueError(str(error).splitlines()[0][:200].removeprefix("sketch.")) from error

    def byte_bounds(self, shape: tuple[int, int]) -> tuple[int, int]:
        """A header and one class at least."""
        return HEADER_BYTES + CLASS_BYTES, _MAX_BITS_PER_WEIGHT * shape[0] * shape[1] // 8 + 64

    def from_version_1(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """``method``, ``format`` and ``options`` of a ``quantization_config`` of format version 1, all a sketch's.

        Raises:
            PackedFormatError: A key is missing or unknown; named.
        """
        section, known = content.get("sketch"), {*self._keys, *self._options_of_version_1}
        if not isinstance(section, Mapping) or set(section) != known:
            odd = sorted(set(section) ^ known) if isinstance(section, Mapping) else section
            raise PackedFormatError(f"quantization_config.sketch: keys are missing or unknown: {shorten(odd)}")
        try:
            check_version("hash_version", content.get("hash_version"), HASH_VERSION)
        except ValueError as error:
            raise PackedFormatError(f"quantization_config.{error}") from error
        kept = {"hash_version": HASH_VERSION} | {key: section[key] for key in self._keys}
        options = {key: section[key] for key in self._options_of_version_1}
        return {"method": self.name, "method_version": self.version, "format": kept, "options": options}

    def to_version_1(self, kept: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
        """Inverse of :meth:`from_version_1`."""
        sketch = {key: value for key, value in kept.items() if key != "hash_version"}
        return {"hash_version": kept["hash_version"], "sketch": sketch | dict(options)}


SKETCH = PackedSketch()
METHODS: dict[str, PackedMethod] = {method.name: method for method in (SKETCH,)}
"""By the name that stands in ``quantization_config.method``."""


def method_of(config: Any) -> PackedMethod:
    """The method that a configuration belongs to."""
    return next(method for method in METHODS.values() if isinstance(config, method.config_type))


def method_named(name: Any, plugin: str | None) -> PackedMethod:
    """The method of a folder.

    Args:
        name: As the folder names it.
        plugin: Package that brings it, as the folder names it. It is told to the user, never imported.

    Raises:
        PackedFormatError: It is not registered.
    """
    method = METHODS.get(name) if isinstance(name, str) else None
    if method is None:
        way_out = "upgrade usllm to read the model"
        if plugin is not None:
            way_out = f"it comes with the plug-in {plugin}: if you trust that package, install it and import it first"
        raise PackedFormatError(
            f"quantization_config.method={shorten(name)}: is not among {', '.join(METHODS)}; {way_out}"
        )
    return method


def check_version(key: str, given: Any, known: int) -> None:
    """Refuse a version of the format that this version of usllm does not read.

    Raises:
        ValueError: It is not ``known``; the message begins with ``key``.
    """
    if type(given) is not int or given != known:
        raise ValueError(
            f"{key}={shorten(given)}: this version of usllm reads {known}; upgrade usllm to read the model"
        )


def shorten(value: Any) -> str:
    """A value of any origin as printable ASCII of at most 80 characters."""
    try:
        text = ascii(value)
    except (RecursionError, ValueError):  # nested too deep, or a number too long to print
        text = type(value).__name__
    return text if len(text) <= 80 else f"{text[:77]}…"
