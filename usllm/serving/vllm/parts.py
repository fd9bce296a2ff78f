"""The parts of one of vLLM's linear layers, which fuses those of a model: q, k and v, or gate and up.

Each part is stored, loaded and computed with by itself, as the model's own layer would be.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from usllm.compress import Compressor
from usllm.packed.blocks import bytes_per_row, check_blocks
from usllm.packed.config import BlockEntry, PackedConfig, PackedLayerEntry
from usllm.packed.linear import PackedLinear
from usllm.system.errors import PackedFormatError
from usllm_kernels import block_linear

_SHARDS = {"q": 0, "k": 1, "v": 2}
"""Places of the parts that vLLM calls by a letter; it numbers others."""


class Parts(nn.Module):
    """``y = x Ŵᵀ``, [..., in] to [..., the outputs of all parts].

    What is loaded are buffers of the parts. vLLM, which knows parameters, gets empty ones that hand on what is loaded.

    Args:
        names: Of the stored layers, in the order of their outputs.
        rows: Outputs of each.
        columns: Inputs of all.
        packed: The packed configuration.
        dtype: Of parts that are stored as floats.

    Raises:
        PackedFormatError: A stored layer has another shape; it is named.
    """

    def __init__(
        self, names: Sequence[str], rows: Sequence[int], columns: int, packed: PackedConfig, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.names, self.outputs = tuple(names), sum(rows)
        self.linears = nn.ModuleList(
            _part(name, (outputs, columns), packed, dtype) for name, outputs in zip(names, rows, strict=True)
        )
        self._loaded: set[int] = set()

    def placeholders(self) -> dict[str, nn.Parameter]:
        """Parameters without numbers, by the last part of the stored tensors' names."""
        found: dict[str, nn.Parameter] = {}
        for part in self.linears:
            name, stored = _stored(part)
            holder = nn.Parameter(stored.new_empty(0), requires_grad=False)
            holder.weight_loader = self._load  # type: ignore[attr-defined]
            found.setdefault(name, holder)
        return found

    def _load(self, holder: Tensor, loaded: Tensor, shard: str | int | tuple[int, ...] | None = None) -> None:
        """Take a tensor that was read: all of the layer, or one of its parts as vLLM names them."""
        place = _SHARDS.get(shard, -1) if isinstance(shard, str) else 0 if shard is None else shard
        known = isinstance(place, int) and 0 <= place < len(self.names)
        if not known or (shard is None and len(self.names) > 1):
            raise PackedFormatError(f"{self.names[0]}: vLLM read its part {shard!r}; there are {len(self.names)}")
        assert isinstance(place, int)
        name, stored = _stored(self.linears[place])
        if stored.shape != loaded.shape:
            raise PackedFormatError(
                f"{self.names[place]}: is {list(loaded.shape)}, expected {list(stored.shape)} of {stored.dtype}"
            )
        self.linears[place].load_state_dict({name: loaded})
        self._loaded.add(place)

    def check(self) -> None:
        """Check that all was loaded, and what was.

        Raises:
            PackedFormatError: A part was not loaded or is damaged; it is named.
        """
        for place, (name, part) in enumerate(zip(self.names, self.linears, strict=True)):
            if place not in self._loaded:
                raise PackedFormatError(f"{name}: was not loaded")
            if isinstance(part, PackedLinear):
                _ = part.plan
            elif isinstance(part, BlockPart):
                try:
                    check_blocks(part.weight, part.bits, f"{name}.weight")
                except ValueError as error:
                    raise PackedFormatError(str(error)) from error

    def packed_linears(self) -> list[PackedLinear]:
        """The parts that are compressed."""
        return [part for part in self.linears if isinstance(part, PackedLinear)]

    def forward(self, x: Tensor) -> Tensor:
        found = []
        # Without what modules do around a call: for one token that takes as long as the product.
        for part in self.linears:
            found.append(part.forward(x))
        return torch.cat(found, -1) if len(found) > 1 else found[0]


class BlockPart(nn.Module):
    """A part in blocks of 8 or 4 bits."""

    weight: Tensor

    def __init__(self, entry: BlockEntry, name: str) -> None:
        super().__init__()
        self.bits = entry.bits
        size = entry.shape[0], bytes_per_row(entry.shape[1], entry.bits, name)
        self.register_buffer("weight", torch.zeros(size, dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        return block_linear(x, self.weight, self.bits)


class DensePart(nn.Module):
    """A part that is stored as floats, beside others that are not."""

    weight: Tensor

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(shape, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight)


def entry_of(name: str, packed: PackedConfig) -> PackedLayerEntry | BlockEntry | None:
    """How a module's weight is stored; ``None``: as floats."""
    return packed.layers.get(name) or packed.blocks.get(name)


def _part(name: str, shape: tuple[int, int], packed: PackedConfig, dtype: torch.dtype) -> nn.Module:
    entry = entry_of(name, packed)
    if entry is None:
        return DensePart(shape, dtype)
    if entry.shape != shape:
        raise PackedFormatError(
            f"{name}: is {entry.shape[0]}x{entry.shape[1]} in the folder, {shape[0]}x{shape[1]} in vLLM's model"
        )
    if isinstance(entry, BlockEntry):
        return BlockPart(entry, name)
    compressor: Compressor = packed.compressor
    return PackedLinear(entry, compressor, name)


def _stored(part: nn.Module) -> tuple[str, Tensor]:
    """Last part of the name of a part's tensor in the folder, and where it is loaded to."""
    name = "packed" if isinstance(part, PackedLinear) else "weight"
    return name, part.get_buffer(name)
