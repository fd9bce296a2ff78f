"""What GGUF files of every family say is what their models compute, and nothing they say is left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from damaged_gguf import METADATA
from gguf_of_model import MODELS, tiny_model, write_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from usllm.models import ModelSpec
from usllm.models.gguf_contents import read_contents
from usllm.models.gguf_families import configuration_of
from usllm.models.loading import load_config, load_dense
from usllm.system.errors import UserError

BEFORE_5 = int(transformers.__version__.partition(".")[0]) < 5
SENTENCEPIECE = [name for name in MODELS if name.startswith(("gemma", "phi3"))]  # which transformers 4 misreads


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USLLM_CACHE", str(tmp_path / "cache"))


def spec(path: Path) -> ModelSpec:
    return ModelSpec(kind="gguf", name=None, file=str(path))


def logits(model: PreTrainedModel) -> torch.Tensor:
    ids = torch.randint(256, (2, 120), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.skipif(BEFORE_5 and name in SENTENCEPIECE, reason="needs transformers 5"))
        for name in MODELS
    ],
)
def test_logits_are_those_of_the_model_that_was_written(name: str, tmp_path: Path) -> None:
    original = write_model(tmp_path / "model.gguf", name)
    loaded = load_dense(spec(tmp_path / "model.gguf"))
    assert torch.equal(logits(loaded), logits(original))


def test_scaled_frequencies_survive_saving(tmp_path: Path) -> None:
    original = write_model(tmp_path / "model.gguf", "llama3-scaled")
    load_dense(spec(tmp_path / "model.gguf")).save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert torch.equal(logits(again), logits(original))
    config = tiny_model("llama3-scaled").config
    config.rope_parameters = {"rope_type": "default", "rope_theta": 500_000.0}
    config.rope_scaling = None if BEFORE_5 else config.rope_parameters
    unscaled = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", config=config, dtype=torch.float32)
    assert (logits(unscaled) - logits(original)).abs().max() > 0.01  # what a lost scaling looks like


@pytest.mark.parametrize(("name", "metadata", "message"), METADATA)
def test_what_is_not_understood_is_refused_by_name(
    name: str, metadata: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write_model(tmp_path / "model.gguf", name, metadata=metadata)
    with pytest.raises(UserError, match=message) as caught:
        load_config(spec(tmp_path / "model.gguf"))
    assert "\n" not in str(caught.value)


USED: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("llama", {"llama.attention.layer_norm_rms_epsilon": 1e-3}, {"rms_norm_eps": pytest.approx(1e-3)}),
    ("llama", {"llama.context_length": 77}, {"max_position_embeddings": 77}),
    ("gemma2", {"gemma2.final_logit_softcapping": 12.0}, {"final_logit_softcapping": 12.0}),
    ("gemma2", {"gemma2.attention.sliding_window": 8}, {"sliding_window": 8}),
    (
        "gemma3",
        {"gemma3.attention.sliding_window_pattern": 3},
        {"layer_types": [f"{'full' if layer % 3 == 2 else 'sliding'}_attention" for layer in range(7)]},
    ),
    ("phi3", {"phi3.attention.sliding_window": 32}, {"sliding_window": 32}),
]


@pytest.mark.parametrize(("name", "metadata", "settings"), USED)
def test_what_is_understood_has_its_effect(
    name: str, metadata: dict[str, Any], settings: dict[str, Any], tmp_path: Path
) -> None:
    write_model(tmp_path / "model.gguf", name, metadata=metadata)
    config = configuration_of(read_contents(tmp_path / "model.gguf"))
    assert {key: getattr(config, key) for key in settings} == settings


def test_head_count_that_is_not_stated_is_that_of_the_queries_not_a_default_of_a_class(tmp_path: Path) -> None:
    write_model(tmp_path / "model.gguf", "qwen2", metadata={"qwen2.attention.head_count_kv": None})
    assert configuration_of(read_contents(tmp_path / "model.gguf")).num_key_value_heads == 4
