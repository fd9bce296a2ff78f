"""The section ``quantization_config`` of a packed model: every number that decides a shape or a hash."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from usllm.sketch import SketchConfig
from usllm.sketch.hash import HASH_VERSION
from usllm.sketch.layer_bytes import CLASS_BYTES, HEADER_BYTES, MAX_DIMENSION
from usllm.system.errors import PackedFormatError

FORMAT_VERSION = 1
QUANT_METHOD = "usllm"
MAX_NAME = 255
"""Characters of a tensor's, module's or weight file's name."""
_NEWER_OPTIONS = ("price_list", "price_exponent")  # of the sketch
_MAX_BITS_PER_WEIGHT = 64  # sketch and tables of the smallest layers stay far below
# A layer of a few bytes could ask for any amount of decoded memory; no sketch keeps less than this.
_MAX_WEIGHTS_PER_BYTE = 1024
_FREE_WEIGHTS = 1 << 20  # small layers may be empty
_NAME = re.compile(r"[\w-]+(\.[\w-]+)*", re.ASCII)


@dataclass(frozen=True)
class PackedLayerEntry:
    """A sketched layer: ``(out, in)`` of its weight, and the bytes it is stored in."""

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
        sketch: The sketch configuration: format constants, and what the plans were made from.
        layers: Sketched layers by module name, which is part of their hash key.
        blocks: Embeddings and linear layers stored in blocks, by module name.
        format_version, hash_version: Of the writer; others than this library's are refused.
    """

    sketch: SketchConfig
    layers: dict[str, PackedLayerEntry]
    blocks: dict[str, BlockEntry] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    hash_version: int = HASH_VERSION

    def to_dict(self) -> dict[str, Any]:
        """JSON types only."""
        return {
            "quant_method": QUANT_METHOD,
            "format_version": self.format_version,
            "hash_version": self.hash_version,
            "sketch": dataclasses.asdict(self.sketch),
            "layers": {name: [*entry.shape, entry.bytes] for name, entry in self.layers.items()},
            "blocks": {name: [*entry.shape, entry.bits] for name, entry in self.blocks.items()},
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> PackedConfig:
        """Inverse of :meth:`to_dict`, for content of any origin.

        Raises:
            PackedFormatError: A version is unknown, a key is missing, or a value is impossible; named.
        """
        if not isinstance(content, Mapping) or content.get("quant_method") != QUANT_METHOD:
            raise PackedFormatError(f"quantization_config: is not that of a packed usllm model: {_short(content)}")
        for key, known in (("format_version", FORMAT_VERSION), ("hash_version", HASH_VERSION)):
            if not _is_count(content.get(key)) or content[key] != known:
                raise PackedFormatError(
                    f"quantization_config.{key}={_short(content.get(key))}: this version of usllm reads {known}; "
                    "upgrade usllm to read the model"
                )
        layers = {
            name: PackedLayerEntry((rows, columns), size)
            for name, (rows, columns, size) in _entries(content, "layers").items()
        }
        if not layers:
            raise PackedFormatError("quantization_config.layers: names no sketched layer")
        for name, layer in layers.items():
            weights = layer.shape[0] * layer.shape[1]
            sparse = weights > max(_MAX_WEIGHTS_PER_BYTE * layer.bytes, _FREE_WEIGHTS)
            if sparse or not HEADER_BYTES + CLASS_BYTES <= layer.bytes <= _MAX_BITS_PER_WEIGHT * weights // 8 + 64:
                raise PackedFormatError(
                    f"quantization_config.layers.{name}: {layer.bytes} bytes for {layer.shape} are impossible"
                )
        blocks = {
            name: BlockEntry((rows, columns), bits)
            for name, (rows, columns, bits) in _entries(content, "blocks").items()
        }
        for name, entry in blocks.items():
            if entry.bits not in (4, 8):
                raise PackedFormatError(f"quantization_config.blocks.{name}: {entry.bits} bits are not 4 or 8")
            if name in layers:
                raise PackedFormatError(f"quantization_config.blocks.{name}: is among the sketched layers too")
        return cls(_sketch(content.get("sketch")), layers, blocks)


def _sketch(given: Any) -> SketchConfig:
    fields = {f.name: f for f in dataclasses.fields(SketchConfig)}
    if isinstance(given, Mapping):  # options of later versions, that folders of earlier ones lack
        given = {name: fields[name].default for name in _NEWER_OPTIONS} | dict(given)
    if not isinstance(given, Mapping) or set(given) != set(fields):
        odd = sorted(set(given) ^ set(fields)) if isinstance(given, Mapping) else _short(given)
        raise PackedFormatError(f"quantization_config.sketch: keys are missing or unknown: {_short(odd)}")
    for name, f in fields.items():
        default = f.default
        fits = _is_number(given[name]) if isinstance(default, float) else type(given[name]) is type(default)
        if not fits or isinstance(given[name], bool) is not isinstance(default, bool):
            raise PackedFormatError(f"quantization_config.sketch.{name}={_short(given[name])}: has the wrong type")
    try:
        return SketchConfig(**given)
    except (ValueError, TypeError, OverflowError) as error:
        raise PackedFormatError(f"quantization_config.{str(error).splitlines()[0][:200]}") from error


def _entries(content: Mapping[str, Any], key: str) -> dict[str, tuple[int, int, int]]:
    given = content.get(key)
    if not isinstance(given, Mapping):
        raise PackedFormatError(f"quantization_config.{key}={_short(given)}: must be an object")
    found: dict[str, tuple[int, int, int]] = {}
    for name, values in given.items():
        fits = isinstance(values, (list, tuple)) and len(values) == 3 and all(map(_is_count, values))
        if not fits or not is_name(name) or max(values[:2]) > MAX_DIMENSION:
            raise PackedFormatError(f"quantization_config.{key}.{_short(name)}={_short(values)}: is impossible")
        found[name] = (values[0], values[1], values[2])
    return found


def is_name(name: Any) -> bool:
    """Whether this is a module's or tensor's name: ASCII words joined by dots; nothing that a terminal would obey."""
    return isinstance(name, str) and len(name) <= MAX_NAME and _NAME.fullmatch(name) is not None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 1 << 53)


def _short(value: Any) -> str:
    try:
        text = ascii(value)
    except (RecursionError, ValueError):  # nested too deep, or a number too long to print
        text = type(value).__name__
    return text if len(text) <= 80 else f"{text[:77]}…"
