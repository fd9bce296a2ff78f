"""Scales have the least squared error that is to be had, whatever a row holds; codes are the nearest for them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from usllm.rounding.codes import largest_level, nearest_levels, over_columns, to_codes, to_levels
from usllm.rounding.config import SCALES, WIDTHS
from usllm.rounding.scales import fit_scales


def random(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded(weight: Tensor, bits: int, kind: str, size: int | None = None) -> Tensor:
    wide = over_columns(fit_scales(weight, bits, size, kind), weight.shape[1], size)
    return nearest_levels(weight, wide, bits) * wide


@pytest.mark.parametrize("kind", SCALES)
@pytest.mark.parametrize("bits", WIDTHS)
def test_no_other_level_is_nearer_and_codes_hold_the_levels(bits: int, kind: str) -> None:
    weight = random(7, 50) ** 3
    wide = over_columns(fit_scales(weight, bits, 16, kind), 50, 16)
    found = nearest_levels(weight, wide, bits)
    levels = torch.arange(-largest_level(bits), largest_level(bits) + 1, 2)
    least = (weight[..., None] - wide[..., None] * levels).abs().amin(2)
    torch.testing.assert_close((weight - found * wide).abs(), least, atol=1e-7, rtol=0)
    codes = to_codes(found, bits)
    assert int(codes.max()) < 1 << bits
    assert torch.equal(to_levels(codes, bits), found)


def test_groups_are_fitted_on_their_own_and_the_last_one_may_be_shorter() -> None:
    weight = random(5, 37)
    scales = fit_scales(weight, 3, 16, "least_squares")
    parts = [fit_scales(part, 3, None, "least_squares") for part in weight.split(16, 1)]
    assert torch.equal(scales, torch.cat(parts, 1))
    assert torch.equal(fit_scales(weight, 3, 99, "clipped"), fit_scales(weight, 3, None, "clipped"))


def test_one_bit_is_sign_times_mean_magnitude() -> None:
    weight = random(5, 33)
    expected = torch.where(weight < 0, -1.0, 1.0) * weight.abs().mean(1, keepdim=True).half().float()
    assert torch.equal(rounded(weight, 1, "least_squares"), expected)


@pytest.mark.parametrize("bits", WIDTHS)
def test_least_squares_is_no_worse_than_clipping_and_near_the_best_of_a_fine_grid(bits: int) -> None:
    weight = random(24, 512)
    error = {kind: float((weight - rounded(weight, bits, kind)).square().sum()) for kind in SCALES}
    best = torch.full((24,), torch.inf)
    for ratio in torch.linspace(0.05, 1.0, 191):
        scale = weight.abs().amax(1, keepdim=True) * ratio / largest_level(bits)
        best = torch.minimum(best, (weight - scale * nearest_levels(weight, scale, bits)).square().sum(1))
    assert error["least_squares"] <= error["clipped"] * 1.001
    assert error["least_squares"] <= float(best.sum()) * 1.03


@pytest.mark.parametrize("kind", SCALES)
def test_an_outlier_is_clipped_where_that_is_better(kind: str) -> None:
    weight = random(1, 4096)
    weight[0, 0] = 12.0
    assert rounded(weight, 3, kind).max() < 6.0
