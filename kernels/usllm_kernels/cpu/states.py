"""Compiled loops over the states of a layer: statistics of each channel, and quantisation."""

from __future__ import annotations

from typing import Any

import numpy as np

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
from usllm_kernels.cpu.compiled import compiled
from usllm_kernels.cpu.lanes import LANES, add, load, multiply, store
from usllm_kernels.cpu.tiles import as_floats

_MANTISSA, _HIDDEN = np.int32(0x7FFFFF), np.int32(0x800000)
_LARGEST = np.float32(LARGEST_MAGNITUDE).view(np.int32)
_LEAST = np.int32(LEAST_EXPONENT)  # that a channel's unit is derived from
_DROPPED = np.int32(DROPPED_BITS)  # mantissa bits below the unit of the largest magnitude
_TOP_MANTISSA = np.int32(CHANNEL_MANTISSA)
_TOP_SHIFT = np.int32(23 - CHANNEL_MANTISSA)  # of a scale's top within float32
_UP, _HALF = (np.int32(1) << _TOP_SHIFT) - np.int32(1), np.int32(1) << (_TOP_SHIFT - np.int32(1))
_LARGEST_SHIFT = np.int32(24)


@compiled
def channel_sums(
    values: Any,  # int32 [states], magnitudes as float32 bit patterns under the mask
    mask: int,
    class_sizes: Any,  # int64 [classes, 4]: channels, first state, states per channel, bits
    largest: Any,  # int32 [channels], written: bit patterns
    total: Any,  # int64 [channels], written
    squares: Any,  # int64 [channels], written
) -> None:
    """What :func:`usllm.sketch.quantize.channel_sums` gives; sums of integers, so that no order matters."""
    active_index = 0
    for class_index in range(class_sizes.shape[0]):
        place, count = class_sizes[class_index, 1], class_sizes[class_index, 2]
        for _ in range(class_sizes[class_index, 0]):
            part = values[place : place + count]
            most = np.int32(0)
            for k in range(count):
                most = max(most, part[k] & np.int32(mask))
            most = min(most, _LARGEST)
            exponent = max(most >> np.int32(23), _LEAST) + _DROPPED
            one, two = np.int64(0), np.int64(0)
            for k in range(count):
                bits = min(part[k] & np.int32(mask), _LARGEST)
                shift = min(exponent - (bits >> np.int32(23)), np.int32(31))
                magnitude = np.int64(((bits & _MANTISSA) | _HIDDEN) >> shift)
                one += magnitude
                two += magnitude * magnitude
            largest[active_index], total[active_index], squares[active_index] = most, one, two
            place += count
            active_index += 1


@compiled
def choose_scales(
    values: Any,  # as for channel_sums
    mask: int,
    largest: Any,  # float32 [channels]
    total: Any,  # int64 [channels]
    squares: Any,  # int64 [channels]
    class_sizes: Any,  # int64 [classes, 4]: channels, first state, states per channel, bits
    best: Any,  # float32 [17, 2] (:func:`usllm_kernels.tables.best_scales`)
    ratios: Any,  # float32 [3] (:func:`usllm_kernels.tables.scale_ratios`)
    nearest: bool,
    base: Any,  # uint8 [1], written
    stored: Any,  # uint8 [channels], written
    scales: Any,  # float32 [channels], written: as they will be decoded
) -> None:
    """What :func:`usllm.sketch.codec.store_scales` gives."""
    channels = largest.shape[0]
    bits = largest.view(np.int32)
    most = np.int32(0)
    for active_index in range(channels):
        most = max(most, bits[active_index])
    lowest = max(((most + _UP) >> np.int32(23)) - np.int32((256 >> CHANNEL_MANTISSA) - 1), np.int32(1))
    lowest = min(lowest, np.int32(254))
    base[0] = lowest
    first_top = lowest << _TOP_MANTISSA
    longest = 0
    for class_index in range(class_sizes.shape[0]):
        longest = max(longest, class_sizes[class_index, 2])
    whole = np.empty(longest, np.float32)
    unit_bits = np.empty(1, np.int64)
    unit = unit_bits.view(np.float64)
    chosen = np.empty(1, np.float32)
    chosen_bits, decoded = chosen.view(np.int32), scales.view(np.int32)
    active_index = 0
    for class_index in range(class_sizes.shape[0]):
        place, count, width = class_sizes[class_index, 1], class_sizes[class_index, 2], class_sizes[class_index, 3]
        limit = np.float32(max((1 << (width - 1)) - 1, 1))
        normal, more = best[width, 0], best[width, 1]
        for _ in range(class_sizes[class_index, 0]):
            unit_bits[0] = np.int64(max(bits[active_index] >> np.int32(23), _LEAST) - 150 + _DROPPED + 1023) << 52
            mean = np.float32(np.float64(total[active_index]) / np.float64(count) * unit[0])
            rms = np.float32(np.sqrt(np.float64(squares[active_index]) / np.float64(count)) * unit[0])
            chosen[0] = largest[active_index] / limit
            fitting = min(max(((chosen_bits[0] + _UP) >> _TOP_SHIFT) - first_top, np.int32(0)), np.int32(255))
            if width == 1:
                chosen[0] = mean
            elif normal > np.float32(0.0):
                ratio = rms / max(mean, np.float32(1e-38))
                tail = max((ratio - ratios[0]) / ratios[1], np.float32(0.0))
                tail = tail + ratios[2] * max(tail - np.float32(1.0), np.float32(0.0))
                chosen[0] = min(chosen[0], mean * (normal + more * tail))
            top = (chosen_bits[0] + (_UP if width >= 8 else _HALF)) >> _TOP_SHIFT
            code = min(max(top - first_top, np.int32(0)), np.int32(255))
            if width > 1:
                exponent = max(bits[active_index] >> np.int32(23), _LEAST)
                _whole_magnitudes(values[place : place + count], mask, exponent, whole)
                floor = fitting if width >= UNCLIPPED_BITS else np.int32(0)
                code = _least_error(whole[:count], exponent, code, fitting, floor, first_top, limit, nearest)
            stored[active_index] = code
            decoded[active_index] = (code + first_top) << _TOP_SHIFT
            place += count
            active_index += 1


@compiled
def _whole_magnitudes(part: Any, mask: int, exponent: int, whole: Any) -> None:
    """Magnitudes in units of their channel, whole numbers below 2^20, as float32."""
    for k in range(part.shape[0]):
        bits = min(part[k] & np.int32(mask), _LARGEST)
        shift = min(exponent + _DROPPED - (bits >> np.int32(23)), np.int32(31))
        whole[k] = np.float32(((bits & _MANTISSA) | _HIDDEN) >> shift)


@compiled
def _least_error(
    whole: Any, exponent: int, guess: int, fitting: int, floor: int, first_top: int, limit: Any, nearest: bool
) -> int:
    """The byte of least squared error of those that are tried (:func:`usllm.sketch.quantize.scale_codes`)."""
    half = np.float32(0.5 if nearest else 0.0)
    chosen, least = guess, _squared_error(whole, exponent, guess + first_top, limit, half)
    for step in STEPS_BELOW_FITTING:
        candidate = np.int32(min(max(fitting - step, floor), 255))
        error = _squared_error(whole, exponent, candidate + first_top, limit, half)
        if error < least:
            chosen, least = candidate, error
    for tried in range(STEPS_OF_LONG_CHANNEL if whole.shape[0] >= LONG_CHANNEL else len(STEPS_FROM_GUESS)):
        candidate = np.int32(min(max(guess + STEPS_FROM_GUESS[tried], floor), 255))
        error = _squared_error(whole, exponent, candidate + first_top, limit, half)
        if error < least:
            chosen, least = candidate, error
    return chosen


@compiled
def _squared_error(whole: Any, exponent: int, top: int, limit: Any, half: Any) -> int:
    """What a scale leaves of a channel, in its units squared; every step but the quotient is exact."""
    shift = (top >> _TOP_MANTISSA) - exponent + np.int32(23 - DROPPED_BITS - CHANNEL_MANTISSA)
    mantissa = np.int32(1 << CHANNEL_MANTISSA) + (top & np.int32((1 << CHANNEL_MANTISSA) - 1))
    scale = np.float32(np.int32(mantissa) << min(max(shift, np.int32(0)), _LARGEST_SHIFT))
    per_scale = np.float32(1.0) / scale
    total = np.int64(0)
    for k in range(whole.shape[0]):
        code = min(np.floor(whole[k] * per_scale + half), limit)
        rest = np.int64(np.int32(whole[k] - code * scale))
        total += rest * rest
    return total


@compiled
def quantize_states(
    values: Any,  # int32 [states]: keys (magnitude above, sign in the lowest bit) or float32 bit patterns
    keys: bool,
    class_sizes: Any,  # int64 [classes, 4]
    scales: Any,  # float32 [channels]
    nearest: bool,
    codes: Any,  # int8 or int16 [states], written
) -> None:
    """Codes of all states (:func:`usllm.sketch.quantize.quantize`); ``values`` become float32 bit patterns."""
    if keys:
        for k in range(values.shape[0]):
            value = values[k]
            values[k] = (value & np.int32(0x7FFFFFFE)) | (value << np.int32(31))
    numbers = values.view(np.float32)
    active_index = 0
    for class_index in range(class_sizes.shape[0]):
        place, count, width = class_sizes[class_index, 1], class_sizes[class_index, 2], class_sizes[class_index, 3]
        limit = np.float32((1 << (width - 1)) - 1)
        for _ in range(class_sizes[class_index, 0]):
            scale = scales[active_index]
            part, to = numbers[place : place + count], codes[place : place + count]
            if width == 1:
                for k in range(count):
                    to[k] = 1 if part[k] >= np.float32(0.0) else -1
            elif nearest:
                for k in range(count):
                    to[k] = np.int32(np.rint(min(max(part[k] / scale, -limit), limit)))
            else:
                for k in range(count):
                    to[k] = np.int32(min(max(part[k] / scale, -limit), limit))
            place += count
            active_index += 1


@compiled
def output_sums(
    weight: Any,  # float32, flat
    pitch: int,  # elements from one output row to the next
    decoded: Any,  # float32 [out, in]
    second_moment: Any,  # float32 [in]
    product: Any,  # float64 [out], written
    square: Any,  # float64 [out], written
) -> None:
    """What :func:`usllm.sketch.codec.output_sums` gives; eight sums a row, so that none waits for another."""
    rows, width = decoded.shape
    whole = width // LANES * LANES
    eight, zeros = np.empty(LANES), np.zeros(LANES)
    for row in range(rows):
        products, squares = load(zeros, 0), load(zeros, 0)
        for channel in range(0, whole, LANES):
            made = load(decoded, row * width + channel)
            weighted = multiply(made, load(second_moment, channel))
            latent = load(weight, row * pitch + channel)
            products = add(products, as_floats(multiply(weighted, latent), zeros))
            squares = add(squares, as_floats(multiply(weighted, made), zeros))
        store(eight, 0, products)
        product[row] = eight.sum()
        store(eight, 0, squares)
        square[row] = eight.sum()
        for channel in range(whole, width):
            made_one = decoded[row, channel]
            weighted_one = made_one * second_moment[channel]
            product[row] += np.float64(weighted_one * weight[row * pitch + channel])
            square[row] += np.float64(weighted_one * made_one)
