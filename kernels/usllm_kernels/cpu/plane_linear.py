"""Products from codes in output order on the CPU.

A few tokens look sums of four columns up. For more, codes become a matrix some outputs at a time, while it stays in the
second cache, and torch multiplies: of signs an exact one, whose scales are left with the input and the output.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from usllm_kernels.cpu.parallel import side_by_side
from usllm_kernels.cpu.planes import decode_columns, gather_inputs, look_up, sign_columns
from usllm_kernels.planes import COLUMNS, OUTPUTS, Planes

FEW_TOKENS = 24
"""Beyond, a matrix of the codes and torch's product are faster."""
_MATRIX = 1 << 19
"""Elements of the matrix that is made at a time; at least a block of outputs for each thread."""
_LEAST_SHARED = 1 << 21
"""Signs; below, starting a second thread takes longer than it saves."""
_ONE = {torch.float32: 0x3F800000, torch.bfloat16: 0x3F80, torch.float16: 0x3C00}
"""Bits of 1."""
_SIGN = {torch.float32: -(1 << 31), torch.bfloat16: 0x8000, torch.float16: 0x8000}


def plane_linear(x: Tensor, planes: Planes) -> Tensor:
    """``x Ŵᵀ`` of the planes' channels, [tokens, out]; the same bits for every number of threads but for torch's.

    Args:
        x: [tokens, in].
        planes: Of the layer.

    Returns:
        fp32 for a few tokens, else in the type of ``x``.
    """
    if not planes.columns or not len(x):
        return x.new_zeros(len(x), planes.shape[0])
    if len(x) <= FEW_TOKENS or x.dtype not in _ONE:
        return _looked_up(x, planes)
    outputs, blocks = planes.shape[0], planes.words.shape[1]
    exact = planes.levels.signs and planes.groups == 1
    found, held = x.new_empty(len(x), outputs), _inputs(x, planes, exact)
    width = max(_MATRIX // (planes.columns * OUTPUTS), torch.get_num_threads())
    for first in range(0, blocks, width):
        part = range(first, min(first + width, blocks))
        start, stop = first * OUTPUTS, min(part.stop * OUTPUTS, outputs)
        matrix = _signs(planes, part, x.dtype) if exact else _decoded(planes, part, x.dtype)
        product = held @ matrix[:, : stop - start]
        if exact:
            torch.mul(product, planes.factors[0, start:stop], out=found[:, start:stop])
        else:
            found[:, start:stop] = product
    return found


def columns_weight(planes: Planes, dtype: torch.dtype = torch.float32) -> Tensor:
    """Decoded weight of the columns, [columns, out]."""
    return _decoded(planes, range(planes.words.shape[1]), dtype)[:, : planes.shape[0]]


def _looked_up(x: Tensor, planes: Planes) -> Tensor:
    channels, scales, words, factors = planes.arrays
    blocks, levels = words.shape[1], planes.levels
    found = torch.empty(x.shape[0], blocks * OUTPUTS)
    values, into = x.float().contiguous().numpy(), found.numpy()
    threads = torch.get_num_threads() if words.size * COLUMNS * x.shape[0] >= _LEAST_SHARED else 1

    def work(part: int) -> None:
        span = blocks * part // threads, blocks * (part + 1) // threads
        look_up(values, channels, scales, words, factors, levels.step, levels.shift, into, *span)

    side_by_side(work, range(threads))
    return found[:, : planes.shape[0]]


def _inputs(x: Tensor, planes: Planes, scaled: bool) -> Tensor:
    """What a matrix of the columns is multiplied with, [tokens, columns]: scales rounded in, as in a weight, or not."""
    channels, scales, _, _ = planes.arrays
    bits = x.dtype == torch.bfloat16
    values = (x.view(torch.int16) if bits else x.float()).contiguous().numpy()
    held = torch.empty(len(x), planes.columns, dtype=x.dtype if bits else torch.float32)
    into, by = (held.view(torch.int16) if bits else held).numpy(), scales if scaled else np.ones_like(scales)
    parts = torch.get_num_threads() if held.numel() >= _LEAST_SHARED // COLUMNS else 1

    def work(part: int) -> None:
        gather_inputs(values, channels, by, into, len(x) * part // parts, len(x) * (part + 1) // parts)

    side_by_side(work, range(parts))
    return held.to(x.dtype)


def _decoded(planes: Planes, blocks: range, dtype: torch.dtype) -> Tensor:
    """Decoded weights of some blocks of outputs, [columns, len(blocks) * 64]."""
    _, scales, words, factors = planes.arrays
    levels, written = planes.levels, dtype if dtype == torch.bfloat16 else torch.float32
    weight = torch.empty(planes.columns, len(blocks) * OUTPUTS, dtype=written)
    into = (weight.view(torch.int16) if written == torch.bfloat16 else weight).numpy()

    def work(block: int) -> None:
        decode_columns(words, scales, factors, levels.step, levels.shift, into, blocks.start, block)

    side_by_side(work, blocks)
    return weight.to(dtype)


def _signs(planes: Planes, blocks: range, dtype: torch.dtype) -> Tensor:
    """Signs of some blocks of outputs, 1 and -1, [columns, len(blocks) * 64]."""
    signs = torch.empty(planes.columns, len(blocks) * OUTPUTS, dtype=dtype)
    into, words = signs.view(torch.int32 if dtype == torch.float32 else torch.int16).numpy(), planes.arrays[2]

    def work(block: int) -> None:
        sign_columns(words, _ONE[dtype], _ONE[dtype] | _SIGN[dtype], into, blocks.start, block)

    side_by_side(work, blocks)
    return signs
