"""Layers at 8 and 4 bits: what they compute, what they keep in memory, and their way through transformers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from usllm.packed import block_layers
from usllm.packed.block_layers import BlockEmbedding, BlockLinear
from usllm.packed.blocks import SCHEMES, pack_blocks, unpack_blocks

METHOD = "blocks_of_a_test"
NAMES = ("model.embed_tokens", "lm_head", "model.layers.0.self_attn.o_proj")

bits_of_a_scheme = pytest.mark.parametrize("bits", sorted(SCHEMES))


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> int:
    """Forward passes decode seven rows of 64 weights at a time."""
    monkeypatch.setattr(block_layers, "DECODED_BYTES", 7 * 64 * 4)
    return 7


# What they compute


@bits_of_a_scheme
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(64,), (1, 64), (3, 5, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_is_that_of_the_decoded_weight(
    bits: int, bias: bool, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    layer = BlockLinear.from_weight(normal(24, 64), bits, normal(24, seed=1) if bias else None)
    x = normal(*shape, seed=2, dtype=dtype)
    expected = functional.linear(x, layer.decoded_weight(dtype), None if layer.bias is None else layer.bias.to(dtype))
    assert torch.equal(layer(x), expected)


@bits_of_a_scheme
@pytest.mark.parametrize("bias", [False, True])
def test_chunks_are_exact_one_by_one(bits: int, bias: bool, small_chunks: int) -> None:
    layer = BlockLinear.from_weight(normal(24, 64), bits, normal(24, seed=1) if bias else None)
    x = normal(3, 5, 64, seed=2)
    y, weight = layer(x), layer.decoded_weight()
    for first in range(0, 24, small_chunks):
        chunk = slice(first, first + small_chunks)
        part = functional.linear(x, weight[chunk], None if layer.bias is None else layer.bias[chunk])
        assert torch.equal(y[..., chunk], part)
    torch.testing.assert_close(y, functional.linear(x, weight, layer.bias))


@bits_of_a_scheme
def test_no_more_than_a_chunk_is_decoded(bits: int, small_chunks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, decoded = BlockLinear.from_weight(normal(24, 64), bits), []

    def counting(packed: torch.Tensor, *args: Any) -> torch.Tensor:
        decoded.append(len(packed))
        return unpack_blocks(packed, *args)

    monkeypatch.setattr(block_layers, "unpack_blocks", counting)
    layer(normal(2, 64).requires_grad_()).sum().backward()
    assert decoded == [7, 7, 7, 3] * 2  # forward and backward


@bits_of_a_scheme
def test_gradients_are_those_of_the_decoded_weight(bits: int, small_chunks: int) -> None:
    layer = BlockLinear.from_weight(normal(24, 64), bits, normal(24, seed=1))
    weight, upstream = layer.decoded_weight(), normal(3, 5, 24, seed=4)
    grads = []
    for compute in (layer, lambda x: functional.linear(x, weight, layer.bias)):
        x = normal(3, 5, 64, seed=2).requires_grad_()
        layer.zero_grad()
        compute(x).backward(upstream)
        grads.append((x.grad, layer.bias.grad.clone()))
    torch.testing.assert_close(grads[0], grads[1])


def test_gradients_pass_a_numerical_check(small_chunks: int) -> None:
    layer = BlockLinear.from_weight(normal(9, 64, dtype=torch.float64), 8, normal(9, dtype=torch.float64))
    assert torch.autograd.gradcheck(layer, normal(2, 64, dtype=torch.float64).requires_grad_())


@bits_of_a_scheme
def test_backward_keeps_packed_bytes_only(bits: int, small_chunks: int) -> None:
    layer, saved = BlockLinear.from_weight(normal(24, 64), bits), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        layer(normal(2, 64).requires_grad_())
    assert [tensor.dtype for tensor in saved] == [torch.uint8]


@bits_of_a_scheme
def test_embedding_is_that_of_the_decoded_weight(bits: int) -> None:
    module = BlockEmbedding.from_weight(normal(10, 64), bits)
    ids = torch.tensor([[0, 9, 3], [3, 3, 1]])
    assert torch.equal(module(ids), functional.embedding(ids, module.decoded_weight()))
    assert module(ids[:0]).shape == (0, 3, 64)


def test_embedding_decodes_only_the_rows_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    module, decoded = BlockEmbedding.from_weight(normal(1000, 64), 8), []

    def counting(packed: torch.Tensor, *args: Any) -> torch.Tensor:
        decoded.append(packed.shape[:-1].numel())
        return unpack_blocks(packed, *args)

    monkeypatch.setattr(block_layers, "unpack_blocks", counting)
    module(torch.tensor([[1, 2, 3]]))
    assert decoded == [3]


@pytest.mark.parametrize("index", [-1, 10])
def test_embedding_refuses_numbers_out_of_range(index: int) -> None:
    with pytest.raises(IndexError):
        BlockEmbedding.from_weight(normal(10, 64), 8)(torch.tensor([index]))


# Dtypes


@bits_of_a_scheme
def test_linear_computes_in_the_dtype_of_its_input_and_of_autocast(bits: int) -> None:
    layer = BlockLinear.from_weight(normal(24, 64), bits, normal(24, seed=1))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert layer(normal(2, 64, dtype=dtype)).dtype == dtype
    x = normal(2, 64)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    weight, bias = layer.decoded_weight(torch.bfloat16), layer.bias.to(torch.bfloat16)
    assert torch.equal(y, functional.linear(x.to(torch.bfloat16), weight, bias))


@bits_of_a_scheme
@pytest.mark.parametrize(
    ("cast", "dtype"),
    [
        (lambda module: module.to(torch.bfloat16), torch.bfloat16),
        (lambda module: module.to("cpu", torch.float16), torch.float16),
        (lambda module: module.half(), torch.float16),
        (lambda module: module.bfloat16().float(), torch.float32),
        (lambda module: module.double(), torch.float64),
        (lambda module: module.half().cpu(), torch.float16),
    ],
)
def test_embedding_follows_casts_and_its_bytes_do_not(bits: int, cast: Any, dtype: torch.dtype) -> None:
    module = BlockEmbedding.from_weight(normal(10, 64), bits)
    weight = module.weight.clone()
    parent = cast(nn.Sequential(module))
    assert (module.dtype, module.weight.dtype) == (dtype, torch.uint8)
    assert torch.equal(module.weight, weight)
    assert torch.equal(parent(torch.tensor([3])), unpack_blocks(weight[3:4], bits, dtype))


def test_embedding_keeps_its_dtype_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert BlockEmbedding.from_weight(normal(10, 64), 8)(torch.tensor([1])).dtype == torch.float32


# As modules


@bits_of_a_scheme
def test_shapes_alone_make_empty_modules_on_the_meta_device(bits: int) -> None:
    with torch.device("meta"):
        linear = BlockLinear(64, 24, bits, bias=True, dtype=torch.bfloat16)
        embedding = BlockEmbedding(10, 64, bits, dtype=torch.bfloat16)
    assert all(tensor.is_meta for module in (linear, embedding) for tensor in module.state_dict().values())
    assert (linear.bias.dtype, embedding.dtype) == (torch.bfloat16, torch.bfloat16)
    packed = pack_blocks(normal(10, 64), bits)
    embedding.load_state_dict({"weight": packed}, assign=True)
    assert torch.equal(embedding(torch.arange(10)), unpack_blocks(packed, bits, torch.bfloat16))


@bits_of_a_scheme
def test_size_and_scheme_are_shown(bits: int) -> None:
    linear, embedding = BlockLinear.from_weight(normal(24, 64), bits), BlockEmbedding.from_weight(normal(10, 64), bits)
    assert (linear.packed_bytes, embedding.packed_bytes) == (linear.weight.nbytes, embedding.weight.nbytes)
    assert linear.packed_bytes == 24 * {8: 68, 4: 36}[bits]
    assert f"in_features=64, out_features=24, bias=False, scheme={SCHEMES[bits]}" in repr(linear)
    assert f"10, 64, scheme={SCHEMES[bits]}, dtype=torch.float32" in repr(embedding)


def test_weight_that_cannot_be_packed_is_named() -> None:
    with pytest.raises(ValueError, match="lm_head: 40 columns"):
        BlockLinear.from_weight(normal(4, 40), 8, name="lm_head")
    with pytest.raises(ValueError, match="embed: 40 columns"):
        BlockEmbedding.from_weight(normal(4, 40), 8, name="embed")


def test_state_of_another_shape_is_refused() -> None:
    layer = BlockLinear.from_weight(normal(24, 64), 8)
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        layer.load_state_dict({"weight": pack_blocks(normal(24, 64), 4)})


# Through transformers, with a quantizer as small as it can be


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
