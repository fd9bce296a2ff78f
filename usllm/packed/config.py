"""The section ``quantization_config`` of a packed model: every number that decides a shape or a hash."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from usllm.packed.layer import CLASS_BYTES, HEADER_BYTES, MAX_DIMENSION, PackedFormatError
from usllm.sketch import SketchConfig
from usllm.sketch.hash import HASH_VERSION

FORMAT_VERSION = 1
QUANT_METHOD = "usllm"
_MAX_BITS_PER_WEIGHT = 64  # sketch and tables of the smallest layers stay far below


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
        for name, layer in layers.items():
            weights = layer.shape[0] * layer.shape[1]
            if not HEADER_BYTES + CLASS_BYTES <= layer.bytes <= _MAX_BITS_PER_WEIGHT * weights // 8 + 64:
                raise PackedFormatError(
                    f"quantization_config.layers.{name}: {layer.bytes} bytes for {layer.shape} are impossible"
                )
        blocks = {
            name: BlockEntry((rows, columns), bits)
            for name, (rows, columns, bits) in _entries(content, "blocks").items()
        }
        for name, entry in blocks.items():
            if entry.bits not in (4, 8) or name in layers:
                raise PackedFormatError(f"quantization_config.blocks.{name}: {entry.bits} bits are not 4 or 8")
        return cls(_sketch(content.get("sketch")), layers, blocks)


def _sketch(given: Any) -> SketchConfig:
    fields = {f.name: f for f in dataclasses.fields(SketchConfig)}
    if not isinstance(given, Mapping) or set(given) != set(fields):
        odd = sorted(set(given) ^ set(fields)) if isinstance(given, Mapping) else _short(given)
        raise PackedFormatError(f"quantization_config.sketch: keys are missing or unknown: {_short(odd)}")
    for name, f in fields.items():
        default = f.default
        fits = (
            isinstance(given[name], (int, float)) if isinstance(default, float) else type(given[name]) is type(default)
        )
        if not fits or isinstance(given[name], bool) is not isinstance(default, bool):
            raise PackedFormatError(f"quantization_config.sketch.{name}={_short(given[name])}: has the wrong type")
    try:
        return SketchConfig(**given)
    except (ValueError, TypeError, OverflowError) as error:
        raise PackedFormatError(f"quantization_config.{str(error).splitlines()[0]}") from error


def _entries(content: Mapping[str, Any], key: str) -> dict[str, tuple[int, int, int]]:
    given = content.get(key)
    if not isinstance(given, Mapping):
        raise PackedFormatError(f"quantization_config.{key}={_short(given)}: must be an object")
    found: dict[str, tuple[int, int, int]] = {}
    for name, values in given.items():
        fits = isinstance(values, (list, tuple)) and len(values) == 3 and all(map(_is_count, values))
        if not isinstance(name, str) or not name or not fits or max(values[:2]) > MAX_DIMENSION:
            raise PackedFormatError(f"quantization_config.{key}.{_short(name)}={_short(values)}: is impossible")
        found[name] = (values[0], values[1], values[2])
    return found


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
