"""What GGUF files of every family say is what their models compute, and nothing they say is left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from gguf_of_model import MODELS, write_model
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
    plain = configuration_of(read_contents(tmp_path / "model.gguf"))
    plain.rope_parameters = {"rope_type": "default", "rope_theta": 500_000.0}
    plain.rope_scaling = None if BEFORE_5 else plain.rope_parameters
    unscaled = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", config=plain, dtype=torch.float32)
    assert (logits(unscaled) - logits(original)).abs().max() > 0.01  # the test can fail


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"llama.logit_scale": 0.5}, "llama.logit_scale=0.5 is not understood"),
    ("llama", {"llama.expert_count": 8, "llama.expert_used_count": 2}, r"llama.expert_count=8 .*\(2 such keys"),
    ("llama", {"clip.has_vision_encoder": True}, "clip.has_vision_encoder=True"),
    ("llama", {"tokenizer.ggml.normalizer": "nfkc"}, "tokenizer.ggml.normalizer='nfkc' is not understood"),
    ("llama", {"general.type": "adapter"}, "general.type is 'adapter'"),
    ("llama", {"split.count": 3}, "one of 3 parts"),
    ("llama", {"llama.rope.dimension_count": 16}, "rotates a part of a head"),
    ("llama", {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}, "type=yarn"),
    ("llama", {"llama.rope.scaling.factor": 4.0}, "factor 4.0"),
    ("llama", {"llama.rope.scaling.attn_factor": 1.5}, "attn_factor=1.5"),
    ("llama", {"llama.rope.freq_base_swa": 1e4}, "freq_base_swa"),
    ("llama", {"llama.attention.value_length": 16}, "keys of 32 numbers and values of 16"),
    ("llama", {"llama.attention.head_count_kv": 3}, "4 heads cannot share 3 keys"),
    ("llama", {"llama.attention.head_count_kv": [2, 1]}, "differs between layers"),
    ("llama", {"llama.feed_forward_length": [96, 64]}, "the same for all layers"),
    ("llama", {"llama.block_count": None}, "llama.block_count=None"),
    ("llama", {"llama.vocab_size": 100}, "counts 100 tokens, token_embd.weight 272"),
    ("llama", {"llama.attention.sliding_window": 128}, "sliding_window=128 is not understood"),
    ("llama3-scaled", {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}, "rope_freqs.weight with"),
    ("qwen2", {"qwen2.attention.key_length": 32, "qwen2.attention.value_length": 32}, "key_length=32"),
    ("gemma3", {"gemma3.attention.sliding_window": None}, "states no gemma3.attention.sliding_window"),
    ("gemma3", {"gemma3.attention.sliding_window_pattern": [True, False]}, "2 entries for 7 layers"),
    ("phi3-longrope", {"phi3.rope.scaling.attn_factor": 1.0}, "attn_factor=1.0 is not the"),
]


@pytest.mark.parametrize(("name", "metadata", "message"), REFUSED)
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
    ("qwen2", {"qwen2.rope.freq_base": None}, {"num_key_value_heads": 2}),
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
