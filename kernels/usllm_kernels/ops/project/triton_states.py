"""Codes and scales from the values of states on CUDA, in two kernels and no step on the host.

The first sums up each channel in whole numbers, so that no result depends on an order, and finds the layer's largest
magnitude; the second chooses the channel's scale as :func:`usllm.sketch.codec.store_scales` does, and quantises.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# Annotations mean something else to Triton.

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from usllm.sketch import Plan
from usllm.sketch.codec import States
from usllm.sketch.quantize import (
    DROPPED_BITS,
    LARGEST_MAGNITUDE,
    LEAST_EXPONENT,
    LONG_CHANNEL,
    STEPS_BELOW_FITTING,
    STEPS_FROM_GUESS,
    STEPS_OF_LONG_CHANNEL,
    UNCLIPPED_BITS,
)
from usllm.sketch.scale import CHANNEL_MANTISSA
from usllm_kernels.launch import power_of_two
from usllm_kernels.tables import Tables, best_scales, scale_ratios
from usllm_kernels.triton_tile import stored_scale

MAGNITUDE = tl.constexpr(0x7FFFFFFE)  # of a key; its lowest bit is the sign
_DROPPED_BITS = tl.constexpr(DROPPED_BITS)
_LEAST_EXPONENT = tl.constexpr(LEAST_EXPONENT)
_LARGEST = tl.constexpr(int(torch.tensor(LARGEST_MAGNITUDE).view(torch.int32)))
_UNCLIPPED_BITS = tl.constexpr(UNCLIPPED_BITS)
_LARGEST_SHIFT = tl.constexpr(24)
_LONG_CHANNEL = tl.constexpr(LONG_CHANNEL)
_BELOW_FITTING = tl.constexpr(len(STEPS_BELOW_FITTING))
_TRIED = tl.constexpr(len(STEPS_BELOW_FITTING) + len(STEPS_FROM_GUESS))
_TRIED_OF_LONG_CHANNEL = tl.constexpr(len(STEPS_BELOW_FITTING) + STEPS_OF_LONG_CHANNEL)
_MANTISSA = tl.constexpr(CHANNEL_MANTISSA)
_ONE = tl.constexpr(1 << CHANNEL_MANTISSA)  # the hidden bit of a top's mantissa
_SHIFT = tl.constexpr(23 - CHANNEL_MANTISSA)  # of a scale's top within float32
_UP, _HALF = tl.constexpr((1 << (23 - CHANNEL_MANTISSA)) - 1), tl.constexpr(1 << (22 - CHANNEL_MANTISSA))
_UNIT_SHIFT = tl.constexpr(23 - DROPPED_BITS - CHANNEL_MANTISSA)  # of a scale counted in units of its channel
_OCTAVES = tl.constexpr(256 >> CHANNEL_MANTISSA)  # that a byte spans
_LEAST_MEAN = tl.constexpr(1e-38)
_HALVES = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and subtracting it rounds to nearest even


@triton.jit
def as_bits(value, KEYS: tl.constexpr):
    """Bit patterns of float32: keys hold the magnitude above and the sign in the lowest bit."""
    if KEYS:
        return (value & MAGNITUDE) | (value << 31)
    return value.to(tl.int32, bitcast=True)


@triton.jit
def whole_magnitude(value, exponent, KEYS: tl.constexpr):
    """Magnitudes in units of their channel, int32 below 2^20; ``exponent`` is the unit's, of float32 with its bias."""
    bits = tl.minimum(as_bits(value, KEYS) & 0x7FFFFFFF, _LARGEST)
    return ((bits & 0x7FFFFF) | 0x800000) >> tl.minimum(exponent - (bits >> 23), 31)


@triton.jit
def sums_kernel(
    values,
    first_state,
    count,
    largest,  # int32 [channels with states], bit patterns, written
    highest,  # int32 [1], raised to the largest of them
    total,  # int64, written
    squares,  # int64, written
    KEYS: tl.constexpr,
    STATES: tl.constexpr,
):
    active_index = tl.program_id(0)
    first, states = tl.load(first_state + active_index), tl.load(count + active_index)
    most = tl.zeros((STATES,), tl.int32)
    for part in range(tl.cdiv(states, STATES)):
        k = part * STATES + tl.arange(0, STATES)
        bits = as_bits(tl.load(values + first + k, mask=k < states, other=0), KEYS) & 0x7FFFFFFF
        most = tl.maximum(most, bits)
    peak = tl.minimum(tl.max(most, 0), _LARGEST)
    exponent = tl.maximum(peak >> 23, _LEAST_EXPONENT) + _DROPPED_BITS
    one = tl.zeros((STATES,), tl.int64)
    two = tl.zeros((STATES,), tl.int64)
    for part in range(tl.cdiv(states, STATES)):
        k = part * STATES + tl.arange(0, STATES)
        live = k < states
        magnitude = whole_magnitude(tl.load(values + first + k, mask=live, other=0), exponent, KEYS)
        magnitude = tl.where(live, magnitude, 0).to(tl.int64)
        one += magnitude
        two += magnitude * magnitude
    tl.store(largest + active_index, peak)
    tl.atomic_max(highest, peak)
    tl.store(total + active_index, tl.sum(one, 0))
    tl.store(squares + active_index, tl.sum(two, 0))


@triton.jit
def best_scale(largest, total, squares, states, width, best, ratios):
    """The scale of least error, float32, from the sums of a channel (:func:`usllm.sketch.quantize.best_scale`)."""
    exponent = tl.maximum(largest >> 23, _LEAST_EXPONENT) - 150 + _DROPPED_BITS
    unit = ((exponent + 1023).to(tl.int64) << 52).to(tl.float64, bitcast=True)
    mean = (total.to(tl.float64) / states.to(tl.float64) * unit).to(tl.float32)
    rms = (tl.sqrt(squares.to(tl.float64) / states.to(tl.float64)) * unit).to(tl.float32)
    limit = tl.maximum((1 << (width - 1)) - 1, 1).to(tl.float32)
    fitting = tl.div_rn(largest.to(tl.float32, bitcast=True), limit)
    normal, more = tl.load(best + 2 * width), tl.load(best + 2 * width + 1)
    first, between, slope = tl.load(ratios), tl.load(ratios + 1), tl.load(ratios + 2)
    # Triton 3.6 takes so small a active_index for a float64: brought back, it is the same one.
    ratio = tl.div_rn(rms, tl.maximum(mean, _LEAST_MEAN).to(tl.float32))
    tail = tl.maximum(tl.div_rn(ratio - first, between), 0.0)
    tail += slope * tl.maximum(tail - 1.0, 0.0)
    clipped = tl.minimum(fitting, mean * (normal + more * tail))
    return tl.where(width == 1, mean, tl.where(normal > 0.0, clipped, fitting))


@triton.jit
def scale_code(chosen, lowest, up):
    """The byte of a scale, int32: rounded to nearest, or up."""
    top = (chosen.to(tl.int32, bitcast=True) + tl.where(up, _UP, _HALF)) >> _SHIFT
    return tl.minimum(tl.maximum(top - (lowest << _MANTISSA), 0), 255)


@triton.jit
def squared_error(
    values, first, states, exponent, top, limit, KEYS: tl.constexpr, NEAREST: tl.constexpr, STATES: tl.constexpr
):
    """What a scale leaves of a channel, in its units squared, int64; every step but the quotient is exact."""
    shift = (top >> _MANTISSA) - exponent + _UNIT_SHIFT
    mantissa = (top & (_ONE - 1)) + _ONE
    scale = (mantissa << tl.minimum(tl.maximum(shift, 0), _LARGEST_SHIFT)).to(tl.float32)
    per_scale = tl.div_rn(1.0, scale)
    total = tl.zeros((STATES,), tl.int64)
    for part in range(tl.cdiv(states, STATES)):
        k = part * STATES + tl.arange(0, STATES)
        live = k < states
        value = tl.load(values + first + k, mask=live, other=0)
        whole = tl.where(live, whole_magnitude(value, exponent + _DROPPED_BITS, KEYS), 0).to(tl.float32)
        code = whole * per_scale
        if NEAREST:
            code += 0.5
        code = tl.minimum(tl.floor(code), limit)
        rest = (whole - code * scale).to(tl.int32).to(tl.int64)
        total += rest * rest
    return tl.sum(total, 0)


@triton.jit
def least_error(
    values,
    first,
    states,
    exponent,
    guess,
    fitting,
    floor,
    lowest,
    limit,
    steps,  # int32 [tried] (:func:`scale_steps`)
    KEYS: tl.constexpr,
    NEAREST: tl.constexpr,
    STATES: tl.constexpr,
):
    """The byte of least squared error of those that are tried (:func:`usllm.sketch.quantize.scale_codes`)."""
    base = lowest << _MANTISSA
    chosen = guess
    least = squared_error(values, first, states, exponent, guess + base, limit, KEYS, NEAREST, STATES)
    for tried in range(tl.where(states >= _LONG_CHANNEL, _TRIED_OF_LONG_CHANNEL, _TRIED)):
        start = tl.where(tried < _BELOW_FITTING, fitting, guess)
        candidate = tl.minimum(tl.maximum(start + tl.load(steps + tried), floor), 255)
        error = squared_error(values, first, states, exponent, candidate + base, limit, KEYS, NEAREST, STATES)
        chosen = tl.where(error < least, candidate, chosen)
        least = tl.minimum(error, least)
    return chosen


@triton.jit
def quantize_kernel(
    values,
    codes,  # int8 or int16 [states], written
    scales,  # uint8 [channels with states], written
    scale_base,  # uint8 [1], written
    first_state,
    count,
    bits,
    largest,
    highest,
    total,
    squares,
    best,  # float32 [17, 2] (:func:`usllm_kernels.tables.best_scales`)
    ratios,  # float32 [3]
    steps,  # int32 [tried] (:func:`scale_steps`)
    KEYS: tl.constexpr,
    NEAREST: tl.constexpr,
    STATES: tl.constexpr,
):
    active_index = tl.program_id(0)
    states, width = tl.load(count + active_index), tl.load(bits + active_index)
    first = tl.load(first_state + active_index)
    lowest = tl.minimum(tl.maximum(((tl.load(highest) + _UP) >> 23) - _OCTAVES + 1, 1), 254)
    if active_index == 0:
        tl.store(scale_base, lowest.to(tl.uint8))
    peak = tl.load(largest + active_index)
    chosen = best_scale(
        peak, tl.load(total + active_index), tl.load(squares + active_index), states, width, best, ratios
    )
    limit = tl.maximum((1 << (width - 1)) - 1, 1).to(tl.float32)
    stored = scale_code(chosen, lowest, width >= 8)
    if width > 1:
        fitting = scale_code(tl.div_rn(peak.to(tl.float32, bitcast=True), limit), lowest, True)
        stored = least_error(
            values,
            first,
            states,
            tl.maximum(peak >> 23, _LEAST_EXPONENT),
            stored,
            fitting,
            tl.where(width >= _UNCLIPPED_BITS, fitting, 0),
            lowest,
            limit,
            steps,
            KEYS,
            NEAREST,
            STATES,
        )
    tl.store(scales + active_index, stored.to(tl.uint8))
    scale = stored_scale(stored, lowest, _MANTISSA)
    for part in range(tl.cdiv(states, STATES)):
        k = part * STATES + tl.arange(0, STATES)
        live = k < states
        value = as_bits(tl.load(values + first + k, mask=live, other=0), KEYS).to(tl.float32, bitcast=True)
        inside = tl.minimum(tl.maximum(tl.div_rn(value, scale), -limit), limit)
        if NEAREST:
            inside = (inside + _HALVES) - _HALVES
        code = tl.where(width == 1, tl.where(value >= 0.0, 1, -1), inside.to(tl.int32))
        tl.store(codes + first + k, code.to(codes.dtype.element_ty), mask=live)


@lru_cache(maxsize=8)
def scale_steps(device: torch.device) -> Tensor:
    """Steps of the bytes that are tried after the guess, int32: from the fitting one, then from the guess."""
    below = tuple(-step for step in STEPS_BELOW_FITTING)
    return torch.tensor(below + STEPS_FROM_GUESS, dtype=torch.int32).to(device)


def store_states(values: Tensor, plan: Plan, known: Tables, states: States, *, keys: bool) -> None:
    """Choose scales and quantise.

    Args:
        values: Of the states, int32 keys or float32 [states].
        plan: A plan with states.
        known: Its tables.
        states: Their ``codes``, ``scales`` and ``scale_base`` are written.
        keys: Whether values are keys: the magnitude's bits above, the sign in the lowest.
    """
    device = values.device
    total, squares = torch.empty(2, plan.num_active, dtype=torch.int64, device=device)
    largest = torch.empty(plan.num_active, dtype=torch.int32, device=device)
    highest = torch.zeros(1, dtype=torch.int32, device=device)
    block = power_of_two(max(block.states_per_channel for block in plan.blocks), 16, 1024)
    grid = (plan.num_active,)
    places = known.first_state, known.sizes
    sums_kernel[grid](values, *places, largest, highest, total, squares, KEYS=keys, STATES=block)
    quantize_kernel[grid](
        values,
        states["codes"],
        states["scales"],
        states["scale_base"],
        *places,
        known.bits,
        largest,
        highest,
        total,
        squares,
        best_scales(plan.config.rounding, device),
        scale_ratios(device),
        scale_steps(device),
        KEYS=keys,
        NEAREST=plan.config.rounding == "nearest",
        STATES=block,
        enable_fp_fusion=False,  # a product and a sum in one rounding would choose other scales
    )
