"""Streams of integers of a few bits each, without gaps: what packed states and class numbers are stored as.

Bit j of a stream is bit ``j mod 8`` of byte ``j // 8`` (little-endian); a value of ``b`` bits takes the next ``b``
bits, lowest first. Runs of different widths follow each other bit by bit; only the end of a stream is padded, with
zeros.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from usllm.sketch.bits import whole_bytes


def pack(runs: Iterable[tuple[Tensor, int]], device: torch.device | str = "cpu") -> Tensor:
    """One stream, uint8 [bytes], of several runs of integers.

    Args:
        runs: Integers (any shape and integer type; their low bits are stored) and their width in bits, 1 to 8 or 16.
        device: Where the stream is made.
    """
    pieces: list[Tensor] = []
    carry, used = 0, 0  # the bits of a byte that the next run goes on filling
    for values, bits in runs:
        if not values.numel():
            continue
        piece = _pack_run(values.flatten(), bits)
        total = used + values.numel() * bits
        if used:
            shifted = torch.zeros(len(piece) + 1, dtype=torch.uint8, device=piece.device)
            shifted[:-1] = piece << used
            shifted[1:] |= piece >> (8 - used)
            shifted[0] |= carry
            piece = shifted[: -(-total // 8)]
        used = total % 8
        if used:
            carry = int(piece[-1])
            piece = piece[:-1]
        pieces.append(piece)
    if used:
        pieces.append(torch.tensor([carry], dtype=torch.uint8, device=device))
    return torch.cat(pieces) if pieces else torch.zeros(0, dtype=torch.uint8, device=device)


def unpack(stream: Tensor, count: int, bits: int, first_bit: int = 0) -> Tensor:
    """``count`` unsigned integers of ``bits`` bits each from bit ``first_bit`` on; uint8 up to 8 bits, else int32.

    Args:
        stream: uint8 [bytes].
        count: How many.
        bits: Width, 1 to 8 or 16.
        first_bit: Where they begin.

    Raises:
        ValueError: The stream is too short.
    """
    first, skip = divmod(first_bit, 8)
    needed = whole_bytes(skip + count * bits) // 8
    if first + needed > len(stream):
        raise ValueError(f"the stream has {len(stream)} bytes, {first + needed} are needed")
    part = stream[first : first + needed]
    if skip:
        following = torch.zeros_like(part)
        following[:-1] = part[1:]
        part = (part >> skip) | (following << (8 - skip))
    if bits == 8:
        return part[:count].clone()
    if bits == 16:
        pairs = part[: 2 * count].view(-1, 2).to(torch.int32)
        return pairs[:, 0] | (pairs[:, 1] << 8)
    eights = -(-count // 8)
    whole = torch.zeros(eights * bits, dtype=torch.uint8, device=stream.device)
    kept = min(len(part), len(whole))
    whole[:kept] = part[:kept]
    whole = whole.view(eights, bits)
    values = torch.empty(eights, 8, dtype=torch.uint8, device=stream.device)
    for number in range(8):  # eight values fill exactly `bits` bytes
        byte, shift = divmod(number * bits, 8)
        value = whole[:, byte] >> shift
        if shift + bits > 8:
            value |= whole[:, byte + 1] << (8 - shift)
        values[:, number] = value & ((1 << bits) - 1)
    return values.flatten()[:count]


def _pack_run(values: Tensor, bits: int) -> Tensor:
    """One run on its own, uint8 [bytes], padded with zeros."""
    if bits == 16:
        wide = values.to(torch.int32)
        return torch.stack([wide & 255, (wide >> 8) & 255], 1).to(torch.uint8).flatten()
    low = (values & ((1 << bits) - 1)).to(torch.uint8)
    if bits == 8:
        return low
    eights = -(-len(low) // 8)
    padded = torch.zeros(eights * 8, dtype=torch.uint8, device=values.device)
    padded[: len(low)] = low
    padded = padded.view(eights, 8)
    packed = torch.zeros(eights, bits, dtype=torch.uint8, device=values.device)
    for number in range(8):
        byte, shift = divmod(number * bits, 8)
        packed[:, byte] |= padded[:, number] << shift
        if shift + bits > 8:
            packed[:, byte + 1] |= padded[:, number] >> (8 - shift)
    return packed.flatten()[: -(-len(low) * bits // 8)]
