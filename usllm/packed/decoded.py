"""A compressed model as the tensors of its dense architecture, decoded one at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from usllm.compress import Compressor
from usllm.packed.blocks import unpack_blocks
from usllm.packed.folder import PackedFolder, TensorReader, open_folder
from usllm.packed.sharded_files import stored_tensors
from usllm.packed.source import PackingSource
from usllm.system.errors import PackedFormatError, UserError


@dataclass(frozen=True)
class DecodedModel:
    """Where the tensors of a compressed model come from, and what they take where they are packed.

    Attributes:
        compressor: Method and configuration of the compressed layers.
        options: How they came about, as recorded.
        layers: Module name of each compressed layer to the bytes that it is stored in.
        weight_bytes: Of the weight files of the packed folder; ``None`` where none was written.
        read: One tensor by the name that transformers gives it: fp32 where it is decoded, else as it is stored. Raises
            a UserError or PackedFormatError where it is not there.
    """

    compressor: Compressor
    options: Mapping[str, Any]
    layers: Mapping[str, int]
    weight_bytes: int | None
    read: Callable[[str], Tensor] = field(repr=False)

    def packed_bytes(self, skeleton: PreTrainedModel) -> int:
        """Bytes of the weights in packed form; where none was written, with everything else in bf16.

        Args:
            skeleton: The dense model, on any device.
        """
        if self.weight_bytes is not None:
            return self.weight_bytes
        compressed = {f"{name}.weight" for name in self.layers}
        others = (tensor for name, tensor in stored_tensors(skeleton).items() if name not in compressed)
        return sum(self.layers.values()) + 2 * sum(math.prod(tensor.shape) for tensor in others)


def decode_source(source: PackingSource) -> DecodedModel:
    """The model of a checkpoint, or one in memory."""
    layers = {name: plan.total_bits // 8 for name, plan in source.plans.items()}
    options = asdict(source.compressor.options)
    return DecodedModel(source.compressor, options, layers, None, partial(_of_source, source))


@contextmanager
def decode_folder(path: Path) -> Iterator[DecodedModel]:
    """The model of a packed folder, whose tensors are checked first; its files are mapped, not loaded.

    Raises:
        PackedFormatError: A tensor or file is missing or damaged; it is named.
    """
    folder = open_folder(path)
    folder.check_tensors()
    layers = {name: entry.bytes for name, entry in folder.packed.layers.items()}
    size = sum((path / file).stat().st_size for file in folder.header_bytes)
    with folder.reading() as reader:
        options = folder.packed.options or {}
        yield DecodedModel(folder.packed.compressor, options, layers, size, partial(_of_folder, folder, reader))


@torch.no_grad()
def _of_source(source: PackingSource, name: str) -> Tensor:
    module, _, kind = name.rpartition(".")
    if kind == "weight" and module in source.plans:
        return source.plans[module].decode(source.states(module), torch.float32)
    tensor = source.tensors.get(name)
    if tensor is None:
        raise UserError(f"{name}: is in the model's configuration, but not in the checkpoint")
    return tensor.detach().cpu()


@torch.no_grad()
def _of_folder(folder: PackedFolder, reader: TensorReader, name: str) -> Tensor:
    packed = folder.packed
    module, _, kind = name.rpartition(".")
    if kind == "weight" and module in packed.layers:
        stored = reader[f"{module}.packed"]
        plan = packed.compressor.read(stored, packed.layers[module].shape, module)
        return plan.decode(plan.unpack(stored), torch.float32)
    if name not in folder.tensors:
        raise PackedFormatError(f"{name}: is missing from the weight files")
    if kind == "weight" and module in packed.blocks:
        return unpack_blocks(reader[name], packed.blocks[module].bits)
    return reader[name]
