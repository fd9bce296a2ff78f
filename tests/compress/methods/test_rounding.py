"""Rounding: the nearest of the levels that its stored scale gives, asked by width, counted to the byte."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy_rounding import decode
from torch import Tensor

from usllm.compress import Statistics
from usllm.compress.methods.rounding import RoundingCompressor, RoundingPlan
from usllm.rounding import RoundingConfig
from usllm.rounding.config import WIDTHS
from usllm.system.errors import PackedFormatError

NOTHING = Statistics(None)


def weight_of(shape: tuple[int, int], seed: int = 0) -> Tensor:
    """Rows of different sizes, with a tail."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) ** 3 * torch.rand(shape[0], 1, generator=generator)


def planned(shape: tuple[int, int], **options: object) -> RoundingPlan:
    compressor = RoundingCompressor(RoundingConfig(**options))  # type: ignore[arg-type]
    return compressor.plan(shape, "layer", NOTHING, compressor.most_bits(shape))


@given(
    shape=st.tuples(st.integers(1, 19), st.integers(1, 37)),
    bits=st.sampled_from(WIDTHS),
    group_size=st.none() | st.integers(1, 40),
    scales=st.sampled_from(["least_squares", "clipped"]),
    seed=st.integers(0, 9),
)
@settings(max_examples=80, deadline=None)
def test_second_reader_decodes_the_same_bits(
    shape: tuple[int, int], bits: int, group_size: int | None, scales: str, seed: int
) -> None:
    plan = planned(shape, bits=bits, group_size=group_size, scales=scales)
    weight = weight_of(shape, seed)
    states = plan.encode({"weight": weight}).states
    found = decode(plan.pack(states).numpy().tobytes(), shape, group_size)
    read = plan.compressor.read(plan.pack(states), shape, "layer")
    assert torch.equal(read.pack(read.unpack(plan.pack(states))), plan.pack(states))
    for expected in (plan.decode(states), plan.decode_latents({"weight": weight})):
        assert np.array_equal(found.view(np.int32), expected.numpy().view(np.int32))


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("value", [0.0, 1e-30, 1e30])
def test_weights_that_fp16_scales_cannot_hold_stay_finite(bits: int, value: float) -> None:
    plan = planned((2, 9), bits=bits)
    weight = torch.full((2, 9), value)
    states = plan.encode({"weight": weight}).states
    assert plan.decode(states).isfinite().all()
    assert plan.compressor.read(plan.pack(states), (2, 9), "layer").bits == bits


def test_one_bit_and_a_scale_a_row_are_counted_strictly() -> None:
    assert round(planned((576, 576), bits=1).bits_per_weight, 3) == 1.028
    plan = planned((576, 576), bits=1, group_size=64)
    assert plan.total_bits == 32 + 16 * 576 * 9 + 576 * 576


@pytest.mark.parametrize(
    ("rate", "width"), [(1.1, 1), (2.1, 2), (3.0, 2), (3.1, 3), (4.5, 4), (8.0, 4), (8.1, 8), (16, 8)]
)
def test_ceiling_takes_the_widest_width_that_fits(rate: float, width: int) -> None:
    shape = (64, 576)
    compressor = RoundingCompressor(RoundingConfig(bits_per_weight=rate))
    plan = compressor.plan(shape, "layer", NOTHING, int(rate * 64 * 576))
    assert plan.bits == width
    assert plan.bits_per_weight <= rate


def test_ceiling_that_is_too_low_is_refused_with_the_least_rate_which_works() -> None:
    for options, width in (({}, 1), ({"bits": 3}, 3)):
        rate = width + 0.01
        compressor = RoundingCompressor(RoundingConfig(bits_per_weight=rate, **options))  # type: ignore[arg-type]
        with pytest.raises(
            ValueError, match=rf"sketch.bits_per_weight={rate}: layer \(64x576\) needs (\S+) "
        ) as raised:
            compressor.plan((64, 576), "layer", NOTHING, int(rate * 64 * 576))
        least = float(str(raised.value).split("needs ")[1].split()[0])
        compressor = RoundingCompressor(RoundingConfig(bits_per_weight=least, **options))  # type: ignore[arg-type]
        assert compressor.plan((64, 576), "layer", NOTHING, int(least * 64 * 576)).bits == width


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda data: data[:3], "too few"),
        (lambda data: data[:-1], "asks for"),
        (lambda data: torch.cat([data, data[:1]]), "asks for"),
        (lambda data: torch.cat([torch.tensor([5], dtype=torch.uint8), data[1:]]), "header"),
        (lambda data: torch.cat([data[:2], data[:1], data[3:]]), "header"),
        (lambda data: torch.cat([data[:5], torch.tensor([0x7C], dtype=torch.uint8), data[6:]]), "not finite"),
        (lambda data: torch.cat([data[:5], torch.tensor([0x80], dtype=torch.uint8), data[6:]]), "negative"),
        (lambda data: torch.cat([data[:-1], data[-1:] | 0x80]), "after the end"),
        (lambda data: data.float(), "vector of bytes"),
    ],
)
def test_damaged_layer_is_refused(damage: object, said: str) -> None:
    plan = planned((3, 7), bits=3)
    data = plan.pack(plan.encode({"weight": weight_of((3, 7))}).states)
    with pytest.raises(PackedFormatError, match=f"^layer: .*{said}"):
        plan.compressor.read(damage(data), (3, 7), "layer")  # type: ignore[operator]


@pytest.mark.parametrize("stored", [{}, {"group_size": 4, "zero_points": True}, {"group_size": "4"}])
def test_unknown_missing_or_impossible_format_is_refused_by_name(stored: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"zero_points|group_size"):
        RoundingCompressor.from_format(stored, {"bits": 4})
