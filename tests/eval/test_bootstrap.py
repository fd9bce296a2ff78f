"""Intervals over windows: they hold the mean, cover what they promise, and pairs are narrower than two models."""

from __future__ import annotations

import math

import pytest
import torch

from usllm.eval.bootstrap import interval


def test_equal_windows_leave_no_doubt() -> None:
    low, high = interval([2.0] * 8)
    assert low == high == pytest.approx(math.exp(2.0))


def test_interval_is_that_of_the_normal_mean() -> None:
    losses = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 3
    low, high = interval(losses.tolist())
    mean, error = float(losses.mean()), float(losses.std()) / 20
    assert math.log(low) == pytest.approx(mean - 1.96 * error, abs=0.1 * error)
    assert math.log(high) == pytest.approx(mean + 1.96 * error, abs=0.1 * error)


def test_pairs_are_resampled_together() -> None:
    dense = (torch.randn(64, generator=torch.Generator().manual_seed(1)) + 3).tolist()
    low, high = interval([loss + 0.5 for loss in dense], dense)
    assert low == pytest.approx(math.exp(0.5)) == high
    wide = interval([loss + 0.5 for loss in dense])
    assert wide[1] / wide[0] > 1.1


def test_it_is_seeded() -> None:
    losses = [0.1 * number**2 for number in range(12)]
    assert interval(losses) == interval(losses) != interval(losses, seed=1)


def test_pairs_of_other_windows_and_no_windows_are_refused() -> None:
    with pytest.raises(ValueError, match="3 windows against 2"):
        interval([1.0, 2.0, 3.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="no window"):
        interval([])
