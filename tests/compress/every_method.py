"""Cases of every compression method, built in or plugged in: drawn from the registry."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from usllm.compress import Compressor, LayerPlan, Statistics, method
from usllm.compress.registry import METHODS

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "sketch": [
        {"bits_per_weight": 4.0, "rows": 2},
        {"bits_per_weight": 3.0, "operator": "mean", "rows": 1},
        {"bits_per_weight": 3.0, "operator": "mean", "rows": 1, "output_scale": True, "train_output_scale": True},
    ],
    "rounding": [{"bits": 1}, {"bits": 3, "group_size": 7, "scales": "clipped"}, {"bits_per_weight": 5.0}],
    "littlebit": [{"bits_per_weight": 2.0}, {"bits_per_weight": 4.0, "paths": 2, "slope": 2.0}],
}
CASES = [(name, options) for name in METHODS for options in OPTIONS[name]]
shapes = st.tuples(st.integers(20, 45), st.integers(20, 45))
cases = pytest.mark.parametrize(("name", "options"), CASES)


def compressor_of(name: str, options: dict[str, Any]) -> Compressor:
    found = method(name)
    return found(found.Options(**options))


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def planned(compressor: Compressor, shape: tuple[int, int], seed: int = 0) -> tuple[LayerPlan, Tensor, Statistics]:
    """A plan under the configuration's ceiling, or for its width, with a weight and statistics."""
    weight = random(*shape, seed=seed)
    statistics = Statistics(random(shape[1], seed=seed + 1).square() + 0.1, weight.square().mean(0))
    rate = compressor.options.bits_per_weight
    bits = compressor.most_bits(shape) if rate is None else int(rate * weight.numel())
    return compressor.plan(shape, "layer", statistics, bits), weight, statistics
