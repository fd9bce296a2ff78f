"""The state quantiser: symmetric integer codes with one scale per input channel.

Scales are stored in a byte. The byte is chosen by the squared error that it leaves: a guess from the channel's largest,
mean and root-mean-square magnitude, then the best of a few bytes around it, in whole numbers, so that every device
finds the same one.

``b`` bits hold the codes -(2^(b-1) - 1) … 2^(b-1) - 1; one bit holds the signs -1 and +1. Rounding toward zero never
enlarges a magnitude, whatever the scale, and neither does clipping: the underestimate property of the sketch
survives (`docs/method.md` §3).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from usllm.sketch.scale import CHANNEL_MANTISSA, encode_scale

# Sums over states count units 19 binary places below a channel's largest magnitude: 24 bits of mantissa less 4.
# Squares of 20 bits leave room for 2^23 states in 64 bits. Exponents (biased) below the least would count subnormals.
DROPPED_BITS = 4
LEAST_EXPONENT = 48
# Larger magnitudes, sums beyond float32 among them, count as this one: a code times its scale stays finite.
LARGEST_MAGNITUDE = 2.0**126

# Bytes that are tried after the guess: steps below the byte that clips nothing, for channels whose few largest states
# carry the error, and steps from the guess, which is nearer in long channels. Chosen so that over five laws of 32 to
# 600 states the mean excess over the best of all bytes stays below 3 % (`tests/sketch/test_quantize.py`).
STEPS_BELOW_FITTING = (1, 3, 5)
STEPS_FROM_GUESS = (-1, 1, -2, 2, -3, 3, -4, 4)
LONG_CHANNEL = 128  # states
STEPS_OF_LONG_CHANNEL = 4  # so many of the steps from the guess
UNCLIPPED_BITS = 16  # so wide states are never clipped
_LARGEST_SHIFT = 24  # of a candidate's unit: beyond it every code is 0

# The scale of least squared error, in mean magnitudes, for normal and for exponential magnitudes (minimised
# numerically on their quantiles; `tests/sketch/test_quantize.py` repeats it). States of wide buckets are close to
# exponential, states of single weights to normal; the ratio of root-mean-square to mean tells where a channel lies.
NORMAL_RATIO, EXPONENTIAL_RATIO = 1.2533, 1.4142
# Beyond exponential tails the optimum of real channels rises half as fast again (measured on SmolLM2-135M).
HEAVY_SLOPE = 0.5
BEST_SCALE = {
    ("toward_zero", 2): (1.10, 1.42),
    ("toward_zero", 3): (0.65, 0.89),
    ("toward_zero", 4): (0.37, 0.55),
    ("nearest", 2): (1.53, 2.00),
    ("nearest", 3): (0.82, 1.16),
    ("nearest", 4): (0.44, 0.69),
}


def largest_code(bits: int) -> int:
    """Largest code of a ``bits``-wide state."""
    return max((1 << (bits - 1)) - 1, 1)


class ChannelSums(NamedTuple):
    """Whole-number sums over the states of each channel, whatever order they are taken in.

    Magnitudes count in units of 2^-19 of the power of two below the channel's largest, rounded down.

    Attributes:
        largest: Largest magnitude, fp32 [channels].
        total: Sum of the magnitudes, int64 [channels].
        squares: Sum of their squares, int64 [channels].
    """

    largest: Tensor
    total: Tensor
    squares: Tensor


def channel_sums(states: Tensor) -> ChannelSums:
    """Sums of each channel.

    Args:
        states: fp32 [channels, states per channel].
    """
    magnitude = _magnitudes(states)
    largest = magnitude.amax(1)
    whole = _whole(magnitude, largest).to(torch.int64)
    return ChannelSums(largest, whole.sum(1), (whole * whole).sum(1))


def _magnitudes(states: Tensor) -> Tensor:
    return states.abs().clamp_max_(LARGEST_MAGNITUDE)


def _whole(magnitude: Tensor, largest: Tensor) -> Tensor:
    """Magnitudes in units of their channel, whole numbers below 2^20, fp32 [channels, states]."""
    per_unit = ((127 + 127 + 23 - DROPPED_BITS - _exponent(largest)) << 23).view(torch.float32)
    return (magnitude * per_unit[:, None]).floor_()


def channel_statistics(sums: ChannelSums, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Largest, mean and root-mean-square magnitude of each channel, fp32 [channels]; the same on every device.

    Args:
        sums: Of the channels.
        count: States of each channel, [channels].
    """
    exponent = _exponent(sums.largest).to(torch.int64) - 127 - 23 + DROPPED_BITS
    unit = ((exponent + 1023) << 52).view(torch.float64)
    mean = sums.total.double() / count * unit
    rms = (sums.squares.double() / count).sqrt() * unit
    return sums.largest, mean.float(), rms.float()


def _exponent(largest: Tensor) -> Tensor:
    return (largest.view(torch.int32) >> 23).clamp_min(LEAST_EXPONENT)


def best_scale(largest: Tensor, mean: Tensor, rms: Tensor, bits: int, rounding: str) -> Tensor:
    """A guess of each channel's scale, fp32 [channels], from :func:`channel_statistics`.

    Narrow codes clip the tail where that lowers the squared error; from 8 bits on the guess clips nothing.

    Args:
        largest, mean, rms: Of the states' magnitudes, each [channels].
        bits: State width.
        rounding: ``toward_zero`` or ``nearest``.
    """
    if bits == 1:  # the least-squares scale of a sign
        return mean
    fitting = largest / largest_code(bits)
    if (rounding, bits) not in BEST_SCALE:
        return fitting
    normal, exponential = BEST_SCALE[rounding, bits]
    ratio = rms / mean.clamp_min(1e-38)
    tail = ((ratio - NORMAL_RATIO) / (EXPONENTIAL_RATIO - NORMAL_RATIO)).clamp_min(0.0)
    tail = tail + HEAVY_SLOPE * (tail - 1.0).clamp_min(0.0)
    return torch.minimum(fitting, mean * (normal + (exponential - normal) * tail))


def scale_codes(states: Tensor, sums: ChannelSums, base: Tensor, bits: int, rounding: str) -> Tensor:
    """The byte of each channel's scale, uint8 [channels].

    Args:
        states: fp32 [channels, states per channel].
        sums: Of these channels.
        base: Base exponent of the layer's scales, uint8 [1].
        bits: State width.
        rounding: ``toward_zero`` or ``nearest``.
    """
    largest, mean, rms = channel_statistics(sums, torch.full_like(sums.total, states.shape[1]))
    guess = best_scale(largest, mean, rms, bits, rounding)
    guess = encode_scale(guess, base, CHANNEL_MANTISSA, up=bits >= 8).int()
    if bits == 1:
        return guess.to(torch.uint8)
    fitting = encode_scale(largest / largest_code(bits), base, CHANNEL_MANTISSA, up=True).int()
    lowest = fitting if bits >= UNCLIPPED_BITS else torch.zeros_like(fitting)
    whole = _whole(_magnitudes(states), largest)
    chosen, least = guess, _squared_error(whole, largest, guess, base, bits, rounding)
    steps = STEPS_FROM_GUESS[:STEPS_OF_LONG_CHANNEL] if states.shape[1] >= LONG_CHANNEL else STEPS_FROM_GUESS
    for candidate in [fitting - step for step in STEPS_BELOW_FITTING] + [guess + step for step in steps]:
        candidate = torch.maximum(candidate, lowest).clamp_max(255)
        error = _squared_error(whole, largest, candidate, base, bits, rounding)
        better = error < least
        chosen, least = candidate.where(better, chosen), error.where(better, least)
    return chosen.to(torch.uint8)


def _squared_error(whole: Tensor, largest: Tensor, code: Tensor, base: Tensor, bits: int, rounding: str) -> Tensor:
    """What scales of these codes leave of each channel, in its units squared, int64 [channels].

    Args:
        whole: Of :func:`_whole`, [channels, states].
        largest: Largest magnitudes, [channels].
        code, base: Of the scales, int32 [channels] and uint8 [1].
        bits, rounding: Of the states.
    """
    top = code + (base.int() << CHANNEL_MANTISSA)
    shift = (top >> CHANNEL_MANTISSA) - _exponent(largest) + (23 - DROPPED_BITS - CHANNEL_MANTISSA)
    mantissa = (1 << CHANNEL_MANTISSA) + (top & ((1 << CHANNEL_MANTISSA) - 1))
    scale = (mantissa << shift.clamp(0, _LARGEST_SHIFT)).float()
    half = 0.5 if rounding == "nearest" else 0.0
    codes = (whole * (1.0 / scale)[:, None]).add_(half).floor_().clamp_max_(largest_code(bits))
    rest = (whole - codes * scale[:, None]).to(torch.int64)
    return (rest * rest).sum(1)


def quantize(states: Tensor, scale: Tensor, bits: int, rounding: str) -> Tensor:
    """Codes, int8 up to 8 bits, else int16, shape of ``states``; ``scale`` broadcasts against it and is positive."""
    dtype = torch.int8 if bits <= 8 else torch.int16
    if bits == 1:
        return (states >= 0).to(dtype).mul_(2).sub_(1)
    limit = largest_code(bits)
    codes = (states / scale).clamp_(-limit, limit)
    return (codes if rounding == "toward_zero" else codes.round_()).to(dtype)  # the cast rounds toward zero
