"""Products from codes in output order on CUDA: bits are read once and become signs where they are multiplied.

For a few tokens signs are added up in fp32, words split over programs so that enough run; partial sums are added in a
fixed order. For more, tiles of signs go through the tensor cores; scales are rounded in with the inputs. Where most
codes are wide, or groups of inputs have factors of their own, weights are decoded and torch multiplies.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# Annotations mean something else to Triton.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from usllm_kernels.launch import dot_in_float32, power_of_two, target
from usllm_kernels.ops.plane_linear import reference
from usllm_kernels.ops.plane_linear.reference import plane_weight
from usllm_kernels.planes import COLUMNS, OUTPUTS, Planes
from usllm_kernels.triton_tile import as_stored

__all__ = ["plane_linear", "plane_weight", "supports"]

FEW_TOKENS = 8
_PROGRAMS = 512
"""Of a product of few tokens: a few for each multiprocessor of a large card."""
_LEAST_WORDS = 4
"""Of a program."""
_TILE_TOKENS = 64
_MOST_COLUMNS = 1.5
"""Of a channel, in the mean, that are multiplied as signs for many tokens."""
_COMPUTED = (torch.float32, torch.bfloat16, torch.float16)


def supports(planes: Planes) -> None:
    """All planes."""


@triton.jit
def inputs_of_word(
    x,  # [tokens, inputs]
    channels,  # int32 [columns]
    scales,  # float32 [columns]
    offsets,  # float32 [columns]
    word,
    token,
    tokens,
    inputs,
    COLUMNS: tl.constexpr,
):
    """Inputs of a word's columns times scales, float32 [TOKENS, COLUMNS], and their sum times offsets, [TOKENS]."""
    column = word * COLUMNS + tl.arange(0, COLUMNS)
    channel = tl.load(channels + column)
    place = x + token.to(tl.int64)[:, None] * inputs + channel[None, :]
    value = tl.load(place, mask=(token < tokens)[:, None], other=0.0).to(tl.float32)
    shift = tl.sum(value * tl.load(offsets + column)[None, :], 1)
    return value * tl.load(scales + column)[None, :], shift


@triton.jit
def signs_of_word(
    words,  # int32 [blocks, all words, OUTPUTS]
    block,
    word,
    all_words,
    OUTPUTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """1 and -1, float32 [COLUMNS, OUTPUTS]."""
    row = (block * all_words + word).to(tl.int64)
    bits = tl.load(words + row * OUTPUTS + tl.arange(0, OUTPUTS))
    return ((bits[None, :] >> tl.arange(0, COLUMNS)[:, None]) & 1).to(tl.float32) * 2.0 - 1.0


@triton.jit
def plane_few_tokens_kernel(
    x,  # [tokens, inputs]
    channels,  # int32 [columns]
    scales,  # float32 [columns]
    offsets,  # float32 [columns]
    words,  # int32 [blocks, all words, OUTPUTS]
    factors,  # float32 [groups, blocks * OUTPUTS]
    parts,  # float32 [splits, tokens, blocks * OUTPUTS], written
    tokens,
    inputs,
    all_words,
    group_words,
    words_each,  # of one split
    TOKENS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    block, split, blocks = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    token, output = tl.arange(0, TOKENS), block * OUTPUTS + tl.arange(0, OUTPUTS)
    found = tl.zeros((TOKENS, OUTPUTS), tl.float32)
    for word in range(split * words_each, tl.minimum((split + 1) * words_each, all_words)):
        value, shift = inputs_of_word(x, channels, scales, offsets, word, token, tokens, inputs, COLUMNS)
        sign = signs_of_word(words, block, word, all_words, OUTPUTS, COLUMNS)
        factor = tl.load(factors + (word // group_words).to(tl.int64) * blocks * OUTPUTS + output)
        found += (tl.sum(value[:, :, None] * sign[None, :, :], 1) + shift[:, None]) * factor[None, :]
    place = parts + (split * tokens + token).to(tl.int64)[:, None] * blocks * OUTPUTS + output[None, :]
    tl.store(place, found, mask=(token < tokens)[:, None])


@triton.jit
def plane_many_tokens_kernel(
    x,  # [tokens, inputs]
    channels,  # int32 [columns]
    scales,  # float32 [columns]
    offsets,  # float32 [columns]
    words,  # int32 [blocks, all words, OUTPUTS]
    factors,  # float32 [blocks * OUTPUTS]
    out,  # [tokens, outputs], written
    tokens,
    inputs,
    outputs,
    all_words,
    BFLOAT16: tl.constexpr,
    FLOAT32: tl.constexpr,
    TOKENS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    block = tl.program_id(1)
    token, output = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), block * OUTPUTS + tl.arange(0, OUTPUTS)
    found, added = tl.zeros((TOKENS, OUTPUTS), tl.float32), tl.zeros((TOKENS,), tl.float32)
    for word in range(all_words):
        value, shift = inputs_of_word(x, channels, scales, offsets, word, token, tokens, inputs, COLUMNS)
        sign = signs_of_word(words, block, word, all_words, OUTPUTS, COLUMNS)
        added += shift
        if FLOAT32:
            found += tl.dot(value, sign, input_precision="ieee")
        else:
            found += tl.dot(value.to(tl.bfloat16), sign.to(tl.bfloat16))
    found = (found + added[:, None]) * tl.load(factors + output)[None, :]
    place = out + token.to(tl.int64)[:, None] * outputs + output[None, :]
    stored = as_stored(found, BFLOAT16, out.dtype.element_ty)
    tl.store(place, stored, mask=(token < tokens)[:, None] & (output < outputs)[None, :])


def plane_linear(x: Tensor, planes: Planes) -> Tensor:
    """``x Ŵᵀ``, [tokens, out]; fp32 for a few tokens, else in the type of ``x``.

    Args:
        x: [tokens, in].
        planes: Of the layer.
    """
    tokens, outputs = x.shape[0], planes.shape[0]
    if not planes.columns or not tokens:
        return x.new_zeros(tokens, outputs)
    if x.dtype not in _COMPUTED:
        return reference.plane_linear(x, planes)
    if tokens <= FEW_TOKENS:
        return _few_tokens(x.contiguous(), planes)
    if planes.groups > 1 or planes.columns > _MOST_COLUMNS * (len(planes.starts) - 1):
        wide = torch.promote_types(x.dtype, torch.float32) if x.dtype == torch.float16 else x.dtype
        return (x.to(wide) @ plane_weight(planes, wide).t()).to(x.dtype)
    return _many_tokens(x.contiguous(), planes)


def _few_tokens(x: Tensor, planes: Planes) -> Tensor:
    channels, _, scales, offsets, words, factors = planes.tensors
    blocks, all_words, _ = words.shape
    splits = max(min(_PROGRAMS // blocks, all_words // _LEAST_WORDS), 1)
    each = triton.cdiv(all_words, splits)
    splits = triton.cdiv(all_words, each)
    parts = torch.empty(splits, len(x), blocks * OUTPUTS, dtype=torch.float32, device=x.device)
    plane_few_tokens_kernel[blocks, splits](
        x,
        channels,
        scales,
        offsets,
        words,
        factors,
        parts,
        len(x),
        x.shape[1],
        all_words,
        all_words // planes.groups,
        each,
        TOKENS=power_of_two(len(x)),
        OUTPUTS=OUTPUTS,
        COLUMNS=COLUMNS,
    )
    return parts.sum(0)[:, : planes.shape[0]].contiguous()


def _many_tokens(x: Tensor, planes: Planes) -> Tensor:
    channels, _, scales, offsets, words, factors = planes.tensors
    out = x.new_empty(len(x), planes.shape[0])
    rows = power_of_two(len(x), 16, _TILE_TOKENS)
    plane_many_tokens_kernel[triton.cdiv(len(x), rows), words.shape[0]](
        x=x,
        channels=channels,
        scales=scales,
        offsets=offsets,
        words=words,
        factors=factors,
        **target(out),
        tokens=len(x),
        inputs=x.shape[1],
        outputs=planes.shape[0],
        all_words=words.shape[1],
        FLOAT32=dot_in_float32() or x.dtype != torch.bfloat16,
        TOKENS=rows,
        OUTPUTS=OUTPUTS,
        COLUMNS=COLUMNS,
    )
    return out
