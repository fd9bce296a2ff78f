"""Models that keep conversations apart, and one that does not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from usllm.models.conversations import kept_apart
from usllm.models.random_model import random_model


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma3_text"])
def test_families_follow_the_positions(family: str) -> None:
    model = random_model(family).eval()
    assert kept_apart(lambda batch: model(**batch, use_cache=False).logits, 264)


def test_a_model_that_does_not_read_positions_is_found_out() -> None:
    model = random_model("llama").eval()
    assert not kept_apart(lambda batch: model(input_ids=batch["input_ids"], use_cache=False).logits, 264)


def test_a_recurrent_model_is_found_out() -> None:
    def forward(batch: dict[str, Tensor]) -> Tensor:
        return batch["input_ids"].cumsum(1)[..., None].float()

    assert not kept_apart(forward, 264)  # type: ignore[arg-type]


def test_text_is_within_a_small_vocabulary() -> None:
    def forward(batch: dict[str, Tensor]) -> Tensor:
        assert int(batch["input_ids"].max()) < 5
        return torch.nn.functional.one_hot(batch["input_ids"], 5).float()

    assert kept_apart(forward, 5)  # type: ignore[arg-type]
