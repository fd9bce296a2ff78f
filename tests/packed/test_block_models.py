"""Models with layers at 8 and 4 bits, on their way through transformers with a quantizer as small as it can be."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from usllm.packed.block_layers import BlockEmbedding, BlockLinear

METHOD = "blocks_of_a_test"
NAMES = ("model.embed_tokens", "lm_head", "model.layers.0.self_attn.o_proj")


@register_quantization_config(METHOD)
class BlockConfig(QuantizationConfigMixin):
    def __init__(self, bits: int = 8, names: tuple[str, ...] = NAMES, **unknown: Any) -> None:
        self.quant_method, self.bits, self.names = METHOD, bits, list(names)


@register_quantizer(METHOD)
class BlockQuantizer(HfQuantizer):
    requires_calibration = True

    def validate_environment(self, *args: Any, **kwargs: Any) -> None: ...

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        bits = self.quantization_config.bits
        for name in self.quantization_config.names:
            old = model.get_submodule(name)
            with old.weight.device:
                if isinstance(old, nn.Embedding):
                    new = BlockEmbedding(old.num_embeddings, old.embedding_dim, bits, old.weight.dtype)
                else:
                    new = BlockLinear(old.in_features, old.out_features, bits, old.bias is not None, old.weight.dtype)
            model.set_submodule(name, new)
        model.tie_weights()  # transformers 4 looks for tied weights before it ties them again

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        return model

    def is_serializable(self, safe_serialization: bool | None = None, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def tiny_llama(tied: bool, bits: int) -> PreTrainedModel:
    """A Llama of one layer with biases, whose embedding, head and output projection are packed."""
    config = AutoConfig.for_model(
        "llama",
        vocab_size=264,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        attention_bias=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        for weight in model.parameters():
            nn.init.normal_(weight, std=0.1)
    for name in NAMES:
        old = model.get_submodule(name)
        if isinstance(old, nn.Embedding):
            new = BlockEmbedding.from_weight(old.weight, bits, name)
        else:
            new = BlockLinear.from_weight(old.weight, bits, old.bias, name)
        model.set_submodule(name, new)
    model.tie_weights()
    model.config.quantization_config = BlockConfig(bits)
    model.hf_quantizer = BlockQuantizer(model.config.quantization_config, pre_quantized=True)
    return model


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            assert not found.keys() & set(file.keys())
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    return found


def load(folder: Path, **kwargs: Any) -> PreTrainedModel:
    """Load, and insist that every tensor was there and had its place."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **kwargs)
    assert not any(info.values()), info
    return model


def is_tied(model: PreTrainedModel) -> bool:
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (embedding is head) == (embedding.data_ptr() == head.data_ptr())
    return embedding is head


IDS = torch.arange(20)[None]


@pytest.fixture(params=[(True, 8), (True, 4), (False, 8)], ids=["tied 8", "tied 4", "untied 8"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[PreTrainedModel, Path, bool]:
    """A model, the folder that it was saved to, and whether its head is tied."""
    tied, bits = request.param
    model = tiny_llama(tied, bits)
    assert is_tied(model) == tied
    model.save_pretrained(tmp_path / "saved")
    return model, tmp_path / "saved", tied


@torch.no_grad()
def test_loaded_model_has_the_same_logits_and_saves_the_same_file(
    saved: tuple[PreTrainedModel, Path, bool], tmp_path: Path
) -> None:
    model, folder, tied = saved
    assert ("lm_head.weight" in tensors_of(folder)) == (not tied)  # what is shared is stored once
    for kwargs in ({}, {"dtype": "auto"}, {"dtype": torch.float32}, {"device_map": "cpu"}):
        loaded = load(folder, **kwargs)
        assert is_tied(loaded) == tied
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_dtype_at_load_is_computed_in_and_leaves_the_bytes(
    saved: tuple[PreTrainedModel, Path, bool], dtype: torch.dtype, tmp_path: Path
) -> None:
    _, folder, tied = saved
    loaded = load(folder, dtype=dtype)
    assert loaded.get_input_embeddings().dtype == loaded.dtype == loaded(IDS).logits.dtype == dtype
    assert is_tied(loaded) == tied
    loaded.save_pretrained(tmp_path / "again")
    before, after = tensors_of(folder), tensors_of(tmp_path / "again")
    assert before.keys() == after.keys()
    packed = [name for name, tensor in before.items() if tensor.dtype == torch.uint8]
    assert len(packed) == (2 if tied else 3)
    assert all(torch.equal(before[name], after[name]) for name in packed)


@torch.no_grad()
def test_ties_survive_casts_moves_and_copies(saved: tuple[PreTrainedModel, Path, bool]) -> None:
    _, folder, tied = saved
    loaded = load(folder)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        loaded.to(dtype)
        assert loaded.get_input_embeddings().dtype == loaded(IDS).logits.dtype == dtype
        assert is_tied(loaded) == tied
    loaded._apply(torch.clone)  # new storage for every tensor, as a move to another device gives
    assert is_tied(loaded) == tied
    assert is_tied(copy.deepcopy(loaded)) == tied
    with torch.autocast("cpu", torch.bfloat16):
        assert loaded(IDS).logits.dtype == torch.bfloat16


def test_model_generates(saved: tuple[PreTrainedModel, Path, bool]) -> None:
    model, folder, _ = saved
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(load(folder).generate(IDS, **options), model.generate(IDS, **options))


@torch.no_grad()
def test_shards_and_offloading_to_disk_work(saved: tuple[PreTrainedModel, Path, bool], tmp_path: Path) -> None:
    model, folder, _ = saved
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert torch.equal(load(tmp_path / "shards")(IDS).logits, model(IDS).logits)
    places = dict.fromkeys(("model.embed_tokens", "lm_head", "model.norm", "model.rotary_emb"), "cpu")
    offloaded = load(
        folder, device_map={**places, "model.layers.0": "disk"}, offload_folder=str(tmp_path / "offloaded")
    )
    assert offloaded.get_submodule(NAMES[-1]).weight.is_meta
    assert torch.equal(offloaded(IDS).logits, model(IDS).logits)
