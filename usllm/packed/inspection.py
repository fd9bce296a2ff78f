"""Where every byte of a packed folder goes, read back from the folder itself."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from usllm.compress import Fact
from usllm.compress.entries import bits_with_entries
from usllm.packed.blocks import check_blocks
from usllm.packed.folder import PackedFolder, open_folder
from usllm.system.errors import PackedFormatError

_DTYPE_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


@dataclass(frozen=True)
class InspectedLayer:
    """A compressed layer as it is stored.

    Attributes:
        name, shape: Module name; ``(out, in)``.
        facts: Figures of its method, by name.
        sections: Bytes of each section.
        bytes: Their sum.
    """

    name: str
    shape: tuple[int, int]
    facts: dict[str, Fact]
    sections: dict[str, int]
    bytes: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / math.prod(self.shape)


@dataclass(frozen=True)
class StoredRest:
    """A tensor outside the sketch: name, shape of its numbers, how they are stored, and bytes."""

    name: str
    shape: tuple[int, ...]
    stored_as: str
    bytes: int


@dataclass(frozen=True)
class Inspection:
    """A packed folder, accounted for.

    Attributes:
        path: The folder.
        method: How the layers are compressed.
        format: What gives their bytes their meaning.
        layers: Sketched layers.
        rest: All other tensors.
        header_bytes: Of the weight files: lengths and JSON before the tensors.
        other_files: Bytes of every other file: configuration, index, tokenizer, card.
        disk_bytes: Bytes of all files as the file system says.
    """

    path: Path
    method: str
    format: dict[str, Any]
    layers: tuple[InspectedLayer, ...]
    rest: tuple[StoredRest, ...]
    header_bytes: int
    other_files: dict[str, int]
    disk_bytes: int

    @property
    def sketched_bytes(self) -> int:
        return sum(layer.bytes for layer in self.layers)

    @property
    def rest_bytes(self) -> int:
        return sum(tensor.bytes for tensor in self.rest)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weight files: what has to be downloaded and held."""
        return self.sketched_bytes + self.rest_bytes + self.header_bytes

    @property
    def accounted_bytes(self) -> int:
        """The sum of all parts; equals ``disk_bytes``, or the folder holds something unexplained."""
        return self.weight_bytes + sum(self.other_files.values())

    @property
    def sketched_weights(self) -> int:
        return sum(math.prod(layer.shape) for layer in self.layers)

    @property
    def parameters(self) -> int:
        return self.sketched_weights + sum(math.prod(tensor.shape) for tensor in self.rest)

    @property
    def bits_per_weight(self) -> float:
        """Bits per sketched weight; tables, scales, padding and checksums included."""
        return 8 * self.sketched_bytes / self.sketched_weights

    @property
    def bits_per_weight_with_entries(self) -> float:
        """The same with what each layer takes in the headers of the weight files (:mod:`usllm.compress.entries`)."""
        return bits_with_entries(((layer.name, layer.shape, layer.bytes) for layer in self.layers), self.weight_bytes)

    @property
    def model_bits_per_weight(self) -> float:
        """Bits of the weight files per parameter of the model."""
        return 8 * self.weight_bytes / self.parameters

    def totals(self) -> dict[str, Any]:
        """Plain Python, for reports and model cards."""
        names = ("sketched_bytes", "rest_bytes", "header_bytes", "weight_bytes", "disk_bytes", "sketched_weights")
        rates = ("parameters", "bits_per_weight", "bits_per_weight_with_entries", "model_bits_per_weight")
        return {name: getattr(self, name) for name in (*names, *rates)}


def inspect_folder(path: str | Path) -> Inspection:
    """Read and check a whole packed folder, one tensor at a time.

    Raises:
        PackedFormatError: A tensor or file is missing, damaged or impossible; named.
    """
    folder = open_folder(path)
    folder.check_tensors()
    layers = []
    with folder.reading() as tensors:
        for name, entry in sorted(folder.packed.layers.items(), key=lambda item: in_model_order(item[0])):
            plan = folder.packed.compressor.read(tensors[f"{name}.packed"], entry.shape, name)
            sections = {part: bits // 8 for part, bits in plan.sections().items()}
            layers.append(InspectedLayer(name, entry.shape, plan.facts(), sections, sum(sections.values())))
        for name, block in folder.packed.blocks.items():
            try:
                check_blocks(tensors[f"{name}.weight"], block.bits, f"{name}.weight")
            except ValueError as error:
                raise PackedFormatError(str(error)) from error
    sizes = {str(file.relative_to(folder.path)): file.stat().st_size for file in sorted(_all_files(folder.path))}
    return Inspection(
        path=folder.path,
        method=folder.packed.method,
        format=folder.packed.format,
        layers=tuple(layers),
        rest=tuple(_rest(folder)),
        header_bytes=sum(folder.header_bytes.values()),
        other_files={name: size for name, size in sizes.items() if name not in folder.header_bytes},
        disk_bytes=sum(sizes.values()),
    )


def in_model_order(name: str) -> list[tuple[int, int | str]]:
    """Sort key that puts layer 2 before layer 10."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]


def _rest(folder: PackedFolder) -> list[StoredRest]:
    found = []
    sketched = {f"{name}.packed" for name in folder.packed.layers}
    for name, tensor in sorted(folder.tensors.items(), key=lambda item: in_model_order(item[0])):
        if name in sketched:
            continue
        if tensor.dtype not in _DTYPE_BYTES:
            raise PackedFormatError(f"{name}: has the type {tensor.dtype}, which no packed model uses")
        block = folder.packed.blocks.get(name.removesuffix(".weight"))
        size = math.prod(tensor.shape) * _DTYPE_BYTES[tensor.dtype]
        kind = tensor.dtype if block is None else f"{block.bits}-bit blocks"
        found.append(StoredRest(name, tensor.shape if block is None else block.shape, kind, size))
    return found


def _all_files(path: Path) -> list[Path]:
    return [file for file in path.rglob("*") if file.is_file()]
