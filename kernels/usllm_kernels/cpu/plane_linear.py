"""Products from codes in output order on the CPU.

A few tokens look sums of four columns up. For more, signs become an exact matrix some outputs at a time, while it stays
in the second cache, and torch multiplies; scales are left with the inputs and the outputs. Where most codes are wide,
or groups of inputs have factors of their own, weights are decoded instead.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from usllm_kernels.cpu.parallel import side_by_side
from usllm_kernels.cpu.planes import decode_channels, gather_inputs, look_up, look_up_part, sign_columns
from usllm_kernels.cpu.team import team_of_torch
from usllm_kernels.planes import COLUMNS, OUTPUTS, Planes

FEW_TOKENS = 24
"""Beyond, a matrix and torch's product are faster."""
_MATRIX = 1 << 19
"""Elements of the matrix that is made at a time; at least a block of outputs for each thread."""
_LEAST_ON_TEAM = 1 << 18
"""Signs times tokens; below, torch's other threads save less than it takes to ask them."""
_LEAST_SHARED = 1 << 21
"""The same for threads that have to be woken, where torch's are not at hand."""
_MOST_COLUMNS = 1.5
"""Of a channel, in the mean, that are multiplied as signs."""
_COMPUTED = (torch.float32, torch.bfloat16, torch.float16)
_SIGNED = {torch.float32: (0x3F800000, 0x3F800000 - (1 << 31)), torch.bfloat16: (0x3F80, 0xBF80)}
"""Bits of 1 and -1. Not of fp16: scales alone, or products before outputs' factors, may be beyond what it holds."""


def plane_linear(x: Tensor, planes: Planes) -> Tensor:
    """``x Ŵᵀ``, [tokens, out]; sums of a few tokens are the same bits for every number of threads.

    Args:
        x: [tokens, in].
        planes: Of the layer.

    Returns:
        In the type of ``x``; of a few tokens in fp16, fp32.
    """
    tokens, outputs = x.shape[0], planes.shape[0]
    if not planes.columns or not tokens:
        return x.new_zeros(tokens, outputs)
    if x.dtype not in _COMPUTED:
        return x @ plane_weight(planes).to(x.dtype).t()
    if tokens <= FEW_TOKENS:
        held = (x if x.dtype == torch.bfloat16 else x.float()).contiguous()
        found, team = held.new_empty(tokens, outputs), team_of_torch()
        if team is None:
            _look_up(held, planes, found)
        else:
            blocks, columns = planes.words.shape[0], planes.columns
            channels, _, *others = planes.addresses
            shape = tokens, x.shape[1], outputs, columns, blocks, planes.groups, held.element_size()
            threads = torch.get_num_threads() if blocks * OUTPUTS * columns * tokens >= _LEAST_ON_TEAM else 1
            team.run(look_up_part, (*shape, held.data_ptr(), found.data_ptr(), channels, *others), threads)
        return found
    return _by_matrix(x, planes)


def plane_weight(planes: Planes, dtype: torch.dtype = torch.float32) -> Tensor:
    """Decoded weight [out, in]."""
    outputs, inputs = planes.shape
    weight = torch.zeros(inputs, outputs, dtype=dtype)
    if planes.columns:
        found = _decoded(planes, range(planes.words.shape[0]), dtype)[:, :outputs]
        weight[planes.channels[planes.starts[:-1]].long()] = found
    return weight.t()


def _look_up(x: Tensor, planes: Planes, found: Tensor) -> None:
    """Products of a few tokens where torch's threads are not at hand."""
    of_channels, _, scales, offsets, words, factors = planes.arrays
    values, into, blocks = _numbers(x), _numbers(found), words.shape[0]
    parts = torch.get_num_threads() if words.size * COLUMNS * x.shape[0] >= _LEAST_SHARED else 1

    def part(number: int) -> None:
        span = blocks * number // parts, blocks * (number + 1) // parts
        look_up(values, of_channels, scales, offsets, words, factors, into, *span)

    side_by_side(part, range(parts))


def _by_matrix(x: Tensor, planes: Planes) -> Tensor:
    """Products of many tokens: torch's, with some outputs' signs or weights at a time."""
    outputs = planes.shape[0]
    channels, blocks = planes.starts.shape[0] - 1, planes.words.shape[0]
    exact = planes.groups == 1 and planes.columns <= _MOST_COLUMNS * channels and x.dtype in _SIGNED
    rows = planes.columns if exact else channels
    found, held = x.new_empty(len(x), outputs), _inputs(x, planes, exact)
    added = _offsets(x, planes) if exact else None
    width = max(_MATRIX // (rows * OUTPUTS), torch.get_num_threads())
    for first in range(0, blocks, width):
        part = range(first, min(first + width, blocks))
        start, stop = first * OUTPUTS, min(part.stop * OUTPUTS, outputs)
        matrix = _signs(planes, part, x.dtype) if exact else _decoded(planes, part, x.dtype)
        product = held @ matrix[:, : stop - start]
        if exact:
            product = product if added is None else (product + added).to(product.dtype)
            torch.mul(product, planes.factors[0, start:stop], out=found[:, start:stop])
        else:
            found[:, start:stop] = product
    return found


def _inputs(x: Tensor, planes: Planes, columns: bool) -> Tensor:
    """What a matrix is multiplied with: of its columns with the scales rounded in, or of channels, as they are."""
    channels, starts, scales = planes.arrays[:3]
    if not columns:
        channels = channels[starts[:-1]]
        scales = np.ones(channels.size, np.float32)
        if channels.size % 8:  # compiled loops write eight at a time
            return x.index_select(1, torch.from_numpy(channels))
    bits = x.dtype == torch.bfloat16
    values = (x.view(torch.int16) if bits else x.float()).contiguous().numpy()
    held = torch.empty(len(x), channels.size, dtype=x.dtype if bits else torch.float32)
    into = (held.view(torch.int16) if bits else held).numpy()
    parts = torch.get_num_threads() if held.numel() >= _LEAST_SHARED // COLUMNS else 1

    def work(part: int) -> None:
        gather_inputs(values, channels, scales, into, len(x) * part // parts, len(x) * (part + 1) // parts)

    side_by_side(work, range(parts))
    return held.to(x.dtype)


def _offsets(x: Tensor, planes: Planes) -> Tensor | None:
    """What offsets add to every output's product, fp32 [tokens, 1]."""
    where = planes.offsets.nonzero().flatten()
    if not len(where):
        return None
    return (x.index_select(1, planes.channels[where]).float() * planes.offsets[where]).sum(1, keepdim=True)


def _decoded(planes: Planes, blocks: range, dtype: torch.dtype) -> Tensor:
    """Decoded weights of some blocks of outputs, [channels, len(blocks) * 64]."""
    _, starts, scales, offsets, words, factors = planes.arrays
    written = dtype if dtype == torch.bfloat16 else torch.float32
    weight = torch.empty(len(starts) - 1, len(blocks) * OUTPUTS, dtype=written)
    into = (weight.view(torch.int16) if written == torch.bfloat16 else weight).numpy()

    def work(block: int) -> None:
        decode_channels(words, starts, scales, offsets, factors, into, blocks.start, block)

    side_by_side(work, blocks)
    return weight.to(dtype)


def _signs(planes: Planes, blocks: range, dtype: torch.dtype) -> Tensor:
    """Signs of some blocks of outputs, 1 and -1, [columns, len(blocks) * 64]."""
    signs = torch.empty(planes.columns, len(blocks) * OUTPUTS, dtype=dtype)
    into, words = signs.view(torch.int32 if dtype == torch.float32 else torch.int16).numpy(), planes.arrays[4]

    def work(block: int) -> None:
        sign_columns(words, *_SIGNED[dtype], into, blocks.start, block)

    side_by_side(work, blocks)
    return signs


def _numbers(tensor: Tensor) -> Any:
    """Of float32, or the bits of bfloat16, over the same memory."""
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
