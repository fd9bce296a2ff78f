"""The section ``quantization_config`` of a packed model: every number that decides a shape or a hash."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from usllm.compress import METHODS, Compressor
from usllm.compress import method as method_called
from usllm.packed.plain import check_version, shorten
from usllm.packed.version_1 import from_version_1, to_version_1
from usllm.sketch.layer_bytes import MAX_DIMENSION
from usllm.system.errors import PackedFormatError

FORMAT_VERSION = 2
"""Of what is written. Version 1 is read too: it knows the sketch only and has no checksums beside the layers' own."""
QUANT_METHOD = "usllm"
MAX_NAME = 255
"""Characters of a tensor's, module's or weight file's name."""
_KEYS = {
    *("quant_method", "format_version", "method", "method_version", "format", "options", "layers", "blocks", "plugin"),
}
# A layer of a few bytes could ask for any amount of decoded memory; no sketch keeps less than this.
_MAX_WEIGHTS_PER_BYTE = 1024
_FREE_WEIGHTS = 1 << 20  # small layers may be empty
_NAME = re.compile(r"[\w-]+(\.[\w-]+)*", re.ASCII)


@dataclass(frozen=True)
class PackedLayerEntry:
    """A compressed layer: ``(out, in)`` of its weight, and the bytes it is stored in."""

    shape: tuple[int, int]
    bytes: int


@dataclass(frozen=True)
class BlockEntry:
    """A weight stored in blocks of 32 numbers: ``(rows, columns)``, and bits a number (8 or 4) without the scales."""

    shape: tuple[int, int]
    bits: int


@dataclass(frozen=True)
class PackedConfig:
    """What a packed model's configuration says about its tensors.

    Attributes:
        compressor: The method and its configuration. Of a folder that was read, its format constants only: what else
            it holds are defaults.
        layers: Compressed layers by module name, which is part of a sketch's hash keys.
        blocks: Embeddings and linear layers stored in blocks, by module name.
        options: How the bytes came about, as the writer recorded it; keys that this version does not know are kept.
            ``None`` takes those of ``compressor``.
        plugin: Dotted name of the module that brings the method; ``None`` for usllm's own.
        format_version: Of the folder.
    """

    compressor: Compressor
    layers: dict[str, PackedLayerEntry]
    blocks: dict[str, BlockEntry] = field(default_factory=dict)
    options: Mapping[str, Any] | None = None
    plugin: str | None = None
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if self.options is None:
            options = asdict(self.compressor.options)
            kept = {key: value for key, value in options.items() if key not in self.compressor.format}
            object.__setattr__(self, "options", kept)
        if self.plugin is None:
            module = type(self.compressor).__module__
            object.__setattr__(self, "plugin", None if module.partition(".")[0] == "usllm" else module)

    @property
    def method(self) -> str:
        """Name of the compression method."""
        return self.compressor.method

    @property
    def format(self) -> dict[str, Any]:
        """What gives the bytes of the layers their meaning, JSON types."""
        return self.compressor.format

    def upgraded(self) -> PackedConfig:
        """The same tensors in the version that is written."""
        return replace(self, format_version=FORMAT_VERSION)

    def to_dict(self) -> dict[str, Any]:
        """JSON types only, in the layout of ``format_version``."""
        content: dict[str, Any] = {"quant_method": QUANT_METHOD, "format_version": self.format_version}
        options = dict(self.options or {})
        if self.format_version == 1:
            content |= to_version_1(self.format, options)
        else:
            version = self.compressor.version
            content |= {"method": self.method, "method_version": version, "format": self.format, "options": options}
            if self.plugin is not None:
                content["plugin"] = self.plugin
        return content | {
            "layers": {name: [*entry.shape, entry.bytes] for name, entry in self.layers.items()},
            "blocks": {name: [*entry.shape, entry.bits] for name, entry in self.blocks.items()},
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> PackedConfig:
        """Inverse of :meth:`to_dict`, for content of any origin.

        Raises:
            PackedFormatError: A version or method is unknown, a key is missing or unknown, or a value is impossible;
                named.
        """
        if not isinstance(content, Mapping) or content.get("quant_method") != QUANT_METHOD:
            raise PackedFormatError(
                f"quantization_config: is not that of a packed usllm model: {shorten(content)}; give a folder that "
                "usllm-export has written in the form packed (others are for transformers and llama.cpp)"
            )
        version = content.get("format_version")
        if type(version) is not int or version not in range(1, FORMAT_VERSION + 1):
            raise PackedFormatError(
                f"quantization_config.format_version={shorten(version)}: this version of usllm reads 1 to "
                f"{FORMAT_VERSION}; upgrade usllm to read the model"
            )
        if version == 1:
            content = {key: content.get(key) for key in ("layers", "blocks")} | from_version_1(content)
        elif odd := sorted(set(content) - _KEYS, key=str):
            raise PackedFormatError(
                f"quantization_config.{shorten(odd[0])}: is unknown; upgrade usllm to read the model"
            )
        plugin, options = content.get("plugin"), content.get("options")
        if plugin is not None and not is_name(plugin):
            raise PackedFormatError(f"quantization_config.plugin={shorten(plugin)}: is no name of a package")
        if not isinstance(options, Mapping):
            raise PackedFormatError(f"quantization_config.options={shorten(options)}: must be an object")
        method = _method(content.get("method"), plugin)
        section = "sketch" if version == 1 else "format"
        constants = content.get("format")
        if not isinstance(constants, Mapping):
            raise PackedFormatError(f"quantization_config.format={shorten(constants)}: must be an object")
        try:
            check_version("method_version", content.get("method_version"), method.version)
        except ValueError as error:
            raise PackedFormatError(f"quantization_config.{error}") from error
        try:
            compressor = method.from_format(constants, {})
        except ValueError as error:
            raise PackedFormatError(f"quantization_config.{section}.{_first_line(error)}") from error
        layers = _layers(content, compressor.byte_bounds)
        return cls(compressor, layers, _blocks(content, layers), dict(options), plugin, version)


def _method(name: Any, plugin: str | None) -> type[Compressor]:
    """The method that a folder names, if it is registered; a plug-in that brings it is told, never imported."""
    if isinstance(name, str) and name in METHODS:
        return method_called(name)
    way_out = "upgrade usllm to read the model"
    if plugin is not None:
        way_out = f"it comes with the plug-in {plugin}: if you trust that package, install it and import it first"
    raise PackedFormatError(f"quantization_config.method={shorten(name)}: is not among {', '.join(METHODS)}; {way_out}")


def _first_line(error: ValueError) -> str:
    return str(error).splitlines()[0][:200].removeprefix("sketch.").removeprefix("format.").removeprefix("format: ")


def _layers(
    content: Mapping[str, Any], byte_bounds: Callable[[tuple[int, int]], tuple[int, int]]
) -> dict[str, PackedLayerEntry]:
    layers = {
        name: PackedLayerEntry((rows, columns), size)
        for name, (rows, columns, size) in _entries(content, "layers").items()
    }
    if not layers:
        raise PackedFormatError("quantization_config.layers: names no compressed layer")
    for name, layer in layers.items():
        sparse = layer.shape[0] * layer.shape[1] > max(_MAX_WEIGHTS_PER_BYTE * layer.bytes, _FREE_WEIGHTS)
        least, most = byte_bounds(layer.shape)
        if sparse or not least <= layer.bytes <= most:
            raise PackedFormatError(
                f"quantization_config.layers.{name}: {layer.bytes} bytes for {layer.shape} are impossible"
            )
    return layers


def _blocks(content: Mapping[str, Any], layers: Mapping[str, Any]) -> dict[str, BlockEntry]:
    blocks = {
        name: BlockEntry((rows, columns), bits) for name, (rows, columns, bits) in _entries(content, "blocks").items()
    }
    for name, entry in blocks.items():
        if entry.bits not in (4, 8):
            raise PackedFormatError(f"quantization_config.blocks.{name}: {entry.bits} bits are not 4 or 8")
        if name in layers:
            raise PackedFormatError(f"quantization_config.blocks.{name}: is among the compressed layers too")
    return blocks


def _entries(content: Mapping[str, Any], key: str) -> dict[str, tuple[int, int, int]]:
    given = content.get(key)
    if not isinstance(given, Mapping):
        raise PackedFormatError(f"quantization_config.{key}={shorten(given)}: must be an object")
    found: dict[str, tuple[int, int, int]] = {}
    for name, values in given.items():
        fits = isinstance(values, (list, tuple)) and len(values) == 3 and all(map(_is_count, values))
        if not fits or not is_name(name) or max(values[:2]) > MAX_DIMENSION:
            raise PackedFormatError(f"quantization_config.{key}.{shorten(name)}={shorten(values)}: is impossible")
        found[name] = (values[0], values[1], values[2])
    return found


def is_name(name: Any) -> bool:
    """Whether this is a module's or tensor's name: ASCII words joined by dots; nothing that a terminal would obey."""
    return isinstance(name, str) and len(name) <= MAX_NAME and _NAME.fullmatch(name) is not None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
