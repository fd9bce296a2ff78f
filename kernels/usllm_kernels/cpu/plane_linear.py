"""Products from codes in output order on the CPU.

A few tokens look sums of four columns up. For more, signs become an exact matrix some outputs at a time, while it stays
in the second cache, and torch multiplies; scales are left with the inputs and the outputs. Where most codes are wide,
or groups of inputs have factors of their own, weights are decoded instead.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from usllm_kernels.cpu.parallel import side_by_side
from usllm_kernels.cpu.planes import decode_channels, gather_inputs, look_up, sign_columns
from usllm_kernels.planes import COLUMNS, OUTPUTS, Planes

FEW_TOKENS = 24
"""Beyond, a matrix and torch's product are faster."""
_MATRIX = 1 << 19
"""Elements of the matrix that is made at a time; at least a block of outputs for each thread."""
_LEAST_SHARED = 1 << 21
"""Signs; below, starting a second thread takes longer than it saves."""
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
        return _looked_up(x, planes)
    channels, blocks = planes.starts.shape[0] - 1, planes.words.shape[0]
    exact = planes.groups == 1 and planes.columns <= _MOST_COLUMNS * channels and x.dtype in _SIGNED
    rows = planes.columns if exact else channels
    found, held = x.new_empty(tokens, outputs), _inputs(x, planes, exact)
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


def plane_weight(planes: Planes, dtype: torch.dtype = torch.float32) -> Tensor:
    """Decoded weight [out, in]."""
    outputs, inputs = planes.shape
    weight = torch.zeros(inputs, outputs, dtype=dtype)
    if planes.columns:
        found = _decoded(planes, range(planes.words.shape[0]), dtype)[:, :outputs]
        weight[planes.channels[planes.starts[:-1]].long()] = found
    return weight.t()


def _looked_up(x: Tensor, planes: Planes) -> Tensor:
    channels, _, scales, offsets, words, factors = planes.arrays
    blocks, bits = words.shape[0], x.dtype == torch.bfloat16
    held = x if bits else x.float()
    found = held.new_empty(x.shape[0], planes.shape[0])
    values = (held.contiguous().view(torch.int16) if bits else held.contiguous()).numpy()
    into = (found.view(torch.int16) if bits else found).numpy()
    threads = torch.get_num_threads() if words.size * COLUMNS * x.shape[0] >= _LEAST_SHARED else 1
    if threads == 1:
        look_up(values, channels, scales, offsets, words, factors, into, 0, blocks)
    else:

        def work(part: int) -> None:
            span = blocks * part // threads, blocks * (part + 1) // threads
            look_up(values, channels, scales, offsets, words, factors, into, *span)

        side_by_side(work, range(threads))
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
