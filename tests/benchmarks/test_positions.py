"""Means of losses by position are those of the positions that they name."""

from __future__ import annotations

import pytest
import torch

from benchmarks import positions
from usllm.models.random_model import random_model


def test_means_are_cut_at_the_edges() -> None:
    values = torch.arange(1.0, 128.0).expand(3, -1)  # the loss of a position is its number
    found = positions.by_position(values)
    assert found == {"1 to 15": 8.0, "16 to 63": 39.5, "64 to 127": 95.5}


def test_losses_are_those_of_the_next_token() -> None:
    model = random_model("llama").eval()
    windows = torch.randint(0, model.config.vocab_size, (2, 20), generator=torch.Generator().manual_seed(0))
    found = positions.losses(model, windows)
    assert found.shape == (2, 19)
    with torch.no_grad():
        expected = model(input_ids=windows, labels=windows).loss
    assert float(found.mean()) == pytest.approx(float(expected), rel=2e-2)  # bf16 where the machine has it
