"""Scaled rotary frequencies are recovered exactly, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_of_model import llama3_divisors, write_model

from usllm.models import ModelSpec
from usllm.models.gguf_contents import GgufContents
from usllm.models.gguf_rope import llama3_scaling
from usllm.models.loading import load_config
from usllm.system.errors import UserError

NOWHERE = GgufContents(Path("x.gguf"), "llama", {}, {}, {})


@pytest.mark.parametrize("width", [16, 64, 128])
@pytest.mark.parametrize("base", [10_000.0, 500_000.0])
@pytest.mark.parametrize("factor", [2.0, 8.0, 32.0])
def test_published_parameters_are_found(width: int, base: float, factor: float) -> None:
    scaling = {
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    found = llama3_scaling(NOWHERE, torch.from_numpy(llama3_divisors(width, base, scaling)), base)
    assert found is not None
    assert found["factor"] == factor
    again = llama3_divisors(width, base, {**scaling, **found})
    assert again == pytest.approx(llama3_divisors(width, base, scaling), rel=2e-6)


@pytest.mark.parametrize(
    ("low", "high", "context"), [(1.0, 8.0, 4096), (1.0, 4.0, 2048), (2.0, 8.0, 16384), (1.0, 3.0, 32768)]
)
def test_other_parameters_are_recovered_from_the_line_between(low: float, high: float, context: int) -> None:
    scaling: dict[str, Any] = {"factor": 16.0, "low_freq_factor": low, "high_freq_factor": high}
    scaling["original_max_position_embeddings"] = context
    divisors = llama3_divisors(128, 500_000.0, scaling)
    found = llama3_scaling(NOWHERE, torch.from_numpy(divisors), 500_000.0)
    assert found is not None
    assert llama3_divisors(128, 500_000.0, {**scaling, **found}) == pytest.approx(divisors, rel=2e-6)
    if low == 1.0:
        assert (found["high_freq_factor"], found["original_max_position_embeddings"]) == (high, context)


def test_equal_divisors_are_a_linear_scaling_and_ones_are_none() -> None:
    assert llama3_scaling(NOWHERE, torch.ones(8), 1e4) is None
    assert llama3_scaling(NOWHERE, torch.full((8,), 4.0), 1e4) == {"rope_type": "linear", "factor": 4.0}


def test_divisors_of_no_known_form_are_refused(tmp_path: Path) -> None:
    def odd(tensors: dict[str, np.ndarray]) -> None:
        tensors["rope_freqs.weight"] = np.linspace(1, 3, 32, dtype=np.float32)

    write_model(tmp_path / "model.gguf", "llama3-scaled", tensors=odd)
    with pytest.raises(UserError, match=r"rope_freqs\.weight holds divisors"):
        load_config(ModelSpec(kind="gguf", name=None, file=str(tmp_path / "model.gguf")))


def test_divisors_of_another_head_size_are_refused(tmp_path: Path) -> None:
    def short(tensors: dict[str, np.ndarray]) -> None:
        tensors["rope_freqs.weight"] = tensors["rope_freqs.weight"][:16].copy()

    write_model(tmp_path / "model.gguf", "llama3-scaled", tensors=short)
    with pytest.raises(UserError, match=r"is \[16\], a head rotates 32 pairs"):
        load_config(ModelSpec(kind="gguf", name=None, file=str(tmp_path / "model.gguf")))


def test_frequencies_that_transformers_computes_otherwise_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("USLLM_CACHE", str(tmp_path / "cache"))
    write_model(tmp_path / "model.gguf", "llama3-scaled")
    # As if the parameters were lost on the way to the model.
    monkeypatch.setattr("usllm.models.gguf_rope.llama3_scaling", lambda *_: None)
    with pytest.raises(UserError, match=r"rotary frequencies wrongly: those of model\.rotary_emb\.inv_freq"):
        load_config(ModelSpec(kind="gguf", name=None, file=str(tmp_path / "model.gguf")))
