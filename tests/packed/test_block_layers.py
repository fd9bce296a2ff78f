"""Layers at 8 and 4 bits: what they compute, and what they keep in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from usllm.packed import block_layers
from usllm.packed.block_layers import BlockEmbedding, BlockLinear
from usllm.packed.blocks import SCHEMES, chunk_rows, pack_blocks, unpack_blocks
from usllm_kernels.ops.block_linear import reference
from usllm_kernels.ops.block_linear.numba import FEW_TOKENS

bits_of_a_scheme = pytest.mark.parametrize("bits", sorted(SCHEMES))


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> int:
    """Forward passes decode seven rows of 64 weights at a time."""
    for module in (reference, block_layers):
        monkeypatch.setattr(module, "chunk_rows", lambda columns: chunk_rows(columns, 7 * 64 * 4))
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
    if dtype == torch.float32 or x[..., 0].numel() > FEW_TOKENS:
        assert torch.equal(layer(x), expected)
    else:  # codes are multiplied as they lie, and not rounded first
        torch.testing.assert_close(layer(x), expected, rtol=0.02, atol=0.2)


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

    for module in (reference, block_layers):
        monkeypatch.setattr(module, "unpack_blocks", counting)
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
    x = normal(FEW_TOKENS + 1, 64)
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
