"""The bytes of one stored layer, looked at without trust: every check ends in the same message."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from usllm.system.errors import PackedFormatError

MAX_DIMENSION = 1 << 20  # of a layer: above any vocabulary, far below what makes sizes overflow


class PackedBytes:
    """A stored layer before its plan is known.

    Args:
        packed: uint8 [bytes], any device.
        shape: ``(out, in)`` of the weight.
        name: Layer name, for messages.
        header: Bytes of its header.

    Raises:
        PackedFormatError: It is no vector of bytes, or shorter than its header, or the shape is impossible.
    """

    def __init__(self, packed: Tensor, shape: tuple[int, int], name: str, header: int) -> None:
        self.name = name
        if packed.dtype != torch.uint8 or packed.dim() != 1:
            self.fail(f"is {packed.dtype} {list(packed.shape)}, expected a vector of bytes")
        if not all(1 <= size <= MAX_DIMENSION for size in shape):
            self.fail(f"the shape {shape[0]}x{shape[1]} is impossible")
        if len(packed) < header:
            self.fail(f"has {len(packed)} bytes, too few for a header")
        self.packed = packed.detach().cpu()
        self.header: list[int] = self.packed[:header].tolist()

    def fail(self, problem: str) -> NoReturn:
        """Refuse the layer for ``problem``."""
        raise PackedFormatError(f"{self.name}: {problem}; the file is damaged or not a usllm model, download it again")

    def check_size(self, expected: int) -> None:
        """Refuse any other number of bytes."""
        if len(self.packed) != expected:
            self.fail(f"has {len(self.packed)} bytes, its header asks for {expected}")

    def check_padding(self, last_byte: int, bits: int) -> None:
        """Refuse bits that are set after the end of a stream of ``bits`` bits whose last byte is ``last_byte``."""
        if bits % 8 and int(self.packed[last_byte]) >> bits % 8:
            self.fail("bits after the end of a section are set")

    def check_scales(self, first: int, count: int, *, signed: bool) -> None:
        """Refuse fp16 scales, ``count`` of them from byte ``first`` on, that are not finite, or negative where
        ``signed`` is false."""
        words = self.packed[first : first + 2 * count].view(-1, 2).to(torch.int32)
        words = words[:, 0] | (words[:, 1] << 8)
        if bool(((words & 0x7C00) == 0x7C00).any()):
            self.fail("a scale is not finite")
        if not signed and bool((words & 0x8000).any()):
            self.fail("a scale is negative")


def half_view(packed: Tensor, first: int, count: int) -> Tensor:
    """``count`` fp16 numbers, little-endian, from byte ``first`` on; a view where they are aligned."""
    part = packed[first : first + 2 * count]
    if part.storage_offset() % 2 or part.data_ptr() % 2:
        part = part.clone()
    return part.view(torch.float16)


def half_bytes(values: Tensor) -> Tensor:
    """fp16 numbers as bytes, uint8 [2 * numbers], on the CPU."""
    return values.detach().cpu().contiguous().flatten().view(torch.uint8)
