"""Products from codes in output order on the CPU.

A few tokens look sums of four columns up. For more, signs become an exact matrix some outputs at a time, while it stays
in the caches, and torch multiplies; scales are left with the inputs and the outputs. Where most codes are wide,
or groups of inputs have factors of their own, weights are decoded instead.
"""

from __future__ import annotations

import torch
from torch import Tensor

from usllm_kernels.cpu.parallel import workers
from usllm_kernels.cpu.plane_matrix import (
    decode_channels_part,
    finish_products_part,
    gather_inputs_part,
    sign_rows_part,
)
from usllm_kernels.cpu.planes import look_up_part
from usllm_kernels.planes import OUTPUTS, Planes

FEW_TOKENS = 24
"""Beyond, a matrix and torch's product are faster."""
_MATRIX = 1 << 20
"""Elements of the matrix that is made at a time, at least a block of outputs for each thread.

With half as many it would stay in the second cache, but torch's product loses more by the narrower matrix
(docs/log.md).
"""
_LEAST_SHARED = 1 << 18
"""Signs times tokens, for a few; below, other threads save less than it takes to ask them."""
_LEAST_WRITTEN = 1 << 14
"""Elements that many tokens have written; below, other threads save less than it takes to ask them."""
_MOST_COLUMNS = 1.5
"""Of a channel, in the mean, that are multiplied as signs."""
_COMPUTED = (torch.float32, torch.bfloat16, torch.float16)
_SIGNED = {torch.float32: (0x3F800000, 0x3F800000 - (1 << 31)), torch.bfloat16: (0x3F80, 0x3F80 - (1 << 15))}
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
    channels, _, *others = planes.addresses  # looked at for many tokens, too
    if tokens <= FEW_TOKENS:
        held = (x if x.dtype == torch.bfloat16 else x.float()).contiguous()
        found = held.new_empty(tokens, outputs)
        blocks, columns = planes.words.shape[0], planes.columns
        shape = tokens, x.shape[1], outputs, columns, blocks, planes.groups, held.element_size()
        by = workers()
        threads = by.threads(blocks * OUTPUTS * columns * tokens, _LEAST_SHARED)
        by.run(look_up_part, (*shape, held.data_ptr(), found.data_ptr(), channels, *others), threads)
        return found
    with torch.autocast(x.device.type, enabled=False):  # products are read in the type of x
        return _by_matrix(x, planes)


def plane_weight(planes: Planes, dtype: torch.dtype = torch.float32) -> Tensor:
    """Decoded weight [out, in]."""
    outputs, inputs = planes.shape
    if not planes.columns:
        return torch.zeros(outputs, inputs, dtype=dtype)
    return _decoded(planes, range(planes.words.shape[0]), dtype, apart=True)[:, :outputs].t()


def _by_matrix(x: Tensor, planes: Planes) -> Tensor:
    """Products of many tokens: torch's, with some outputs' signs or weights at a time."""
    outputs, tokens = planes.shape[0], len(x)
    channels, blocks = planes.starts.shape[0] - 1, planes.words.shape[0]
    exact = planes.groups == 1 and planes.columns <= _MOST_COLUMNS * channels and x.dtype in _SIGNED
    found = x.new_empty(tokens, outputs)
    held, added = _gathered(x, planes, exact)
    width, by = max(_MATRIX // (held.shape[1] * OUTPUTS), torch.get_num_threads()), workers()
    for first in range(0, blocks, width):
        part = range(first, min(first + width, blocks))
        start, stop = first * OUTPUTS, min(part.stop * OUTPUTS, outputs)
        if added is None:
            found[:, start:stop] = held @ _decoded(planes, part, x.dtype)[:, : stop - start]
            continue
        product = held @ _signs(planes, part, x.dtype)[: stop - start].t()
        shape = tokens, stop - start, outputs, start, x.element_size()
        factors = planes.factors.data_ptr() + start * planes.factors.element_size()
        numbers = *shape, product.data_ptr(), added.data_ptr(), factors, found.data_ptr()
        by.run(finish_products_part, numbers, by.threads(product.numel(), _LEAST_WRITTEN))
    return found


def _gathered(x: Tensor, planes: Planes, exact: bool) -> tuple[Tensor, Tensor | None]:
    """Inputs of the columns, with their scales rounded in, and what offsets add to each token.

    Where signs are not multiplied exactly, inputs of the channels as they are, and ``None``.
    """
    channels, starts, scales, offsets, *_ = planes.tensors
    if not exact:
        channels = channels[starts[:-1]]
        scales, offsets = scales.new_ones(len(channels)), scales.new_zeros(len(channels))
    if x.dtype not in _SIGNED:
        return x.index_select(1, channels), None
    added = scales.new_empty(len(x))
    x, held, by = x.contiguous(), x.new_empty(len(x), len(channels)), workers()
    places = (tensor.data_ptr() for tensor in (x, channels, scales, offsets, held, added))
    threads = by.threads(held.numel(), _LEAST_WRITTEN)
    by.run(gather_inputs_part, (*x.shape, len(channels), x.element_size(), *places), threads)
    return held, added if exact else None


def _decoded(planes: Planes, blocks: range, dtype: torch.dtype, apart: bool = False) -> Tensor:
    """Decoded weights of some blocks of outputs, [channels, len(blocks) * 64]; apart, of all inputs."""
    channels, inputs = planes.starts.shape[0] - 1, planes.shape[1]
    written = dtype if dtype == torch.bfloat16 else torch.float32
    rows = inputs if apart else channels
    made = planes.scales.new_zeros if rows > channels else planes.scales.new_empty
    weight, by = made(rows, len(blocks) * OUTPUTS, dtype=written), workers()
    shape = planes.columns, channels, planes.groups, planes.words.shape[0]
    written_to = blocks.start, len(blocks), rows, weight.element_size(), int(apart)
    numbers = *shape, *written_to, *planes.addresses, weight.data_ptr()
    by.run(decode_channels_part, numbers, by.threads(weight.numel(), _LEAST_WRITTEN))
    return weight.to(dtype)


def _signs(planes: Planes, blocks: range, dtype: torch.dtype) -> Tensor:
    """Signs of some blocks of outputs, 1 and -1, [len(blocks) * 64, columns]."""
    signs, by = planes.scales.new_empty(len(blocks) * OUTPUTS, planes.columns, dtype=dtype), workers()
    shape = planes.columns, blocks.start, len(blocks), signs.element_size(), *_SIGNED[dtype]
    numbers = *shape, planes.addresses[4], signs.data_ptr()
    by.run(sign_rows_part, numbers, by.threads(signs.numel(), _LEAST_WRITTEN))
    return signs
