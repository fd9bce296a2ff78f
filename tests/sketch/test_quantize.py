import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from usllm.sketch.config import STATE_BITS
from usllm.sketch.quantize import (
    UNCLIPPED_BITS,
    best_scale,
    channel_statistics,
    channel_sums,
    largest_code,
    quantize,
    scale_codes,
)
from usllm.sketch.scale import CHANNEL_MANTISSA, OUTPUT_MANTISSA, base_exponent, decode_scale, encode_scale

UNIFORM = (torch.arange(20000) + 0.5) / 20000
QUANTILES = {"normal": torch.erfinv(UNIFORM) * 2**0.5, "exponential": -torch.log1p(-UNIFORM)}


def statistics(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return channel_statistics(channel_sums(states), torch.full((len(states),), states.shape[1]))


def squared_error(values: torch.Tensor, scale: float, bits: int, rounding: str) -> float:
    codes = quantize(values, torch.tensor(scale), bits, rounding)
    return float((codes * scale - values).square().mean())


@pytest.mark.parametrize("rounding", ["toward_zero", "nearest"])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("law", ["normal", "exponential"])
def test_the_scale_is_within_two_percent_of_the_least_error(law: str, bits: int, rounding: str) -> None:
    values = QUANTILES[law]
    chosen = float(best_scale(*statistics(values[None]), bits, rounding)[0])
    least = min(
        squared_error(values, chosen * factor, bits, rounding) for factor in torch.linspace(0.4, 2.5, 200).tolist()
    )
    assert squared_error(values, chosen, bits, rounding) <= 1.02 * least


CHANNELS = 96


def channels_of(law: str, states: int) -> torch.Tensor:
    """States of one law, [channels, states]; channels lie evenly between two powers of two, as do their scales."""
    generator = torch.Generator().manual_seed(states)
    normal = torch.randn(CHANNELS, states, generator=generator)
    drawn = torch.rand(CHANNELS, states, generator=generator).clamp_min(1e-9)
    values = {
        "normal": normal,
        "exponential": -drawn.log() * normal.sign(),
        "heavy": normal * (0.7 * torch.randn(CHANNELS, states, generator=generator)).exp(),
        "least of three": torch.randn(CHANNELS, states, 3, generator=generator).abs().amin(2) * normal.sign(),
        "even": 2 * drawn - 1,
    }[law]
    return values * 2 ** torch.linspace(0, 1, CHANNELS)[:, None]


def errors_of(values: torch.Tensor, code: torch.Tensor, base: torch.Tensor, bits: int, rounding: str) -> torch.Tensor:
    scale = decode_scale(code, base, CHANNEL_MANTISSA)[:, None]
    return (quantize(values, scale, bits, rounding).float() * scale - values).double().square().sum(1)


@pytest.mark.parametrize("states", [32, 200, 600])
@pytest.mark.parametrize("bits", STATE_BITS)
@pytest.mark.parametrize("rounding", ["toward_zero", "nearest"])
def test_the_stored_scale_is_within_three_percent_of_the_best_byte(rounding: str, bits: int, states: int) -> None:
    for law in ("normal", "exponential", "heavy", "least of three", "even"):
        values = channels_of(law, states)
        base = base_exponent(values.abs().amax(), CHANNEL_MANTISSA)
        found = errors_of(values, scale_codes(values, channel_sums(values), base, bits, rounding), base, bits, rounding)
        every = [errors_of(values, torch.full((CHANNELS,), b), base, bits, rounding) for b in range(60, 256)]
        excess = found / torch.stack(every).amin(0)
        assert float(excess.mean()) <= 1.03, law


def test_the_widest_states_are_stored_unclipped() -> None:
    values = channels_of("heavy", 300)
    base = base_exponent(values.abs().amax(), CHANNEL_MANTISSA)
    codes = scale_codes(values, channel_sums(values), base, UNCLIPPED_BITS, "nearest")
    scale = decode_scale(codes, base, CHANNEL_MANTISSA)[:, None]
    assert bool((values.abs() <= scale * largest_code(UNCLIPPED_BITS)).all())


@given(st.integers(-60, 60), st.integers(0, 1000))
@settings(deadline=None)
def test_statistics_are_those_of_the_magnitudes_in_any_order(exponent: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(4, 60, generator=generator) * 2.0**exponent
    largest, mean, rms = statistics(values)
    assert torch.equal(largest, values.abs().amax(1))
    torch.testing.assert_close(mean, values.abs().mean(1), rtol=1e-4, atol=0)
    torch.testing.assert_close(rms, values.double().square().mean(1).sqrt().float(), rtol=1e-4, atol=0)
    shuffled = values[:, torch.randperm(60, generator=generator)]
    assert all(torch.equal(a, b) for a, b in zip(channel_sums(values), channel_sums(shuffled), strict=True))


def test_statistics_of_zeros_and_subnormals_are_zero() -> None:
    largest, mean, rms = statistics(torch.tensor([[0.0, 0.0], [1e-40, -1e-41]]))
    assert largest.tolist()[0] == 0.0
    assert mean.tolist() == rms.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("bits", [8, 16])
def test_wide_states_are_never_clipped(bits: int) -> None:
    values = torch.randn(5, 300)
    scale = best_scale(*statistics(values), bits, "nearest")[:, None]
    assert bool(((quantize(values, scale, bits, "nearest") * scale - values).abs() <= 0.505 * scale).all())


@given(st.floats(1e-6, 1e3), st.sampled_from([1, 2, 3, 4, 8, 16]), st.sampled_from(["toward_zero", "nearest"]))
@settings(deadline=None)
def test_codes_fit_their_width(scale: float, bits: int, rounding: str) -> None:
    codes = quantize(torch.linspace(-50, 50, 101), torch.tensor(scale), bits, rounding)
    assert int(codes.abs().max()) <= largest_code(bits)
    assert largest_code(bits) <= 2 ** (bits - 1)
    if bits == 1:
        assert set(codes.tolist()) <= {-1, 1}


@given(st.floats(1e-6, 1e6), st.sampled_from([CHANNEL_MANTISSA, OUTPUT_MANTISSA]))
@settings(deadline=None)
def test_a_stored_scale_is_the_nearest_one(value: float, mantissa: int) -> None:
    scale = torch.tensor([value], dtype=torch.float32)
    base = base_exponent(scale[0], mantissa)
    assert abs(float(decode_scale(encode_scale(scale, base, mantissa), base, mantissa)) / value - 1) <= 2.0 ** -(
        mantissa + 1
    )
    up = float(decode_scale(encode_scale(scale, base, mantissa, up=True), base, mantissa))
    assert value * (1 - 1e-6) <= up <= value * (1 + 2.0**-mantissa)


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-40, 1e-30])
def test_every_stored_scale_is_a_positive_normal_number(value: float) -> None:
    largest = torch.tensor(value)
    base = base_exponent(largest, CHANNEL_MANTISSA)
    codes = torch.arange(256)
    assert float(decode_scale(codes, base, CHANNEL_MANTISSA).min()) >= torch.finfo(torch.float32).tiny


def test_scales_far_below_the_largest_are_clamped_not_wrapped() -> None:
    scales = torch.tensor([1.0, 1e-30, 0.0])
    base = base_exponent(scales.amax(), CHANNEL_MANTISSA)
    decoded = decode_scale(encode_scale(scales, base, CHANNEL_MANTISSA), base, CHANNEL_MANTISSA)
    assert float(decoded[0]) == 1.0
    assert 0 < float(decoded[1]) == float(decoded[2]) < 1e-9
