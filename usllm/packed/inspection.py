"""Where every byte of a packed folder goes, read back from the folder itself."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from usllm.packed.blocks import check_blocks
from usllm.packed.folder import PackedFolder, open_folder
from usllm.sketch.bits import bit_breakdown
from usllm.sketch.classes import ChannelClass
from usllm.sketch.layer_bytes import read_plan
from usllm.system.errors import PackedFormatError

_DTYPE_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


@dataclass(frozen=True)
class InspectedLayer:
    """A sketched layer as it is stored.

    Attributes:
        name, shape: Module name; ``(out, in)``.
        classes: Rows, states per group and width of each class of channels, with the number of its channels.
        states: Number of states.
        scales: Number of channel scales and of output scales.
        load: Fewest, mean and most members per state.
        sections: Bytes of each section.
        bytes: Their sum.
    """

    name: str
    shape: tuple[int, int]
    classes: tuple[tuple[ChannelClass, int], ...]
    states: int
    scales: tuple[int, int]
    load: tuple[int, float, int]
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
        operator: Of the sketch.
        layers: Sketched layers.
        rest: All other tensors.
        header_bytes: Of the weight files: lengths and JSON before the tensors.
        other_files: Bytes of every other file: configuration, index, tokenizer, card.
        disk_bytes: Bytes of all files as the file system says.
    """

    path: Path
    operator: str
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
    def model_bits_per_weight(self) -> float:
        """Bits of the weight files per parameter of the model."""
        return 8 * self.weight_bytes / self.parameters

    def totals(self) -> dict[str, Any]:
        """Plain Python, for reports and model cards."""
        names = ("sketched_bytes", "rest_bytes", "header_bytes", "weight_bytes", "disk_bytes", "sketched_weights")
        rates = ("parameters", "bits_per_weight", "model_bits_per_weight")
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
            plan = read_plan(tensors[f"{name}.packed"], entry.shape, folder.packed.config, name)
            counts = plan.channel_class.bincount(minlength=len(plan.classes)).tolist()
            sections = {part: bits // 8 for part, bits in bit_breakdown(plan).items()}
            layers.append(
                InspectedLayer(
                    name=name,
                    shape=entry.shape,
                    classes=tuple(zip(plan.classes, counts, strict=True)),
                    states=plan.num_states,
                    scales=(plan.num_active, entry.shape[0] if plan.config.output_scale else 0),
                    load=plan.load(),
                    sections=sections,
                    bytes=sum(sections.values()),
                )
            )
        for name, block in folder.packed.blocks.items():
            try:
                check_blocks(tensors[f"{name}.weight"], block.bits, f"{name}.weight")
            except ValueError as error:
                raise PackedFormatError(str(error)) from error
    sizes = {str(file.relative_to(folder.path)): file.stat().st_size for file in sorted(_all_files(folder.path))}
    return Inspection(
        path=folder.path,
        operator=folder.packed.config.operator,
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
