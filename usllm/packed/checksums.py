"""Checksums of what a packed folder computes with: each tensor, and each key that gives tensors their meaning.

They stand in the header of every weight file (safetensors' metadata): both majors of transformers write there what a
quantizer hands them, so a model that is loaded and saved gets new ones. A checksum is a CRC-32: against accidents and
mix-ups, not against a forger, who would make them right.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from usllm.packed.config import PackedConfig, is_name
from usllm.packed.plain import shorten
from usllm.system.errors import PackedFormatError

METADATA = "usllm"
"""Key of the weight files' metadata."""
SECTION = "quantization_config"
# Changing them leaves every number that the model computes as it is.
_WITHOUT_EFFECT = {
    *("transformers_version", "_name_or_path", "use_cache", "attn_implementation", "_attn_implementation"),
    *("experts_implementation", "bos_token_id", "eos_token_id", "pad_token_id", "options", "plugin"),
}
_TYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class Checksums:
    """What the header of a weight file says about the folder.

    Attributes:
        tensors: CRC-32 by tensor name (:func:`of_tensor`), of this file's tensors at least.
        keys: CRC-32 by key of ``config.json`` (:func:`of_keys`).
        meaning: The model as the writer's transformers understood it (:mod:`usllm.packed.meaning`).
    """

    tensors: Mapping[str, int]
    keys: Mapping[str, int]
    meaning: Mapping[str, Any]

    def to_metadata(self) -> dict[str, str]:
        """As safetensors stores it."""
        content = {"tensors": dict(self.tensors), "keys": dict(self.keys), "meaning": dict(self.meaning)}
        return {METADATA: json.dumps(content, sort_keys=True, separators=(",", ":"))}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str] | None, file: str) -> Checksums:
        """Inverse of :meth:`to_metadata`, for content of any origin.

        Raises:
            PackedFormatError: There are none, or they cannot be read; ``file`` is named.
        """
        text = (metadata or {}).get(METADATA)
        if text is None:
            raise PackedFormatError(
                f"{file}: has no checksums; the file was written by another program than usllm or transformers"
            )
        try:
            content = json.loads(text)
            parts = [content[name] for name in ("tensors", "keys", "meaning")]
            if not all(isinstance(part, dict) for part in parts) or len(content) != len(parts):
                raise ValueError("not three objects")
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise PackedFormatError(f"{file}: its checksums cannot be read ({shorten(str(error))})") from error
        return cls(*parts)


def of_tensor(name: str, tensor: Tensor, packed: PackedConfig) -> int:
    """CRC-32 of a stored tensor: of its name, type and shape, what gives its bytes their meaning, and its bytes.

    Args:
        name: As in the file.
        tensor: Any shape and device; one that lies in a mapped file is read where it is.
        packed: How the tensors are stored.
    """
    kind = _TYPES.get(tensor.dtype, str(tensor.dtype))
    opening = json.dumps([name, kind, list(tensor.shape), _stored_as(name, packed)], sort_keys=True)
    content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
    return zlib.crc32(content, zlib.crc32(opening.encode()))


def _stored_as(name: str, packed: PackedConfig) -> list[Any]:
    """What gives the bytes of a tensor their meaning; nothing for plain numbers."""
    module, _, kind = name.rpartition(".")
    if kind == "packed" and (found := _entry(module, packed.layers)):
        return [packed.method, packed.format, found, list(packed.layers[found].shape)]
    if kind == "weight" and (found := _entry(module, packed.blocks)):
        return ["blocks", packed.blocks[found].bits, list(packed.blocks[found].shape)]
    return []


def _entry(module: str, entries: Mapping[str, Any]) -> str | None:
    """Name of a module's entry; in files of a base model alone, names lack the first part that entries have."""
    if module in entries:
        return module
    return next((name for name in entries if name.partition(".")[2] == module), None)


def of_keys(model_config: Mapping[str, Any]) -> dict[str, int]:
    """CRC-32 of the keys of ``config.json`` that change what is computed, and of the section's own keys.

    Args:
        model_config: Content of ``config.json``.
    """
    section = model_config.get(SECTION) or {}
    content = {key: value for key, value in model_config.items() if key != SECTION}
    content |= {f"{SECTION}.{key}": value for key, value in section.items() if key != "format"}
    content |= {f"{SECTION}.format.{key}": value for key, value in section.get("format", {}).items()}
    kept = {key: value for key, value in content.items() if key.removeprefix(f"{SECTION}.") not in _WITHOUT_EFFECT}
    return {key: zlib.crc32(json.dumps(_effective(value), sort_keys=True).encode()) for key, value in kept.items()}


def _effective(value: Any) -> Any:
    """A value without what has no effect in nested configurations."""
    if isinstance(value, dict):
        return {key: _effective(item) for key, item in value.items() if key not in _WITHOUT_EFFECT}
    return value


def check_keys(model_config: Mapping[str, Any], stored: Checksums) -> None:
    """Refuse a ``config.json`` that is not the one that the tensors were stored with.

    Raises:
        PackedFormatError: A key was changed, added or removed; it is named.
    """
    found = of_keys(model_config)
    for key in [*found, *stored.keys]:  # those of the file first: their values can be shown
        if found.get(key) == stored.keys.get(key):
            continue
        place: Any = model_config
        for part in key.split(".") if key.startswith(f"{SECTION}.") else [key]:
            place = place.get(part) if isinstance(place, Mapping) else None
        shown = key if is_name(key) else shorten(key)
        name = shown if key.startswith(f"{SECTION}.") else f"config.json: {shown}"
        what = "was added" if key not in stored.keys else "was changed" if key in found else "was removed"
        value = f"={shorten(place)}" if key in found else ""
        raise PackedFormatError(f"{name}{value}: {what} after the model was stored; download the file again")


def refuse_other_models(checksums: Mapping[str, Checksums]) -> None:
    """Refuse weight files that were not stored together; ``checksums`` by name of the file.

    Raises:
        PackedFormatError: The configuration meant something else to the writer of one; the file is named.
    """
    for file, stored in checksums.items():
        if stored.meaning != next(iter(checksums.values())).meaning:
            raise PackedFormatError(f"{file}: was stored with another model than {next(iter(checksums))}")


def check_tensors(path: Path, stored: Checksums, packed: PackedConfig) -> None:
    """Check every tensor of one weight file; the file is mapped, not loaded.

    Raises:
        PackedFormatError: A checksum is missing or wrong; the tensor is named.
    """
    for name, tensor in _tensors(path):
        layer = name.removesuffix(".packed")
        if name not in stored.tensors:
            raise PackedFormatError(f"{layer}: has no checksum in {path.name}; download the file again")
        if of_tensor(name, tensor, packed) != stored.tensors[name]:
            raise PackedFormatError(
                f"{layer}: its checksum is wrong; the file is damaged, or the tensor is not the one that was stored "
                "under this name: download it again"
            )


def _tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    name = path.name
    try:
        with safe_open(path, framework="pt") as content:
            for name in content.keys():  # noqa: SIM118 (not a dict)
                tensor: Tensor = content.get_tensor(name)
                yield name, tensor
    except (OSError, SafetensorError, ValueError, TypeError, AttributeError) as error:  # of types that torch lacks
        if isinstance(error, PackedFormatError):
            raise
        raise PackedFormatError(f"{name}: cannot be read ({error})") from error


def of_tensors(tensors: Iterable[tuple[str, Tensor]], packed: PackedConfig) -> dict[str, int]:
    """Checksums by name."""
    return {name: of_tensor(name, tensor, packed) for name, tensor in tensors}
